"""Multistep on slopes in sigma: DEIS (2204.13902), iPNDM (2202.09778) and gradient estimation (2306.04848)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ella_kd.samplers.history import Array, SlopeMultistep, integrate, lagrange, refuse_order, used_order

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
_BETA_D, _BETA_MIN = 19.9, 0.1  # the linear VP schedule, sigma(t)^2 + 1 = exp(beta_d t^2 / 2 + beta_min t)


def _vp_time(sigma: float) -> float:
    return (math.sqrt(_BETA_MIN**2 + 2 * _BETA_D * math.log1p(sigma**2)) - _BETA_MIN) / _BETA_D


def _vp_speed(t: Array) -> Array:
    """d sigma / d t."""
    growth = _BETA_D * t**2 / 2 + _BETA_MIN * t
    speed: Array = (_BETA_D * t + _BETA_MIN) * np.exp(growth) / (2 * np.sqrt(np.expm1(growth)))
    return speed


Variable = Literal["log_sigma", "sigma", "vp_time"]
_VARIABLES: dict[str, tuple[Callable[[float], float], Callable[[Array], Array]]] = {
    "log_sigma": (math.log, np.exp),
    "sigma": (float, np.ones_like),
    "vp_time": (_vp_time, _vp_speed),
}


@dataclass(frozen=True)
class DEIS(SlopeMultistep):
    """DEIS (2204.13902, eq. 15): the slope as a polynomial through the last `max_order` evaluations, integrated
    exactly over sigma. Polynomial in log sigma (diffusers' DEIS), in sigma (the paper's rhoAB, which is LMS) or in the
    time of the linear VP schedule (the paper's tAB, ComfyUI's).

    Order 3 by default (max_order 1 to 4), from an Euler start; one evaluation per step; first order to sigma 0."""

    max_order: int = 3
    variable: Variable = "log_sigma"
    order = 3

    def __post_init__(self) -> None:
        refuse_order("max_order", self.max_order, 4)
        if self.variable not in _VARIABLES:
            raise ValueError(f"variable must be one of {', '.join(_VARIABLES)}, got {self.variable!r}")

    @property
    def memory(self) -> int:
        return self.max_order - 1

    def slope_weights(self, i: int, sigmas: Sequence[float]) -> Sequence[float]:
        s, t = sigmas[i], sigmas[i + 1]
        order = used_order(i, sigmas, self.max_order)
        if order == 1:
            return (t - s,)
        variable, density = _VARIABLES[self.variable]
        nodes = [variable(sigmas[i - k]) for k in range(order)]
        later = integrate(lambda u: density(u) * lagrange(nodes, u)[1:], variable(s), variable(t))
        return (t - s - float(later.sum()), *later.tolist())


@dataclass(frozen=True)
class IPNDM(SlopeMultistep):
    """iPNDM (2202.09778, section 3.2 of DEIS): Adams-Bashforth with the weights of an even grid, whatever the grid.

    Order 2 as measured on a Karras grid, where the weights do not fit; one evaluation per step; first order at the
    start, rising by one a step to max_order (1 to 4), and to sigma 0."""

    max_order: int = 4
    order = 2

    def __post_init__(self) -> None:
        refuse_order("max_order", self.max_order, 4)

    @property
    def memory(self) -> int:
        return self.max_order - 1

    def slope_weights(self, i: int, sigmas: Sequence[float]) -> Sequence[float]:
        step = sigmas[i + 1] - sigmas[i]
        return [step * weight for weight in ADAMS_BASHFORTH[used_order(i, sigmas, self.max_order) - 1]]


@dataclass(frozen=True)
class GradientEstimation(SlopeMultistep):
    """Gradient estimation (2306.04848): x' = x + (t - s) (gamma d + (1 - gamma) d_old).

    Order 1 (at gamma 2; gamma 1.5 is Adams-Bashforth of order 2 on an even grid); one evaluation per step; the first
    step and the one to sigma 0 are Euler's."""

    gamma: float = 2.0
    order = 1

    def __post_init__(self) -> None:
        if not math.isfinite(self.gamma):
            raise ValueError(f"gamma must be a finite number, got {self.gamma}")

    @property
    def memory(self) -> int:
        return 1

    def slope_weights(self, i: int, sigmas: Sequence[float]) -> Sequence[float]:
        step = sigmas[i + 1] - sigmas[i]
        return (step,) if used_order(i, sigmas, 2) == 1 else (step * self.gamma, step * (1 - self.gamma))
