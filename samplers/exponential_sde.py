"""SEEDS (2305.14267) in data prediction: exponential Runge-Kutta steps with the exact noise of each stage."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ella_kd.samplers.registry import Args, Callback, Model, NoiseSampler, Seeds, cfg_pp_form, sampler, walk
from ella_kd.samplers.solver import Ancestral, Step, refuse_ascending, refuse_other
from ella_kd.samplers.stages import LAND, Stage, Staged, Stages

__all__ = [
    "SEEDS2", "SEEDS3", "sample_exp_heun_2_x0", "sample_exp_heun_2_x0_cfg_pp", "sample_exp_heun_2_x0_sde",
    "sample_exp_heun_2_x0_sde_cfg_pp", "sample_seeds_2", "sample_seeds_2_cfg_pp", "sample_seeds_3",
    "sample_seeds_3_cfg_pp",
]


@dataclass(frozen=True)
class _SEEDS(Staged, Ancestral[Stages]):
    """Stages at fractions r_1 < r_2 < .. <= 1 of a step of h in log sigma, from (x, D) at sigma s:

    x_r = e^{-r h (1 + eta)} x + sum_j a_j D_j + sigma_r sqrt(1 - e^{-2 eta r h}) W_r,

    with one path W through all stages and the step's end: the noise of a later stage is that of the one before, decayed
    by e^{-eta (r - r_old) h}, and a new part. A step to sigma 0 is one evaluation's D."""

    noise = "brownian"

    @abstractmethod
    def tableau(self, H: float) -> list[tuple[float, list[float]]]:
        """Where each further stage and the end lie in the step, and the weights of the D before it; H = (1 + eta) h."""

    def between(self, s: float, t: float, n: int) -> Step[Stages]:
        if self.eta:
            refuse_ascending(s, t)
        if t == 0:
            return Step((s,), LAND)
        h, before, levels, stages, noises = math.log(s / t), 0.0, [s], list[Stage](), list[tuple[float, float]]()
        for r, row in self.tableau(h * (1 + self.eta)):
            levels.append(s ** (1 - r) * t**r if r < 1 else t)
            decay = -self.eta * (r - before) * h
            fresh = levels[-1] * math.sqrt(-math.expm1(2 * decay)) * self.s_noise
            kept = levels[-1] / levels[-2] * math.exp(decay) if self.s_noise else 0.0
            stages.append(Stage(math.exp(-self.eta * r * h) * levels[-1] / s, row, fresh, kept))
            noises += [(levels[-2], levels[-1])] if fresh else []
            before = r
        return Step(tuple(levels[:-1]), tuple(stages), tuple(noises))


@dataclass(frozen=True)
class SEEDS2(_SEEDS):
    """SEEDS-2 (2305.14267, algorithm 2), its second stage at r of the step, in log sigma. At eta 0 and r 1 it is the
    exponential Heun method, at r 1/2 DPM-Solver++(2S).

    Order 2 at eta 0, two evaluations per step. solver_type: the weight of the second stage, b_2 = phi_1 / (2 r)
    ("phi_1") or phi_2 / r ("phi_2"), which has order 2 too and a stiffer error."""

    r: float = 0.5
    solver_type: Literal["phi_1", "phi_2"] = "phi_1"
    order = 2
    evals = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.r <= 1:
            raise ValueError(f"r must be above 0 and not above 1, got {self.r}")
        refuse_other("solver_type", self.solver_type, "phi_1", "phi_2")

    def tableau(self, H: float) -> list[tuple[float, list[float]]]:
        later = _phi_1(H) / (2 * self.r) if self.solver_type == "phi_1" else _phi_2(H) / self.r
        return [(self.r, [_phi_1(self.r * H)]), (1.0, [_phi_1(H) - later, later])]


@sampler(SEEDS2(eta=0.0, r=1.0, solver_type="phi_2"), "SEEDS")
def sample_exp_heun_2_x0(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, solver_type: Literal["phi_1", "phi_2"] = "phi_2", *, seeds: Seeds = None,
) -> Tensor:
    """Exponential Heun in data prediction: SEEDS-2 at eta 0 and r 1. Order 2, two evaluations per step."""
    return walk(SEEDS2(0.0, 0.0, 1.0, solver_type), model, x, sigmas, extra_args, callback, disable, seeds)


sample_exp_heun_2_x0_cfg_pp = cfg_pp_form(sample_exp_heun_2_x0)


@sampler(SEEDS2(r=1.0, solver_type="phi_2"), "SEEDS")
def sample_exp_heun_2_x0_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    solver_type: Literal["phi_1", "phi_2"] = "phi_2", *, seeds: Seeds = None,
) -> Tensor:
    """Exponential Heun with noise: SEEDS-2 at r 1. Order 2 at eta 0, two evaluations per step."""
    return walk(
        SEEDS2(eta, s_noise, 1.0, solver_type),
        model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler,
    )


sample_exp_heun_2_x0_sde_cfg_pp = cfg_pp_form(sample_exp_heun_2_x0_sde)


@sampler(SEEDS2(), "SEEDS")
def sample_seeds_2(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    r: float = 0.5, solver_type: Literal["phi_1", "phi_2"] = "phi_1", *, seeds: Seeds = None,
) -> Tensor:
    """SEEDS-2 (2305.14267), Brownian noise. Order 2 at eta 0, two evaluations per step."""
    return walk(
        SEEDS2(eta, s_noise, r, solver_type),
        model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler,
    )


sample_seeds_2_cfg_pp = cfg_pp_form(sample_seeds_2)


@dataclass(frozen=True)
class SEEDS3(_SEEDS):
    """SEEDS-3 (2305.14267, algorithm 3), further stages at r_1 and r_2 of the step, in log sigma.

    Order 3 at eta 0 and r_2 = 2/3; three evaluations per step."""

    r_1: float = 1 / 3
    r_2: float = 2 / 3
    order = 3
    evals = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.r_1 < self.r_2 < 1:
            raise ValueError(f"0 < r_1 < r_2 < 1 must hold, got r_1 = {self.r_1}, r_2 = {self.r_2}")

    def tableau(self, H: float) -> list[tuple[float, list[float]]]:
        second, third = self.r_2 / self.r_1 * _phi_2(self.r_2 * H), _phi_2(H) / self.r_2
        return [
            (self.r_1, [_phi_1(self.r_1 * H)]),
            (self.r_2, [_phi_1(self.r_2 * H) - second, second]),
            (1.0, [_phi_1(H) - third, 0.0, third]),
        ]


def _phi_1(H: float) -> float:
    """H phi_1(-H) = 1 - e^-H."""
    return -math.expm1(-H)


def _phi_2(H: float) -> float:
    """H phi_2(-H) = 1 - (1 - e^-H) / H; by its series where the two nearly cancel."""
    if abs(H) < 1e-2:
        return H * (1 / 2 - H * (1 / 6 - H * (1 / 24 - H * (1 / 120 - H * (1 / 720 - H / 5040)))))
    return 1 + math.expm1(-H) / H


@sampler(SEEDS3(), "SEEDS")
def sample_seeds_3(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    r_1: float = 1 / 3, r_2: float = 2 / 3, *, seeds: Seeds = None,
) -> Tensor:
    """SEEDS-3 (2305.14267), Brownian noise. Order 3 at eta 0, three evaluations per step."""
    return walk(SEEDS3(eta, s_noise, r_1, r_2), model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler)


sample_seeds_3_cfg_pp = cfg_pp_form(sample_seeds_3)
