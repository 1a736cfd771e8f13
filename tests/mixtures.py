"""Exact denoisers for the samplers' tests: a Gaussian mixture, and the library's whole model protocol around two."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Every value of x is one sample of a one-dimensional Gaussian mixture, whose denoised is exact (posterior mean).

    The probability flow keeps quantiles, so its solution is exact too: `quantile(u, sigma)` for every sigma."""

    means: tuple[float, ...] = (-1.5, 0.4, 2.0)
    stds: tuple[float, ...] = (0.4, 0.3, 0.6)
    weights: tuple[float, ...] = (0.3, 0.5, 0.2)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (len(x),)
        s2 = sigma.view(-1, 1, 1, 1, 1) ** 2
        means, stds, weights = (x.new_tensor(values) for values in (self.means, self.stds, self.weights))
        variance = stds**2 + s2
        log = weights.log() - 0.5 * variance.log() - (x[..., None] - means) ** 2 / (2 * variance)
        share = (log - log.amax(-1, keepdim=True)).exp()
        denoised = (stds**2 * x[..., None] + s2 * means) / variance
        return (share * denoised).sum(-1) / share.sum(-1)

    def quantile(self, u: float, sigma: float) -> float:
        spread = np.sqrt(np.square(self.stds) + sigma**2)

        def excess(x: float) -> float:
            return float(np.dot(self.weights, norm.cdf((x - np.array(self.means)) / spread))) - u

        return float(brentq(excess, -12 * spread.max(), 12 * spread.max(), xtol=1e-13, rtol=1e-14))


class Prediction(NamedTuple):
    denoised: Tensor
    uncond: Any  # Tensor, or None where nobody asked for it


@dataclass(frozen=True)
class Guided:
    """Forward, predict and planned around two mixtures; keeps what it was called with, and insists on its plan."""

    cond: Mixture = Mixture()
    uncond: Mixture = Mixture((-0.5, 1.0, 3.0), (0.5, 0.5, 0.5), (0.2, 0.5, 0.3))
    seen: list[float] = field(default_factory=list)
    plans: list[Tensor] = field(default_factory=list)

    def planned(self, sigmas: Tensor, extra_args: dict[str, Any]) -> dict[str, Any]:
        self.plans.append(sigmas)
        return {**extra_args, "plan": sigmas}

    def predict(
        self, x: Tensor, sigma: Tensor, need_uncond: bool = False, cond_scale: float = 1.0, plan: Tensor | None = None
    ) -> Prediction:
        assert plan is None or bool((plan == sigma[0]).any())
        self.seen.append(float(sigma[0]))
        c, u = self.cond(x, sigma), self.uncond(x, sigma)
        return Prediction(u + cond_scale * (c - u), u if need_uncond else None)

    def __call__(self, x: Tensor, sigma: Tensor, cond_scale: float = 1.0, plan: Tensor | None = None) -> Tensor:
        return self.predict(x, sigma, False, cond_scale, plan).denoised


class Pointwise:
    """The same protocol from additions and multiplications alone: a row is the same bitwise alone and in a batch."""

    def __call__(self, x: Tensor, sigma: Tensor, cond_scale: float = 1.0) -> Tensor:
        return self.predict(x, sigma, False, cond_scale).denoised

    def predict(self, x: Tensor, sigma: Tensor, need_uncond: bool, cond_scale: float = 1.0) -> Prediction:
        scaled = x / (1 + sigma.view(-1, 1, 1, 1))
        c, u = scaled * scaled * 0.3 - 0.2, scaled * 0.8
        return Prediction(u + cond_scale * (c - u), u)


class Constant:
    """Denoised and U are always `target`."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.target

    def predict(self, x: Tensor, sigma: Tensor, need_uncond: bool) -> Prediction:
        return Prediction(self.target, self.target)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
