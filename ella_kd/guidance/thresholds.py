"""Rules that bring the values of a guided answer back to the range that an answer should have.

High guidance scales push the denoised latents out: contrast and colours are exaggerated and blotches appear. Each rule
here wraps another and shrinks what it answers; statistics are of one sample, so a picture never depends on its batch.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ella_kd.guidance.rule import CFG, COND, Answers, Branch, Guidance
from ella_kd.scale import Scale

Space = Literal["v", "eps", "x0"]
Spread = Literal["range", "std"]


@dataclass(frozen=True)
class Rescale(Guidance):
    """The guided answer with its standard deviation moved towards that of the conditional one (arXiv 2305.08891).

    Lin et al. 2023, section 3.4: y' = phi * y * std(y_cond) / std(y) + (1 - phi) * y, the standard deviation over C, h
    and w of a sample. phi: 0 changes nothing, 1 matches it; the paper's is 0.7. space: what y is. "v" is the paper's,
    whose models predict v, and what ComfyUI does for every model. diffusers and A1111 rescale whatever the network
    returns, for SD1.5 "eps": then the noise of x that is taken from eps stays in the answer. "x0" rescales the denoised
    itself. On the miniature at scale 12 (score 84, 12 steps) v brings 93, x0 95 and eps 77. Raises ValueError for a phi
    outside [0, 1] or an unknown space.
    """

    base: Guidance
    phi: float = 0.7
    space: Space = "v"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.phi <= 1:
            raise ValueError(f"phi must be between 0 (no rescaling) and 1 (the conditional's spread), got {self.phi}")
        if self.space not in get_args(Space):
            raise ValueError(f"unknown space {self.space!r}: choose {', '.join(get_args(Space))}")

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (*self.base.branches, COND)

    def __call__(self, answers: Answers) -> Tensor:
        denoised = self.base(answers)
        # In each space y is a multiple, the same for both answers, of D + q x.
        q = -1 / (1 + answers.sigma**2) if self.space == "v" else -1.0 if self.space == "eps" else 0.0
        y = denoised + q * answers.x
        std = _std(y)
        ratio = torch.where(std > 0, _std(answers[COND] + q * answers.x) / std, 1)
        return denoised + self.phi * (ratio - 1) * y


@dataclass(frozen=True)
class DynamicThreshold(Guidance):
    """The guided answer clamped to a quantile of its absolute values, then shrunk to `limit` (arXiv 2205.11487).

    Imagen (Saharia et al. 2022), section 2.3: s is that quantile, over C, h and w of a sample; where s exceeds the
    limit, clamp to [-s, s] and multiply by limit / s. limit: the largest absolute value of clean data, 1 for pixels.
    Latents have no bound, so it is what their largest values come to: 4.5 of their standard deviations, which the scale
    factor of Stable Diffusion brings to 1 (4.1 on average in the miniature). diffusers' `thresholding` has the limit 1
    and is for pixels: with it the miniature's score at scale 12 falls from 84 to 25. Raises ValueError for a quantile
    outside (0, 1] or a limit not above 0.
    """

    base: Guidance
    quantile: float = 0.995
    limit: float = 4.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_quantile(self.quantile)
        if not 0 < self.limit < math.inf:
            raise ValueError(f"limit must be above 0, the largest absolute value of clean latents, got {self.limit}")

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.base.branches

    def __call__(self, answers: Answers) -> Tensor:
        denoised = self.base(answers)
        s = denoised.abs().flatten(1).quantile(self.quantile, 1)[:, None, None, None]
        return torch.where(s > self.limit, denoised.clamp(-s, s) * (self.limit / s), denoised)


@dataclass(frozen=True)
class MimicScale(Guidance):
    """The guided answer, squeezed channel by channel into the values that a lower scale would have.

    mcmonkey's "dynamic thresholding (CFG scale fix)", 2023. With m = CFG(mimic) and per channel g0 = g - mean(g),
    m0 = m - mean(m): spread "range" has a = max |m0|, b = the quantile of |g0|, top = max(a, b), and answers
    clamp(g0, -top, top) * a / top + mean(g); spread "std" answers g0 * std(m0) / std(g0) + mean(g). These are that
    extension's defaults (its modes MEAN, AD or STD, channels apart); a mimic as large as the scale changes nothing.
    Raises ValueError for a quantile outside (0, 1] or an unknown spread.
    """

    scales = ("mimic",)
    base: Guidance
    mimic: Scale = 7.0
    quantile: float = 1.0
    spread: Spread = "range"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_quantile(self.quantile)
        if self.spread not in get_args(Spread):
            raise ValueError(f"unknown spread {self.spread!r}: choose {', '.join(get_args(Spread))}")

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (*self.base.branches, *CFG(self.mimic).branches)

    def __call__(self, answers: Answers) -> Tensor:
        denoised = self.base(answers)
        g, m = (d - d.mean((2, 3), keepdim=True) for d in (denoised, CFG(self.mimic)(answers)))
        if self.spread == "std":
            std = g.std((2, 3), keepdim=True)
            squeezed = g * torch.where(std > 0, m.std((2, 3), keepdim=True) / std, 1)
        else:
            a = m.abs().amax((2, 3), keepdim=True)
            b = g.abs().flatten(2).quantile(self.quantile, 2)[..., None, None]
            top = torch.maximum(a, b)
            squeezed = g.clamp(-top, top) * torch.where(top > 0, a / top, 1)
        return denoised + (squeezed - g)


def _std(of: Tensor) -> Tensor:
    return of.std((1, 2, 3), keepdim=True)


def _check_quantile(q: float) -> None:
    if not 0 < q <= 1:
        raise ValueError(f"quantile must be above 0 and at most 1, got {q}")

