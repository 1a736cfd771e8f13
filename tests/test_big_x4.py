"""The x4 upscaler against diffusers' pipeline, over a whole trajectory of a tiny system read from its files."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ella_kd import Pipeline, draw, generate
from ella_kd.conditioning import as_conditioning
from ella_kd.models import AutoencoderKL
from ella_kd.samplers import get_schedule, randn
from systems import system
from test_pictures_pixels import speckled
from tiny import noise, relative

PICTURE, STEPS, LEVEL = speckled(16, 8), 6, 3
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}


def test_equal_to_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, decoded = system("x4"), list[Tensor]()
    pipeline = Pipeline.load(parts.save_folder(tmp_path / "x4", **BETAS), device="cpu")
    assert pipeline.purpose == "x4 upscaler"
    whole = AutoencoderKL.decode

    def decode(self: AutoencoderKL, z: Tensor) -> Tensor:
        decoded.append(z)
        return whole(self, z)

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    cond, uncond, first = noise(1, 5, 48, seed=1), noise(1, 5, 48, seed=2), randn((1, 4, 8, 16), [5])
    scheduler = diffusers.DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    pipe: Any = diffusers.StableDiffusionUpscalePipeline(parts.vae, None, None, parts.unet,
                                                         diffusers.DDPMScheduler(**BETAS), scheduler)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        theirs = pipe(prompt_embeds=cond, negative_prompt_embeds=uncond, image=PICTURE, noise_level=LEVEL,
                      latents=first, num_inference_steps=STEPS, guidance_scale=3.0,
                      generator=torch.Generator().manual_seed(5), output_type="latent").images
    pixels = torch.randn((1, 3, 8, 16), generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr("ella_kd.pictures.x4.randn", lambda shape, seeds: pixels)
    sigma = float(get_schedule("leading").sigmas(STEPS, pipeline.denoiser())[0])
    [image] = draw(pipeline, cond, uncond=uncond, start=PICTURE, noise_level=LEVEL, sampler="euler", schedule="leading",
                   steps=STEPS, guidance=3.0, noise=first * (1 + sigma**-2) ** 0.5, seeds=1, progress=False)
    assert image.size == (64, 32)
    assert relative(decoded[-1], theirs) < 1e-4
    draw(pipeline, cond, uncond=uncond, start=PICTURE, noise_level=LEVEL + 1, sampler="euler", schedule="leading",
         steps=STEPS, guidance=3.0, noise=first * (1 + sigma**-2) ** 0.5, seeds=1, progress=False)
    assert relative(decoded[-1], theirs) > 1e-3  # the label and the noise are seen


def test_rows_and_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.load(system("x4").save_folder(tmp_path / "x4", **BETAS), device="cpu")
    options: dict[str, Any] = {"start": PICTURE, "noise_level": 2, "steps": 2, "progress": False}
    cond, uncond = noise(1, 5, 48, seed=1), noise(1, 5, 48, seed=2)
    pair, alone = (draw(pipeline, cond, uncond=uncond, seeds=seeds, **options) for seeds in ([1, 2], [2]))
    assert np.abs(np.asarray(pair[1]).astype(int) - np.asarray(alone[0])).max() <= 1
    with pytest.raises(ValueError, match="without strength"):
        draw(pipeline, cond, uncond=uncond, seeds=1, strength=0.5, **options)
    with pytest.raises(ValueError, match="from 0 to 8"):
        draw(pipeline, cond, uncond=uncond, seeds=1, **{**options, "noise_level": 20})
    monkeypatch.setattr(Pipeline, "encode", lambda self, texts, *rest, **how: as_conditioning(
        noise(1, 5, 48, seed=len(texts[0]))))
    [picture] = generate(pipeline, "a", negative="bc", mode="clip", seeds=2, **options)
    assert picture.image.size == (64, 32) and picture.settings.noise_level == 2
