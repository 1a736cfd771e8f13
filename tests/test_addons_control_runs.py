"""Whole runs with a ControlNet: diffusers' pipelines are the judge. What finds edges, and reads depth."""

import zlib
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.addons.loading import load_control
from ella_kd.models.addons.preprocessing import canny, depth, pixels, preprocessor
from ella_kd.models.addons.t2i import T2IAdapter
from ella_kd.samplers import sample_ddim
from families import WAYS, byte_tokenizer, family
from test_addons_control import their_controlnet
from tiny import relative

KINDS = {"sd2": diffusers.StableDiffusionControlNetPipeline, "sdxl": diffusers.StableDiffusionXLControlNetPipeline}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_equals_diffusers(kind: str, tmp_path: Path) -> None:
    """Four steps of DDIM, guided, from given latents: steered on both sides; in guess mode on the conditional one."""
    of = family(kind)
    sd = of.ours
    theirs = their_controlnet(sd.unet.config, 3)  # type: ignore[arg-type]
    theirs.save_pretrained(tmp_path / "net")
    net = ControlNet.load(tmp_path / "net")
    bang = byte_tokenizer("!")
    parts: dict[str, Any] = {"text_encoder": of.texts[0], "controlnet": theirs}
    parts |= ({"tokenizer": bang, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
              if kind == "sd2" else {"text_encoder_2": of.texts[1], "tokenizer": byte_tokenizer(), "tokenizer_2": bang})
    pipe = of.theirs(KINDS[kind], **parts)
    pipe.scheduler = diffusers.DDIMScheduler(**WAYS, prediction_type=pipe.scheduler.config.prediction_type,
                                             clip_sample=False, set_alpha_to_one=True)
    latents = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(7))
    picture = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(8))
    denoiser = sd.denoiser()
    cond, uncond = sd.encode("a red fox", "clip"), sd.encode("bad", "clip")
    runs = []
    for guess in ("", "diffusers"):
        want = pipe(prompt="a red fox", negative_prompt="bad", image=picture, latents=latents, guidance_scale=4.0,
                    num_inference_steps=4, controlnet_conditioning_scale=0.8, guess_mode=bool(guess),
                    output_type="latent").images
        sigmas = torch.cat([denoiser.t_to_sigma(pipe.scheduler.timesteps.double()), torch.zeros(1)]).float()
        args = {"cond": cond.with_control(net, picture, 0.8, guess=guess), "cond_scale": 4.0,
                "uncond": uncond if guess else uncond.with_control(net, picture, 0.8)}
        x = latents * (1 + sigmas[0] ** 2).sqrt()
        runs.append(sample_ddim(denoiser, x, sigmas, extra_args=args, disable=True))
        assert relative(runs[-1], want) < 1e-4
    plain = sample_ddim(denoiser, x, sigmas, extra_args={"cond": cond, "uncond": uncond, "cond_scale": 4.0},
                        disable=True)
    assert relative(runs[0], plain) > 1e-2 < relative(runs[1], plain) and relative(*runs) > 1e-2


def test_a_file_says_which_control_it_is(tmp_path: Path) -> None:
    ControlNet(family("sd2").ours.unet.config).save(tmp_path / "a.safetensors")  # type: ignore[arg-type]
    theirs: Any = diffusers.T2IAdapter(channels=[32, 64, 64, 64])
    theirs.save_pretrained(tmp_path / "b")
    assert isinstance(load_control(tmp_path / "a.safetensors"), ControlNet)
    assert isinstance(load_control(tmp_path / "b"), T2IAdapter)


def test_canny_finds_the_edges_of_a_disc() -> None:
    """A thin closed line, on the border, by thresholds of Sobel's sums; faint edges go on from strong ones only."""
    rows, columns = np.mgrid[:64, :64]
    inside: Any = np.hypot(rows - 32, columns - 30) < 18
    picture = np.where(inside[..., None], (200, 120, 40), (40, 120, 40)).astype(np.uint8)
    edges: Any = np.asarray(canny(picture))[..., 0] > 0
    border = ndimage.binary_dilation(inside) ^ ndimage.binary_erosion(inside)
    assert edges.any() and not (edges & ~border).any()
    assert 0.8 * 2 * np.pi * 18 < edges.sum() < 1.3 * 2 * np.pi * 18
    filled = ndimage.binary_fill_holes(edges)
    assert filled.sum() > 0.9 * inside.sum(), "the line is closed"
    assert not np.asarray(canny(picture, 100, 960)).any(), "the strongest is 6 * 160"
    assert np.asarray(canny(picture, 100, 900)).any()
    step = np.zeros((20, 20, 3), np.uint8)
    step[:, 10:] = 40  # 160 everywhere but in the corner, where it is strong
    step[:4, 10:] = 90
    strong, weak = (np.asarray(canny(step, low, 200))[:, :, 0].max(1) > 0 for low in (100, 200))
    assert strong[6:].all() and not weak[6:].any()
    assert canny(Image.fromarray(picture)).size == (64, 64)


@pytest.mark.parametrize(("low", "high", "count", "crc"), [(100, 200, 1720, 1853063195), (50, 400, 1627, 188330104)])
def test_canny_is_opencvs(low: int, high: int, count: int, crc: int) -> None:
    """The numbers are those of cv2.Canny, OpenCV 5.0.0, of the same picture."""
    total = np.random.default_rng(0).integers(0, 256, (80, 96, 3)).astype(np.int64).cumsum(0).cumsum(1)
    sums = total[16:, 16:] - total[:-16, 16:] - total[16:, :-16] + total[:-16, :-16]
    edges = np.asarray(canny((sums // 256 * 8 % 256).astype(np.uint8), low, high))[..., 0] > 0
    assert (edges.sum(), zlib.crc32(np.packbits(edges).tobytes())) == (count, crc)


def test_depth_is_stretched_and_near_is_bright(tmp_path: Path) -> None:
    metres = np.linspace(2.0, 10.0, 16).reshape(4, 4)
    np.save(tmp_path / "depth.npy", metres)
    levels = np.asarray(depth(tmp_path / "depth.npy", near="dark"))[..., 0]
    assert levels[0, 0] == 255 and levels[-1, -1] == 0 and (np.diff(levels.ravel().astype(int)) < 0).all()
    Image.fromarray((metres * 6000).astype(np.uint16)).save(tmp_path / "depth.png")
    assert np.abs(np.asarray(depth(tmp_path / "depth.png")).astype(int)[..., 0] - (255 - levels)).max() <= 1
    assert float(pixels(depth(tmp_path / "depth.png")).max()) == 1.0
    with pytest.raises(FileNotFoundError, match="no depth map at"):
        depth(tmp_path / "nothing.png")
    assert preprocessor("depth") is depth
    with pytest.raises(ValueError, match="no preprocessing 'sketchy': canny, depth are here"):
        preprocessor("sketchy")
