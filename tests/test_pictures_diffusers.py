"""Image to image, inpainting and edits against diffusers' pipelines, over whole trajectories of a tiny system."""

import copy
import inspect
from collections.abc import Callable, Iterator
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
from ella_kd.drawing import SEEN
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


def ddim() -> Any:
    return diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                   set_alpha_to_one=True, steps_offset=1)


def theirs(kind: Any, pipeline: Pipeline, changed: Callable[[Any], None] = lambda unet: None, **options: Any) -> Tensor:
    """The latents at the end of diffusers' pipeline, DDIM, whose UNet is changed before."""
    scheduler = ddim()
    unet: Any = as_diffusers(cast(UNet, pipeline.unet))
    changed(unet)
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
    panorama: Any = diffusers.StableDiffusionPanoramaPipeline

    class Small(panorama):
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
    drawn = decoded[-1][..., SEEN:-SEEN] if circular else decoded[-1]  # what lies around is decoded beside it
    assert relative(drawn, got) < 1e-5


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


def differential(pipeline: Pipeline, keep: Tensor, noise: Tensor) -> Tensor:
    """The loop of diffusers' community pipelines of differential img2img, which no wheel holds, at strength 1: before a
    step, what is kept for more than its share of the steps is put back to the picture at its noise level.

    keep [h, w]: 1 to keep. noise: one for all steps.
    """
    scheduler, unet = ddim(), as_diffusers(cast(UNet, pipeline.unet))
    text = torch.cat([pipeline.encode(said, "clip")(torch.zeros(1)).tokens for said in ("", "a red circle")])
    picture = pipeline.vae.encode(PICTURE)
    scheduler.set_timesteps(STEPS)
    x = torch.zeros_like(picture)
    for i, t in enumerate(scheduler.timesteps):
        put_back = (keep > i / STEPS) if i else torch.ones_like(keep, dtype=torch.bool)
        x = torch.where(put_back, scheduler.add_noise(picture, noise, t[None]), x)
        nothing, wanted = unet(x.repeat(2, 1, 1, 1), t, text).sample.chunk(2)
        x = scheduler.step(nothing + SCALE * (wanted - nothing), t, x).prev_sample
    return x


@torch.no_grad()
def test_differential(pipeline: Pipeline, decoded: list[Tensor], quiet: None) -> None:
    """They put x back and let the step go on, we give the picture as the answer: the same, where a place opens at the
    last step at which they put it back, ceil(keep * steps) - 1. So they open all of it at the last step at the latest,
    and by the share of steps; our map is one of timesteps, and its black is never opened."""
    keep = torch.arange(64).reshape(8, 8) / 63
    opens = ((keep * STEPS).ceil().long() - 1).clamp(min=0)
    scheduler = ddim()
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps.double()
    wanted = torch.where(opens == 0, 1.0, (t[opens] + 30) / t[0])  # between the step's timestep and that before
    strengths = Image.fromarray((wanted * 255).round().byte().numpy()).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    noise = randn((1, 4, 8, 8), [SEED])
    ours(pipeline, strength_map=strengths, strength=1.0, convention="diffusers", noise=noise)
    got = differential(pipeline, keep, noise)
    assert relative(decoded[-1], got) < 1e-4
    black = Image.new("L", (SIZE, SIZE))
    black.paste(255, (0, 0, 16, SIZE))
    ours(pipeline, strength_map=black, strength=1.0, convention="diffusers", noise=noise)
    picture, right = pipeline.vae.encode(PICTURE), (keep.new_zeros(8, 8).index_fill(1, torch.arange(4, 8), 1.0))
    assert torch.equal(decoded[-1][..., 4:].to(picture), picture[..., 4:])
    assert relative(differential(pipeline, right, noise)[..., 4:], picture[..., 4:]) > 0.01


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
