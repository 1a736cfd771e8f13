"""Models for the samplers' tests: the library's whole protocol around two exact mixtures, and simpler ones."""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.mixture import Mixture


def named(value: Any) -> str:
    """A test's name for a value: str without addresses, which differ between the processes of pytest -n."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


class Prediction(NamedTuple):
    denoised: Tensor
    uncond: Any  # Tensor, or None where nobody asked for it


COND, UNCOND = Mixture(), Mixture((-0.5, 1.0, 3.0), (0.5, 0.5, 0.5), (0.2, 0.5, 0.3))


@dataclass(frozen=True)
class Guided:
    """Forward, predict and bind around two mixtures; keeps what it was called with, and insists on its plan."""

    cond: Mixture = COND
    uncond: Mixture = UNCOND
    seen: list[float] = field(default_factory=list)
    plans: list[Any] = field(default_factory=list)

    def bind(self, x: Tensor, sigmas: Any, need_uncond: bool = False, cond_scale: float = 1.0) -> Any:
        self.plans.append(sigmas)
        plan = None if sigmas is None else x.new_tensor(sigmas).tolist()

        def bound(x: Tensor, levels: float, scale: float | None = None) -> Prediction:
            assert plan is None or levels in plan
            sigma = x.new_tensor(levels).expand(len(x))
            return self.predict(x, sigma, need_uncond, cond_scale if scale is None else scale)

        return bound

    def predict(self, x: Tensor, sigma: Tensor, need_uncond: bool = False, cond_scale: float = 1.0) -> Prediction:
        self.seen.append(float(sigma[0]))
        c, u = self.cond(x, sigma), self.uncond(x, sigma)
        return Prediction(u + cond_scale * (c - u), u if need_uncond else None)

    def __call__(self, x: Tensor, sigma: Tensor, cond_scale: float = 1.0) -> Tensor:
        return self.predict(x, sigma, False, cond_scale).denoised


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
