"""Second order in one step, in sigma: Heun and DPM-Solver-2, and the latter's ancestral form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ella_kd.samplers.solver import (
    Ancestral,
    Churned,
    Evaluate,
    Noise,
    State,
    Step,
    ancestral_step,
    linear,
    pairs,
)


@dataclass(frozen=True)
class _Midpoint(Churned):
    """A trial step to a second sigma m, then the step along a mix of both slopes d = (x - D) / sigma:
    x' = x + (t - s) [(1 - mix) d(s) + mix d(m)]. A step to sigma 0 is Euler's."""

    order = 2
    evals = 2

    @abstractmethod
    def second(self, s: float, t: float) -> tuple[float, float]:
        """(m, mix) for a step from s to t > 0."""

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        for s, t in pairwise(sigmas):
            hat, churn = self.churn(s, t, len(sigmas) - 1)
            noises = pairs(churn, s, hat)
            if t > 0:
                m, mix = self.second(hat, t)
                slope, slope_m = (t - hat) * (1 - mix) / hat, (t - hat) * mix / m
                steps.append(Step((hat, m), (churn, m / hat, (hat - m) / hat, slope, slope_m), noises))
            else:
                steps.append(Step((hat,), (churn, 0.0, 1.0), noises))
        return steps

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        churn, to_x, to_denoised, *slopes = c.weights
        if churn:
            x = x + noise(0) * churn
        denoised = evaluate(x, c.evals[0])
        x_2 = linear((to_x, x), (to_denoised, denoised))
        if not slopes:
            return x_2, state
        slope, slope_m = slopes
        denoised_m = evaluate(x_2, c.evals[1])
        return linear((1.0, x), (slope, x - denoised), (slope_m, x_2 - denoised_m)), state


@dataclass(frozen=True)
class Heun(_Midpoint):
    """Heun's method with optional churn; Karras et al. (2022, 2206.00364), Algorithm 2.

    Order 2, two evaluations per step; one where the step lands on sigma 0."""

    def second(self, s: float, t: float) -> tuple[float, float]:
        return t, 0.5


@dataclass(frozen=True)
class DPM2(_Midpoint):
    """DPM-Solver-2 (2206.00927) with churn as in Karras et al.: the slope at the middle in log sigma.

    Order 2, two evaluations per step; one where the step lands on sigma 0."""

    def second(self, s: float, t: float) -> tuple[float, float]:
        return (s * t) ** 0.5, 1.0


@dataclass(frozen=True)
class DPM2Ancestral(Ancestral):
    """DPM-Solver-2 (2206.00927) down to sigma_down, then noise (k-diffusion).

    Order 2 at eta 0, two evaluations per step; one where sigma_down is 0. There, with sigma_next above 0 (eta above 1),
    k-diffusion adds no noise and goes on with an x of no noise at all; this adds it."""

    order = 2
    evals = 2

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        for s, t in pairwise(sigmas):
            down, up = ancestral_step(s, t, self.eta)
            up *= self.s_noise
            if down > 0:
                m = (s * down) ** 0.5
                steps.append(Step((s, m), (up, m / s, (s - m) / s, (down - s) / m), pairs(up, s, t)))
            else:
                steps.append(Step((s,), (up,), pairs(up, s, t)))
        return steps

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        up, *trial = c.weights
        denoised = evaluate(x, c.evals[0])
        if trial:
            to_x, to_denoised, slope_m = trial
            x_2 = linear((to_x, x), (to_denoised, denoised))
            x = linear((1.0, x), (slope_m, x_2 - evaluate(x_2, c.evals[1])))
        else:
            x = denoised
        return (x + noise(0) * up if up else x), state
