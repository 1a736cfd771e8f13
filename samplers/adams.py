"""Multistep on slopes in sigma: LMS, DEIS (2204.13902), iPNDM (2202.09778) and gradient estimation (2306.04848)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from ella_kd.samplers.multistep import Array, SlopeMultistep, integrate, lagrange, used_order
from ella_kd.samplers.registry import Args, Callback, Model, Seeds, cfg_pp_form, sampler, walk
from ella_kd.samplers.solver import refuse_order, refuse_other

__all__ = [
    "DEIS", "IPNDM", "LMS", "GradientEstimation", "sample_deis", "sample_deis_cfg_pp", "sample_gradient_estimation",
    "sample_gradient_estimation_cfg_pp", "sample_ipndm", "sample_ipndm_cfg_pp", "sample_ipndm_v",
    "sample_ipndm_v_cfg_pp", "sample_lms", "sample_lms_cfg_pp",
]

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
    highest: ClassVar[float] = 4

    def __post_init__(self) -> None:
        refuse_order("max_order", self.max_order, self.highest)
        refuse_other("variable", self.variable, *_VARIABLES)

    def used(self, i: int, sigmas: Sequence[float]) -> int:
        """How many slopes step i takes."""
        return used_order(i, sigmas, self.max_order)

    def slope_weights(self, i: int, sigmas: Sequence[float]) -> Sequence[float]:
        s, t = sigmas[i], sigmas[i + 1]
        order = self.used(i, sigmas)
        if order == 1:
            return (t - s,)
        variable, density = _VARIABLES[self.variable]
        nodes = [variable(sigmas[i - k]) for k in range(order)]
        later = integrate(lambda u: density(u) * lagrange(nodes, u)[1:], variable(s), variable(t))
        return (t - s - float(later.sum()), *later.tolist())


@dataclass(frozen=True)
class LMS(DEIS):
    """Adams-Bashforth on the schedule's own grid (k-diffusion's LMS): DEIS in sigma through any number of slopes, which
    takes the step to sigma 0 with all of them too.

    The first steps have fewer slopes, the very first is Euler's, whose error stays: with 4 slopes the order measured on
    an exact mixture falls towards 2 as steps grow; from an exact start it is 4. One evaluation per step."""

    max_order: int = 4
    variable: Variable = "sigma"
    order = 2
    highest = math.inf

    def used(self, i: int, sigmas: Sequence[float]) -> int:
        return min(self.max_order, i + 1)


@sampler(LMS(), "Adams-Bashforth")
def sample_lms(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, order: int = 4, *, seeds: Seeds = None,
) -> Tensor:
    """Linear multistep through the last `order` slopes. Order 4 from an exact start, falling towards 2 from Euler's,
    which is a run's. One evaluation per step."""
    return walk(LMS(order), model, x, sigmas, extra_args, callback, disable, seeds)


sample_lms_cfg_pp = cfg_pp_form(sample_lms)


@sampler(DEIS(), "DEIS")
def sample_deis(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, max_order: int = 3, variable: Variable = "log_sigma", *, seeds: Seeds = None,
) -> Tensor:
    """DEIS (2204.13902), polynomial in log sigma, sigma or VP time. Order 3 (max_order), one evaluation per step."""
    return walk(DEIS(max_order, variable), model, x, sigmas, extra_args, callback, disable, seeds)


sample_deis_cfg_pp = cfg_pp_form(sample_deis)


@dataclass(frozen=True)
class IPNDM(SlopeMultistep):
    """iPNDM (2202.09778, section 3.2 of DEIS): Adams-Bashforth with the weights of an even grid, whatever the grid.

    Order 2 as measured on a Karras grid, where the weights do not fit; one evaluation per step; first order at the
    start, rising by one a step to max_order (1 to 4), and to sigma 0."""

    max_order: int = 4
    order = 2

    def __post_init__(self) -> None:
        refuse_order("max_order", self.max_order, 4)

    def slope_weights(self, i: int, sigmas: Sequence[float]) -> Sequence[float]:
        step = sigmas[i + 1] - sigmas[i]
        return [step * weight for weight in ADAMS_BASHFORTH[used_order(i, sigmas, self.max_order) - 1]]


@sampler(IPNDM(), "iPNDM")
def sample_ipndm(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, max_order: int = 4, *, seeds: Seeds = None,
) -> Tensor:
    """iPNDM (2202.09778), the weights of an even grid. Order 2 on uneven grids, one evaluation per step."""
    return walk(IPNDM(max_order), model, x, sigmas, extra_args, callback, disable, seeds)


sample_ipndm_cfg_pp = cfg_pp_form(sample_ipndm)


@sampler(DEIS(4, "sigma"), "Adams-Bashforth")
def sample_ipndm_v(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, max_order: int = 4, *, seeds: Seeds = None,
) -> Tensor:
    """iPNDM with the weights of the real grid: Adams-Bashforth in sigma, which is LMS. One evaluation per step.

    ComfyUI's weights of three and four terms are exact on even grids alone; these are exact on every grid."""
    return walk(DEIS(max_order, "sigma"), model, x, sigmas, extra_args, callback, disable, seeds)


sample_ipndm_v_cfg_pp = cfg_pp_form(sample_ipndm_v)


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

    def slope_weights(self, i: int, sigmas: Sequence[float]) -> Sequence[float]:
        step = sigmas[i + 1] - sigmas[i]
        return (step,) if used_order(i, sigmas, 2) == 1 else (step * self.gamma, step * (1 - self.gamma))


@sampler(GradientEstimation(), "gradient estimation")
def sample_gradient_estimation(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, ge_gamma: float = 2.0, *, seeds: Seeds = None,
) -> Tensor:
    """Gradient estimation (2306.04848). Order 1 (2 at ge_gamma 1.5 on even grids), one evaluation per step."""
    return walk(GradientEstimation(ge_gamma), model, x, sigmas, extra_args, callback, disable, seeds)


sample_gradient_estimation_cfg_pp = cfg_pp_form(sample_gradient_estimation)
