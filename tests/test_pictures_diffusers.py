"""Image to image, inpainting and edits against diffusers' pipelines, over whole trajectories of a tiny system."""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import diffusers
import pytest
import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

import ella_kd
from benchmarks.speed.ways import as_diffusers
from ella_kd import Pipeline, draw
from ella_kd.guidance import InstructPix2Pix
from ella_kd.models import AutoencoderKL, UNet, UNetConfig
from ella_kd.models.pictures import to_pixels
from ella_kd.models.tiled import Tiled
from ella_kd.pictures.masks import share
from ella_kd.samplers import randn
from test_models_vae import diffusers_twin
from test_pictures_pixels import speckled, white
from tiny import randomised, relative

STEPS, SCALE, SEED, SIZE, FACTOR = 8, 3.0, 5, 32, 4
PICTURE = speckled(SIZE, SIZE)
MASK = white((SIZE, SIZE), (16, 0, 32, 20))  # on whole latents, so that every way to shrink it agrees


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is given to the decoder."""
    seen: list[Tensor] = []
    whole = AutoencoderKL.decode

    def decode(self: AutoencoderKL, z: Tensor) -> Tensor:
        seen.append(z)
        return whole(self, z)

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    return seen


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.set_verbosity_error()
    yield
    logging.set_verbosity_warning()


def of_channels(pipeline: Pipeline, channels: int) -> Pipeline:
    config = UNetConfig(channels, 4, 32, (1, 2), 1, (1, 1), 64, 2)
    return pipeline if channels == 4 else replace(pipeline, unet=randomised(UNet(config), channels, 0.12))


def theirs(kind: Any, pipeline: Pipeline, **options: Any) -> Tensor:
    """The latents at the end of diffusers' pipeline, DDIM."""
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        clip_sample=False, set_alpha_to_one=True, steps_offset=1)
    unet: Any = as_diffusers(cast(UNet, pipeline.unet))
    unet.register_to_config(sample_size=64)
    parts = {"text_encoder": None, "tokenizer": None, "feature_extractor": None, "safety_checker": None,
             "depth_estimator": None, "requires_safety_checker": False}
    taken = inspect.signature(kind).parameters
    pipe = kind(vae=diffusers_twin(pipeline.vae), unet=unet, scheduler=scheduler,
                **{name: part for name, part in parts.items() if name in taken})
    pipe.set_progress_bar_config(disable=True)
    text, nothing = (pipeline.encode(said, "clip")(torch.zeros(1)).tokens for said in ("a red circle", ""))
    with torch.no_grad():
        out: Tensor = pipe(prompt_embeds=text, negative_prompt_embeds=nothing, num_inference_steps=STEPS,
                           output_type="latent", **options).images
    return out


def ours(pipeline: Pipeline, **options: Any) -> None:
    ella_kd.draw(pipeline, pipeline.encode("a red circle", "clip"), uncond=pipeline.encode("", "clip"), sampler="euler",
                 schedule="leading", steps=STEPS, seeds=SEED, start=PICTURE, progress=False,
                 **{"guidance": SCALE, **options})


def from_sigma_max(pipeline: Pipeline) -> Tensor:
    """Noise that is as large at our first sigma as theirs, of variance 1 in x / sqrt(1 + sigma^2)."""
    first = float(ella_kd.samplers.get_schedule("leading").sigmas(STEPS, pipeline.denoiser())[0])
    return randn((1, 4, 8, 8), [SEED]) * (1 + first**-2) ** 0.5


def test_image_to_image(pipeline: Pipeline, decoded: list[Tensor], quiet: None) -> None:
    for strength in (0.3, 0.7):
        ours(pipeline, strength=strength, convention="diffusers")
        got = theirs(diffusers.StableDiffusionImg2ImgPipeline, pipeline, image=pipeline.vae.encode(PICTURE),
                     strength=strength, guidance_scale=SCALE, generator=torch.Generator().manual_seed(SEED))
        assert relative(decoded[-1], got) < 1e-4


def test_inpainting(pipeline: Pipeline, decoded: list[Tensor], quiet: None) -> None:
    """With four channels both keep the rest as it is, by other means; with nine the network sees it."""
    pixels = to_pixels(PICTURE, 3, pipeline.vae.quant_conv.weight)
    with torch.no_grad():
        latents = pipeline.vae.encode(PICTURE)
        masked = pipeline.vae.encode(pixels * torch.from_numpy(share(MASK) < 0.5))
    for channels, strength in ((4, 0.7), (9, 0.7), (9, 1.0)):
        system = of_channels(pipeline, channels)
        whole: dict[str, Any] = {"latents": randn((1, 4, 8, 8), [SEED])} if strength == 1 else {}
        ours(system, strength=strength, convention="level" if strength == 1 else "diffusers", mask=MASK,
             **({"noise": from_sigma_max(system)} if strength == 1 else {}))
        got = theirs(diffusers.StableDiffusionInpaintPipeline, system, image=latents, mask_image=MASK, height=SIZE,
                     width=SIZE, masked_image_latents=masked, strength=strength, guidance_scale=SCALE,
                     generator=torch.Generator().manual_seed(SEED), **whole)
        assert relative(decoded[-1], got) < 1e-4, (channels, strength)


@pytest.mark.parametrize("circular", [False, True])
def test_a_panorama(circular: bool, pipeline: Pipeline, decoded: list[Tensor], quiet: None) -> None:
    """MultiDiffusion, windows of 8 latents, a stride of 4: theirs are averaged after DDIM's steps, ours before."""
    class Small(diffusers.StableDiffusionPanoramaPipeline):  # type: ignore[misc]
        def get_views(self, height: int, width: int, circular_padding: bool = False) -> Any:
            return super().get_views(8 * height // FACTOR, 8 * width // FACTOR, 8, 4, circular_padding)

    noise = randn((1, 4, 8, 20), [SEED])
    first = float(ella_kd.samplers.get_schedule("leading").sigmas(STEPS, pipeline.denoiser())[0])
    system = replace(pipeline, unet=Tiled(pipeline.unet, 8, 4, wrap=circular))
    ella_kd.draw(system, pipeline.encode("a red circle", "clip"),
                 uncond=pipeline.encode("", "clip"), sampler="euler", schedule="leading", steps=STEPS, progress=False,
                 guidance=SCALE, noise=noise * (1 + first**-2) ** 0.5)
    got = theirs(Small, pipeline, latents=noise, height=8 * FACTOR, width=20 * FACTOR, guidance_scale=SCALE,
                 circular_padding=circular)
    assert relative(decoded[-1], got) < 1e-5


def test_an_edit(pipeline: Pipeline, decoded: list[Tensor], quiet: None) -> None:
    """InstructPix2Pix: the rule's image is the start picture's latents, unscaled, and nothing for the uncond."""
    system = of_channels(pipeline, 8)
    ours(system, noise=from_sigma_max(system), guidance=InstructPix2Pix(7.5, 1.5))
    mode = pipeline.vae.encode(PICTURE) / pipeline.vae.config.scale
    got = theirs(diffusers.StableDiffusionInstructPix2PixPipeline, system, image=mode, guidance_scale=7.5,
                 image_guidance_scale=1.5, latents=randn((1, 4, 8, 8), [SEED]))
    assert relative(decoded[-1], got) < 1e-4


def test_depth(pipeline: Pipeline, decoded: list[Tensor], quiet: None) -> None:
    """Image to image by a network that sees how far things are."""
    system, near = of_channels(pipeline, 5), speckled(SIZE, SIZE, seed=3).convert("L")
    sure = copy.deepcopy(system.vae)  # they draw latents of the encoder's Gaussian: here its mean
    with torch.no_grad():
        sure.quant_conv.weight[4:] = 0
        sure.quant_conv.bias[4:] = -30  # type: ignore[index]
    system, generator = replace(system, vae=sure), torch.Generator().manual_seed(SEED)
    _, second = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    ours(system, strength=0.7, convention="diffusers", depth=near, noise=second)
    got = theirs(diffusers.StableDiffusionDepth2ImgPipeline, system, image=PICTURE, strength=0.7,
                 depth_map=torch.from_numpy(share(near)).float()[None], guidance_scale=SCALE,
                 generator=torch.Generator().manual_seed(SEED))
    assert relative(decoded[-1], got) < 1e-4
    with pytest.raises(ValueError, match="give start and depth"):
        ours(system, strength=0.7)


def test_other_networks(pipeline: Pipeline) -> None:
    """One that edits needs a picture; one of channels that nobody knows is told so; its own channels are left alone."""
    text = pipeline.encode("a red circle", "clip")
    args: dict[str, Any] = {"uncond": pipeline.encode("", "clip"), "steps": 1, "progress": False}
    with pytest.raises(ValueError, match="give it as start"):
        draw(of_channels(pipeline, 8), text, **args)
    with pytest.raises(ValueError, match="3 channels beside x"):
        draw(of_channels(pipeline, 7), text, **args)
    [image] = draw(of_channels(pipeline, 9), text, width=SIZE, height=SIZE, **args)  # inpainting all of it
    assert isinstance(image, Image.Image)
