"""RAU-Net over whole runs: image to image, inpainting and ControlNet against diffusers' pipelines with the published
downsampler, which their UNet has while the timestep is high."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ella_kd import Pipeline
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.hidiffusion import AFTER_40, WiderStride
from ella_kd.models.inside import Inside
from ella_kd.models.pictures import to_pixels
from ella_kd.pictures.masks import share
from ella_kd.samplers import sample_ddim
from families import WAYS, byte_tokenizer, family
from test_addons_control import their_controlnet
from test_pictures_diffusers import MASK, PICTURE, SCALE, SEED, SIZE, decoded, of_channels, ours, quiet, theirs
from tiny import relative

__all__ = ["decoded", "quiet"]


class RAUNet:
    """The published change of diffusers' UNet above t = 599; counts the evaluations on both sides."""

    def __init__(self) -> None:
        self.on = self.off = 0

    def __call__(self, unet: Any) -> None:
        conv = unet.down_blocks[0].downsamplers[0].conv
        unet.num_upsamplers += 12

        def switch(_: Any, args: Any, told: Any) -> Any:
            now = float(args[1]) > 599
            self.on, self.off = self.on + now, self.off + (not now)
            conv.stride, conv.padding, conv.dilation = ((n, n) for n in ((4, 2, 2) if now else (2, 1, 1)))
            if now and told.get("mid_block_additional_residual") is not None:
                full = unet.config.layers_per_block + 1  # as many features are as large as the latents
                down = told["down_block_additional_residuals"]
                told["down_block_additional_residuals"] = [*down[:full], *map(halved, down[full:])]
                told["mid_block_additional_residual"] = halved(told["mid_block_additional_residual"])
            return args, told

        unet.register_forward_pre_hook(switch, with_kwargs=True)


def halved(residual: Tensor) -> Tensor:
    """As published: brought to the size of the feature it is added to."""
    return F.interpolate(residual, [-(-side // 2) for side in residual.shape[2:]], mode="bicubic")


def changed(pipeline: Pipeline, stage: int = 2) -> Pipeline:
    return replace(pipeline, unet=Inside(pipeline.unet, WiderStride(stage, sigma_lo=AFTER_40)))  # type: ignore[arg-type]


def test_image_to_image(pipeline: Pipeline, decoded: list[Tensor], quiet: None) -> None:
    for strength, sides in ((0.9, (2, 5)), (0.5, (0, 4))):
        both = RAUNet()
        for system in (pipeline, changed(pipeline)):
            ours(system, strength=strength, convention="diffusers")
        got = theirs(diffusers.StableDiffusionImg2ImgPipeline, pipeline, both, image=pipeline.vae.encode(PICTURE),
                     strength=strength, guidance_scale=SCALE, generator=torch.Generator().manual_seed(SEED))
        assert relative(decoded[-1], got) < 1e-4 and (both.on, both.off) == sides
        if sides[0]:
            assert relative(decoded[-2], got) > 1e-3
        else:  # below the threshold it is the plain network
            assert torch.equal(decoded[-2], decoded[-1])


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(channels: int, pipeline: Pipeline, decoded: list[Tensor], quiet: None) -> None:
    """What is kept stays the picture's, though the network sees it smaller inside."""
    both, system = RAUNet(), of_channels(pipeline, channels)
    with torch.no_grad():
        latents = pipeline.vae.encode(PICTURE)
        pixels = to_pixels(PICTURE, 3, pipeline.vae.quant_conv.weight)
        masked = pipeline.vae.encode(pixels * torch.from_numpy(share(MASK) < 0.5))
    for each in (system, changed(system)):
        ours(each, strength=0.9, convention="diffusers", mask=MASK)
    got = theirs(diffusers.StableDiffusionInpaintPipeline, system, both, image=latents, mask_image=MASK, height=SIZE,
                 width=SIZE, masked_image_latents=masked, strength=0.9, guidance_scale=SCALE,
                 generator=torch.Generator().manual_seed(SEED))
    assert relative(decoded[-1], got) < 1e-4 and (both.on, both.off) == (2, 5)
    assert relative(decoded[-2], got) > 1e-3
    if channels == 4:
        kept = torch.from_numpy(share(MASK) < 0.5)[::4, ::4].expand(1, 4, -1, -1)
        assert float((decoded[-1] - latents)[kept].abs().max()) < 1e-6


@torch.no_grad()
def test_a_controlnet(tmp_path: Path, quiet: None) -> None:
    """The control sees the latents as they are, and what it adds is resized, as published."""
    of, both = family("sd2"), RAUNet()
    sd = of.ours
    net = their_controlnet(sd.unet.config, 3)  # type: ignore[arg-type]
    pipe = of.theirs(diffusers.StableDiffusionControlNetPipeline, text_encoder=of.texts[0], controlnet=net,
                     tokenizer=byte_tokenizer("!"), safety_checker=None, feature_extractor=None,
                     requires_safety_checker=False)
    both(pipe.unet)
    pipe.scheduler = diffusers.DDIMScheduler(**WAYS, prediction_type=pipe.scheduler.config.prediction_type,
                                             clip_sample=False, set_alpha_to_one=True)
    latents = torch.randn(1, 4, 10, 16, generator=torch.Generator().manual_seed(7))
    picture = torch.rand(1, 3, 80, 128, generator=torch.Generator().manual_seed(8))
    want = pipe(prompt="a red fox", negative_prompt="bad", image=picture, latents=latents, guidance_scale=4.0,
                num_inference_steps=4, controlnet_conditioning_scale=0.8, output_type="latent").images
    assert (both.on, both.off) == (1, 3)
    net.save_pretrained(tmp_path / "net")
    ours = ControlNet.load(tmp_path / "net")
    cond, uncond = (sd.encode(said, "clip").with_control(ours, picture, 0.8) for said in ("a red fox", "bad"))
    args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    runs = []
    for system in (sd, changed(sd, pipe.unet.config.layers_per_block + 1)):
        denoiser = system.denoiser()
        sigmas = torch.cat([denoiser.t_to_sigma(pipe.scheduler.timesteps.double()), torch.zeros(1)]).float()
        runs.append(sample_ddim(denoiser, latents * (1 + sigmas[0] ** 2).sqrt(), sigmas, extra_args=args,
                                disable=True))
    assert relative(runs[1], want) < 1e-4 < 1e-3 < relative(runs[0], want)
