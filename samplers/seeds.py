"""SEEDS (2305.14267) in data prediction: exponential Runge-Kutta steps with the exact noise of each stage."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ella_kd.samplers.solver import Ancestral, Evaluate, Noise, State, Step, linear, refuse_ascending


@dataclass(frozen=True)
class _Seeds(Ancestral):
    """Stages at fractions r_1 < r_2 < .. <= 1 of a step of h in log sigma, from (x, D) at sigma s:

    x_r = e^{-r h (1 + eta)} x + sum_j a_j D_j + sigma_r sqrt(1 - e^{-2 eta r h}) W_r,

    with one path W through all stages and the step's end: the noise of a later stage is that of the one before, decayed
    by e^{-eta (r - r_old) h}, and a new part. A step to sigma 0 is one evaluation's D."""

    noise = "brownian"

    @abstractmethod
    def fractions(self) -> tuple[float, ...]:
        """Where the stages after the first lie in the step."""

    @abstractmethod
    def tableau(self, H: float) -> list[list[float]]:
        """For each further stage and for the end, the weights of the D before it; H = (1 + eta) h."""

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        stages = (*self.fractions(), 1.0)
        if self.eta:
            refuse_ascending(sigmas[0], sigmas[1])
        steps = []
        for s, t in pairwise(sigmas):
            if t == 0:
                steps.append(Step((s,), (0.0, 0.0, 0.0, 1.0)))
                continue
            h = math.log(s / t)
            levels = [s, *(s ** (1 - r) * t**r if r < 1 else t for r in stages)]
            weights: list[float] = []
            noises = []
            ends = zip(stages, (0.0, *stages), levels[1:], pairwise(levels), self.tableau(h * (1 + self.eta)))
            for r, before, level, pair, row in ends:
                decay = -self.eta * (r - before) * h
                fresh = level * math.sqrt(-math.expm1(2 * decay)) * self.s_noise
                kept = level / pair[0] * math.exp(decay)
                weights += [kept if self.s_noise else 0.0, fresh, math.exp(-self.eta * r * h) * level / s, *row]
                if fresh:
                    noises.append(pair)
            steps.append(Step(tuple(levels[:-1]), tuple(weights), tuple(noises)))
        return steps

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        weights = iter(c.weights)
        denoised: list[Tensor] = []
        stage, drawn = x, 0
        added: Tensor | None = None
        for sigma in c.evals:
            denoised.append(evaluate(stage, sigma))
            kept, fresh, to_x = (next(weights) for _ in range(3))
            stage = linear((to_x, x), *((next(weights), D) for D in denoised))
            if fresh:
                new = noise(drawn) * fresh
                added = new if added is None else added * kept + new
                drawn += 1
            elif added is not None:
                added = added * kept
            if added is not None:
                stage = stage + added
        return stage, state


@dataclass(frozen=True)
class SEEDS2(_Seeds):
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
        if self.solver_type not in ("phi_1", "phi_2"):
            raise ValueError(f"solver_type must be 'phi_1' or 'phi_2', got {self.solver_type!r}")

    def fractions(self) -> tuple[float, ...]:
        return (self.r,)

    def tableau(self, H: float) -> list[list[float]]:
        later = _phi_1(H) / (2 * self.r) if self.solver_type == "phi_1" else _phi_2(H) / self.r
        return [[_phi_1(self.r * H)], [_phi_1(H) - later, later]]


@dataclass(frozen=True)
class SEEDS3(_Seeds):
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

    def fractions(self) -> tuple[float, ...]:
        return self.r_1, self.r_2

    def tableau(self, H: float) -> list[list[float]]:
        second = self.r_2 / self.r_1 * _phi_2(self.r_2 * H)
        third = _phi_2(H) / self.r_2
        return [[_phi_1(self.r_1 * H)], [_phi_1(self.r_2 * H) - second, second], [_phi_1(H) - third, 0.0, third]]


def _phi_1(H: float) -> float:
    """H phi_1(-H) = 1 - e^-H."""
    return -math.expm1(-H)


def _phi_2(H: float) -> float:
    """H phi_2(-H) = 1 - (1 - e^-H) / H; by its series where the two nearly cancel."""
    if abs(H) < 1e-2:
        return H * (1 / 2 - H * (1 / 6 - H * (1 / 24 - H * (1 / 120 - H * (1 / 720 - H / 5040)))))
    return 1 + math.expm1(-H) / H
