"""First order: Euler and Euler ancestral."""

from __future__ import annotations

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
class Euler(Churned):
    """Euler steps with optional churn; Karras et al. (2022, 2206.00364), Algorithm 2 without the correction.

    Order 1, one evaluation per step."""

    order = 1
    evals = 1

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        for s, t in pairwise(sigmas):
            hat, churn = self.churn(s, t, len(sigmas) - 1)
            steps.append(Step((hat,), (churn, t / hat, (hat - t) / hat), pairs(churn, s, hat)))
        return steps

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        churn, to_x, to_denoised = c.weights
        if churn:
            x = x + noise(0) * churn
        denoised = evaluate(x, c.evals[0])
        return linear((to_x, x), (to_denoised, denoised)), state


@dataclass(frozen=True)
class EulerAncestral(Ancestral):
    """Euler down to sigma_down, then noise up to the next sigma (k-diffusion). Order 1, one evaluation per step."""

    order = 1
    evals = 1

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        for s, t in pairwise(sigmas):
            down, up = ancestral_step(s, t, self.eta)
            up *= self.s_noise
            steps.append(Step((s,), (down / s, (s - down) / s, up), pairs(up, s, t)))
        return steps

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        to_x, to_denoised, up = c.weights
        x = linear((to_x, x), (to_denoised, evaluate(x, c.evals[0])))
        return (x + noise(0) * up if up else x), state
