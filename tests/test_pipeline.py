"""The pipeline as a value: its denoiser, its place, and what `draw` starts from."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ella_kd import CFG, CFGDenoiser, DiffusersUNet, ELLADenoiser, Pipeline, Rescale, draw, generate
from ella_kd.models import NoiseSchedule
from ella_kd.samplers import get_sigmas_karras, randn, sample_dpmpp_2m
from tiny import noise, randomised


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return len(a) == len(b) and all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(a, b))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@torch.no_grad()
def test_the_denoiser_is_that_of_the_files(pipeline: Pipeline, prediction: Any) -> None:
    sd = replace(pipeline, noise_schedule=NoiseSchedule.kolors() if prediction == "eps" else NoiseSchedule.sd2_v())
    assert sd.tsc and sd.t5
    x, sigma = noise(1, 4, 4, 4), torch.tensor([2.0])
    args: dict[str, Any] = {"cond": sd.t5("a red circle"), "uncond": sd.t5("")}
    want = CFGDenoiser(ELLADenoiser(sd.unet, sd.tsc, sd.noise_schedule))(x, sigma, **args, cond_scale=3.0)
    assert torch.equal(sd.denoiser()(x, sigma, **args, cond_scale=3.0), want)
    assert torch.equal(sd.denoiser(3.0)(x, sigma, **args), want)
    assert torch.equal(sd.denoiser(Rescale(CFG(3.0), 0.0))(x, sigma, **args), want)
    other = CFGDenoiser(ELLADenoiser(sd.unet, sd.tsc))(x, sigma, **args, cond_scale=3.0)
    assert not torch.allclose(other, want, atol=1e-3), "with SD1.5's schedule it would be another model"


def test_a_v_prediction_pipeline_is_drawn_as_one(pipeline: Pipeline) -> None:
    sd = replace(pipeline, noise_schedule=NoiseSchedule.sd2_v())
    denoiser = sd.denoiser()
    sigmas = get_sigmas_karras(3, denoiser.sigma_min, denoiser.sigma_max)
    args: dict[str, Any] = {"cond": sd.encode("a circle"), "uncond": sd.encode(""), "cond_scale": 3.0}
    latents = sample_dpmpp_2m(denoiser, randn((1, 4, 4, 4), [5]) * sigmas[0], sigmas, extra_args=args, disable=True)
    [picture] = generate(sd, "a circle", scale=3.0, steps=3, seeds=5)
    drawn = draw(sd, args["cond"], uncond=args["uncond"], guidance=3.0, latents=latents, sigmas=torch.tensor([1e-4, 0]))
    assert np.abs(np.asarray(drawn[0], int) - np.asarray(picture.image, int)).max() <= 1


class Anyones(nn.Module):
    """A network that knows nothing of us: no config, no dtype, no places."""

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return 0.9 * x + 0.01 * tokens.mean((1, 2)).view(-1, 1, 1, 1)


def test_other_peoples_networks_draw(pipeline: Pipeline) -> None:
    diffusers = randomised(cast(nn.Module, UNet2DConditionModel(
        sample_size=4, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))), 0, 0.1)
    for unet in (DiffusersUNet(diffusers), Anyones()):
        sd = replace(pipeline, unet=unet)
        [picture] = generate(sd, "a red circle", steps=2, seeds=1)
        [drawn] = draw(sd, sd.encode("a red circle"), uncond=sd.encode(""), steps=2, seeds=1)
        assert same([picture.image], [drawn])
        assert repr(sd).startswith("<Pipeline 'sd': unet ")


def test_a_drawing_starts_from_seeds_noise_or_latents(pipeline: Pipeline) -> None:
    cond = pipeline.encode(["a red circle", "a blue square"])
    args: dict[str, Any] = {"uncond": pipeline.encode(""), "steps": 4, "sampler": "dpmpp_2m_sde"}
    want = draw(pipeline, cond, seeds=[3, 4], **args)
    start = randn((2, 4, 4, 4), [3, 4])
    denoiser = pipeline.denoiser()
    sigmas = get_sigmas_karras(4, denoiser.sigma_min, denoiser.sigma_max)
    assert same(draw(pipeline, cond, seeds=3, noise=start, **args), want)
    assert same(draw(pipeline, cond, seeds=3, latents=start * sigmas[0], **args), want)
    assert same(draw(pipeline, cond, seeds=[3, 4], sigmas=sigmas, **{**args, "steps": 9}), want)
    assert not same(draw(pipeline, cond, seeds=3, noise=-start, **args), want)
    late = draw(pipeline, cond, seeds=3, latents=start * sigmas[2], sigmas=sigmas[2:], **args)
    assert not same(late, want)
    wide = draw(pipeline, cond, noise=randn((2, 4, 2, 6), [3, 4]), **args)
    assert [image.size for image in wide] == [(24, 8)] * 2


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"seed": 3}, TypeError, "unknown argument seed: did you mean seeds"),
    ({"scale": 3}, TypeError, "unknown argument scale: did you mean guidance"),
    ({"weather": 3}, TypeError, "unknown argument weather: draw takes pipeline, cond, uncond"),
    ({"seeds": []}, ValueError, "seeds is empty"),
    ({"noise": torch.zeros(1, 4, 4, 4), "latents": torch.zeros(1, 4, 4, 4)}, ValueError, "not both"),
    ({"noise": torch.zeros(1, 4, 4, 4).half()}, TypeError, r"noise must be .* float32 .* got torch.float16"),
    ({"noise": [1]}, TypeError, "noise must be a tensor .* got list"),
    ({"latents": torch.zeros(4, 4)}, ValueError, r"latents must be latents \[B, C, h, w\], got shape \[4, 4\]"),
    ({"latents": torch.zeros(1, 3, 4, 4)}, ValueError, "latents have 4 channels"),
    ({"noise": torch.zeros(2, 4, 4, 4), "seeds": [1, 2, 3]}, ValueError, "3 seeds and 2 rows"),
    ({"noise": torch.zeros(1, 4, 4, 4), "width": 24}, ValueError, "are a picture of 16x16, not 24xNone"),
])
def test_bad_starts_are_refused(pipeline: Pipeline, arguments: dict[str, Any], error: type[Exception],
                                message: str) -> None:
    with pytest.raises(error, match=message):
        draw(pipeline, pipeline.encode("a"), uncond=pipeline.encode(""), steps=1, **arguments)


def test_elsewhere_is_a_copy_that_shares_what_stays(pipeline: Pipeline) -> None:
    before = draw(pipeline, pipeline.encode("a"), uncond=pipeline.encode(""), steps=1)
    double = pipeline.to(dtype=torch.float64)
    assert (pipeline.dtype, double.dtype) == (torch.float32, torch.float64)
    parts = [double.unet, double.vae, double.tsc, double.clip and double.clip.model, double.t5 and double.t5.model]
    assert all(x.dtype == torch.float64 and not x.requires_grad for part in parts if part for x in part.parameters())
    assert len(draw(double, double.encode("a"), uncond=double.encode("", "clip"), steps=1)) == 1
    assert same(draw(pipeline, pipeline.encode("a"), uncond=pipeline.encode(""), steps=1), before)
    there = pipeline.to("cpu", torch.float32)
    assert next(there.unet.parameters()).data_ptr() == next(pipeline.unet.parameters()).data_ptr()
    with pytest.raises(ValueError, match="device 'meta' holds no numbers"):
        there.to("meta")


def test_a_text_encoder_without_its_tokenizer_is_saved(tiny_files: dict[str, str], tmp_path: Path) -> None:
    sd = Pipeline.load(tiny_files["checkpoint"], tsc=tiny_files["tsc"], t5=tiny_files["t5"], device="cpu")
    assert sd.clip is None
    sd.to(dtype="bfloat16").save(tmp_path / "x.safetensors")
    before, after = load_file(tiny_files["checkpoint"]), load_file(tmp_path / "x.safetensors")
    text = {name: x for name, x in before.items() if name.startswith("cond_stage_model.")}
    assert text and all(torch.equal(after[name], x.bfloat16()) for name, x in text.items())


def test_which_part_of_clip_is_missing_is_said(tiny_files: dict[str, str], tmp_path: Path) -> None:
    whole, prefix = load_file(tiny_files["checkpoint"]), "cond_stage_model.transformer."
    save_file({name: x for name, x in whole.items() if not name.startswith(prefix)}, tmp_path / "bare.safetensors")
    save_file({name.removeprefix(prefix): x for name, x in whole.items() if name.startswith(prefix)},
              tmp_path / "text.safetensors")
    words = tiny_files["clip_tokenizer"]
    with pytest.raises(ValueError, match="needs CLIP's tokenizer"):
        Pipeline.load(tiny_files["checkpoint"], device="cpu").encode("a", "clip")
    bare = tmp_path / "bare.safetensors"
    with pytest.raises(ValueError, match=r"needs a text encoder, which the checkpoint lacks: .* text_encoder=<file"):
        Pipeline.load(bare, clip_tokenizer=words, device="cpu").encode("a", "clip")
    sd = Pipeline.load(bare, clip_tokenizer=words, device="cpu", text_encoder=tmp_path / "text.safetensors")
    usual = Pipeline.load(tiny_files["checkpoint"], clip_tokenizer=words, device="cpu")
    assert sd.clip is not None and usual.clip is not None
    assert torch.equal(sd.clip("a red").tokens, usual.clip("a red").tokens)


def test_device_and_dtype_are_named_as_text(tiny_files: dict[str, str]) -> None:
    sd = Pipeline.load(tiny_files["checkpoint"], device="cpu", dtype="bfloat16")
    assert (sd.dtype, sd.to(dtype="float32").dtype) == (torch.bfloat16, torch.float32)
    for make in (Pipeline.miniature, lambda device: Pipeline.load(tiny_files["checkpoint"], device=device)):
        with pytest.raises(ValueError, match="has no device 'cuda:99'"):
            make(device="cuda:99")
    with pytest.raises(ValueError, match="float16, bfloat16, float32, float64, got dtype 'half'"):
        Pipeline.miniature(dtype="half")


def test_a_pipeline_is_shown_in_a_line(pipeline: Pipeline) -> None:
    assert len(repr(pipeline)) < 160 and "float32 on cpu" in repr(pipeline) and "tsc" in repr(pipeline)
    assert "t5" not in repr(replace(pipeline, t5=None))
