"""DPM-Solver++ (2211.01095) as SDE solvers in one and in three steps: dpmpp_sde and dpmpp_3m_sde of k-diffusion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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
class DPMppSDE(Ancestral):
    """DPM-Solver++(2S) with noise at both stages: an ancestral trial step to a sigma m, a fraction r of the way in log
    sigma, then an ancestral step along (1 - 1/2r) D + 1/2r D(m). At eta 0 and r = 1/2 it equals DPMpp2SAncestral.

    Order 2 at eta 0, two evaluations per step; one where the step lands on sigma 0. Brownian noise."""

    r: float = 0.5
    order = 2
    evals = 2
    noise = "brownian"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.r <= 1:
            raise ValueError(f"r must be above 0 and at most 1, got {self.r}")

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        for s, t in pairwise(sigmas):
            if t > 0:
                m = s ** (1 - self.r) * t**self.r
                mix = 1 / (2 * self.r)
                (down_m, up_m), (down, up) = (ancestral_step(s, to, self.eta) for to in (m, t))
                up_m, up = up_m * self.s_noise, up * self.s_noise
                trial = (down_m / s, (s - down_m) / s, up_m)
                whole = (s - down) / s
                weights = (*trial, down / s, whole * (1 - mix), whole * mix, up)
                steps.append(Step((s, m), weights, pairs(up_m, s, m) + pairs(up, s, t)))
            else:
                steps.append(Step((s,), ()))
        return steps

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        denoised = evaluate(x, c.evals[0])
        if not c.weights:
            return denoised, state
        trial_x, trial_denoised, up_m, to_x, to_denoised, to_second, up = c.weights
        x_2 = linear((trial_x, x), (trial_denoised, denoised))
        if up_m:
            x_2 = x_2 + noise(0) * up_m
        x = linear((to_x, x), (to_denoised, denoised), (to_second, evaluate(x_2, c.evals[1])))
        return (x + noise(len(c.noises) - 1) * up if up else x), state


@dataclass(frozen=True)
class DPMpp3M(Ancestral):
    """DPM-Solver++(3M) and, with eta > 0, its SDE form: a parabola in log sigma through three denoised, lower order at
    the first two steps, and first order to sigma 0.

    x' = e^-H x + (1 - e^-H) D + phi2 d1 - phi3 d2, H = (1 + eta) h, phi2 = expm1(-H)/H + 1, phi3 = phi2/H - 1/2, with
    the divided differences d1, d2 of D per step h. The parabola's exact integral is -2 phi3 d2: k-diffusion, ComfyUI
    and diffusers leave out the 2, and measured on an exact mixture are of order 1.97. `corrected=True` puts it in:
    order 3.04 with an exact start, 2.7 with a run's own. There the uncorrected error was the smaller at n = 8 to 40.
    One evaluation per step. Brownian noise."""

    corrected: bool = False
    order = 2
    evals = 1
    noise = "brownian"

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        h_1 = h_2 = math.inf  # no step before: a difference over it weighs nothing
        for s, t in pairwise(sigmas):
            if self.eta:
                refuse_ascending(s, t)
            h = math.log(s / t) if t > 0 else math.inf
            if t > 0:
                H = h * (1 + self.eta)
                up = t * math.sqrt(-math.expm1(-2 * self.eta * h)) * self.s_noise
                phi_2 = math.expm1(-H) / H + 1
                phi_3 = (phi_2 / H - 0.5) * (2 if self.corrected else 1)
                r_0, r_1 = h_1 / h, h_2 / h
                span = r_0 + r_1
                # d2 = (d10 - d11) / span, d1 = d10 + r_0 d2, with d10 = (D - D_1) / r_0 and d11 = (D_1 - D_2) / r_1.
                second = (phi_2 * r_0 - phi_3) / span if h_2 < math.inf else 0.0
                weights = (math.exp(-H), -math.expm1(-H), (phi_2 + second) / r_0, -second / r_1, up)
            else:
                weights = (0.0, 1.0, 0.0, 0.0, 0.0)
            steps.append(Step((s,), weights, pairs(weights[-1], s, t)))
            h_1, h_2 = h, h_1
        return steps

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        to_x, to_denoised, newer, older, up = c.weights
        denoised = evaluate(x, c.evals[0])
        old = state.get("denoised", denoised)
        oldest = state.get("denoised_2", old)
        x = linear((to_x, x), (to_denoised + newer, denoised), (older - newer, old), (-older, oldest))
        history = {"denoised": denoised}
        if "denoised" in state:
            history["denoised_2"] = old
        return (x + noise(0) * up if up else x), history
