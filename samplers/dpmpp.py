"""DPM-Solver++ (2211.01095): 2S ancestral, and 2M with its SDE form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ella_kd.samplers.solver import (
    Ancestral,
    Evaluate,
    Noise,
    State,
    Step,
    ancestral_step,
    linear,
    pairs,
    refuse_ascending,
)


@dataclass(frozen=True)
class DPMpp2SAncestral(Ancestral):
    """DPM-Solver++(2S) down to sigma_down through the middle in log sigma, then noise (k-diffusion).

    Order 2 at eta 0, two evaluations per step; one where sigma_down is 0."""

    order = 2
    evals = 2

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        for s, t in pairwise(sigmas):
            down, up = ancestral_step(s, t, self.eta)
            up *= self.s_noise
            mid = (s * down) ** 0.5
            evals = (s, mid) if down > 0 else (s,)
            weights = (up, down / s, (s - down) / s, mid / s, (s - mid) / s)
            steps.append(Step(evals, weights, pairs(up, s, t)))
        return steps

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        up, to_x, to_denoised, mid_x, mid_denoised = c.weights
        denoised = evaluate(x, c.evals[0])
        if len(c.evals) == 2:
            denoised = evaluate(linear((mid_x, x), (mid_denoised, denoised)), c.evals[1])
        x = linear((to_x, x), (to_denoised, denoised))
        return (x + noise(0) * up if up else x), state


@dataclass(frozen=True)
class DPMpp2M(Ancestral):
    """DPM-Solver++(2M), and with eta > 0 its SDE form: two-step multistep, first order at the start and to sigma 0.

    x' = e^-H x + b D + k (h / h_old) (D - D_old) + t sqrt(1 - e^-2 eta h) noise, with H = (1 + eta) h, b = 1 - e^-H,
    k = b / 2 ("midpoint") or 1 - b / H ("heun"). Order 2 at eta 0, one evaluation per step. Brownian noise."""

    eta: float = 0.0
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    order = 2
    evals = 1
    noise = "brownian"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_type not in ("midpoint", "heun"):
            raise ValueError(f"solver_type must be 'midpoint' or 'heun', got {self.solver_type!r}")

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        h_old = math.inf
        for s, t in pairwise(sigmas):
            if self.eta:
                refuse_ascending(s, t)
            h = math.log(s / t) if t > 0 else math.inf
            H = h * (1 + self.eta)
            to_denoised = -math.expm1(-H)
            up = t * math.sqrt(-math.expm1(-2 * self.eta * h)) * self.s_noise if t > 0 else 0.0
            extra = to_denoised / 2 if self.solver_type == "midpoint" else 1 - to_denoised / H
            extra = extra * h / h_old if t > 0 else 0.0  # h_old is inf at the first step: no extrapolation
            steps.append(Step((s,), (math.exp(-H), to_denoised, extra, up), pairs(up, s, t)))
            h_old = h
        return steps

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        to_x, to_denoised, extra, up = c.weights
        denoised = evaluate(x, c.evals[0])
        old = state.get("denoised", denoised)
        x = linear((to_x, x), (to_denoised + extra, denoised), (-extra, old))
        return (x + noise(0) * up if up else x), {"denoised": denoised}
