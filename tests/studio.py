"""The miniature for tests: loaded once, held-out scenes with their prompts, and how pictures of them come out."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import score
from benchmarks.miniature.questions import ask, summary
from benchmarks.miniature.scenes import Scene, parse, render, to_pictures
from ella_kd import ELLADenoiser, Pipeline
from ella_kd.denoiser import LDMDenoiser
from ella_kd.guidance import CFG, Guidance, GuidedDenoiser
from ella_kd.models.text import TextFeatures
from ella_kd.samplers import get_sampler, get_sigmas_karras, randn


@cache
def miniature() -> Pipeline:
    return Pipeline.miniature(device="cpu")


@cache
def denoiser() -> ELLADenoiser:
    pipeline = miniature()
    assert pipeline.tsc is not None
    return ELLADenoiser(pipeline.unet, pipeline.tsc, pipeline.noise_schedule)


def t5(prompts: str | Sequence[str]) -> TextFeatures:
    encoder = miniature().t5
    assert encoder is not None
    return encoder(prompts)


@cache
def prompts(count: int, things: int = 2) -> tuple[list[Scene], TextFeatures, TextFeatures]:
    """Held-out scenes, what T5 makes of their dense captions, and of nothing."""
    wanted = score.held_out(count, things)
    return wanted, t5(score.write_captions(wanted, "dense")), t5("")


@torch.no_grad()
def latents(cond: Any, uncond: Any, count: int, rule: Guidance | None = None, sampler: str = "dpmpp_2m",
            steps: int = 10, inner: LDMDenoiser | None = None) -> Tensor:
    """Drawn from seeds 0, 1, 2, ..., with CFG at scale 3 unless another rule is given."""
    model = GuidedDenoiser(inner or denoiser(), rule or CFG(3.0))
    sigmas = get_sigmas_karras(steps, model.sigma_min, model.sigma_max)
    x = randn((count, 4, 6, 6), list(range(count))) * sigmas[0]
    return get_sampler(sampler).function(model, x, sigmas, extra_args={"cond": cond, "uncond": uncond}, disable=True)


@torch.no_grad()
def read(drawn: Tensor) -> list[Scene]:
    """What the parser finds in the decoded latents."""
    return [parse(picture) for picture in to_pictures(miniature().vae.decode(drawn))]


@dataclass(frozen=True, eq=False)
class Look:
    """How pictures of the same prompts and seeds came out.

    score: of the questions about the prompts' scenes. errors: each picture's distance to the true one, in steps of 0 to
    255. spread: standard deviation of the latents. over: how far decoded values leave the range of pixels, same units.
    """

    score: float
    errors: np.ndarray
    spread: float
    over: float

    @property
    def error(self) -> float:
        return float(self.errors.mean())

    def better(self, than: "Look") -> float:
        """By how much the mean error is smaller, in standard errors of the paired difference."""
        gain = than.errors - self.errors
        return float(gain.mean() / gain.std() * len(gain) ** 0.5)


@cache
@torch.no_grad()
def look(rule: Guidance, sampler: str, steps: int, count: int, things: int = 2,
         inner: LDMDenoiser | None = None) -> Look:
    wanted, cond, uncond = prompts(count, things)
    z = latents(cond, uncond, count, rule, sampler, steps, inner)
    images = miniature().vae.decode(z)
    drawn = to_pictures(images)
    errors = [np.square(a.astype(float) - render(scene)).mean() ** 0.5 for a, scene in zip(drawn, wanted, strict=True)]
    answers = [ask(scene, parse(a)) for a, scene in zip(drawn, wanted, strict=True)]
    return Look(summary(answers)["score"], np.array(errors), float(z.std((1, 2, 3)).mean()),
                float((images.abs() - 1).clamp(min=0).mean()) * 127.5)


@cache
def weakened(shrunk: float, noise: float = 0.0) -> LDMDenoiser:
    """The miniature with every weight so many times its own, and noise added to it in units of its spread."""
    unet, generator = copy.deepcopy(miniature().unet), torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        random = torch.randn(parameter.shape, generator=generator) * (parameter.std() if parameter.numel() > 1 else 0)
        parameter.data = parameter.data * shrunk + noise * random
    return ELLADenoiser(unet, denoiser().tsc, miniature().noise_schedule)
