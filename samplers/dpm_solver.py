"""DPM-Solver (2206.00927) in one to three stages, and DPM-Solver-fast, which spends a budget of evaluations."""

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
)


def stages(s: float, t: float, order: int, r1: float | None = None) -> tuple[tuple[float, ...], list[list[float]]]:
    """A step of DPM-Solver-1, -2 or -3 from s to t as a tableau (eq. 3.7, Algorithms 1 and 2): the sigmas of its
    stages, and for each stage but the first and for the end the weights of each eps = (x - D) / sigma, added to x."""
    if order == 1:
        return (s,), [[t - s]]
    r1 = r1 or (1 / 2 if order == 2 else 1 / 3)
    h = math.log(s / t)
    m = s * math.exp(-r1 * h)
    if order == 2:
        return (s, m), [[m - s], [(t - s) * (1 - 1 / (2 * r1)), (t - s) / (2 * r1)]]
    r2 = 2 / 3
    m2 = s * math.exp(-r2 * h)
    middle = m2 * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1)
    end = t / r2 * (math.expm1(h) / h - 1)
    return (s, m, m2), [[m - s], [m2 - s + middle, -middle], [t - s + end, 0.0, -end]]


def orders(n: int) -> list[int]:
    """DPM-Solver-fast's division of n evaluations: steps of order 3, then 2 and 1 or what is left."""
    return [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]


@dataclass(frozen=True)
class DPMFast(Ancestral):
    """DPM-Solver-fast (2206.00927, section 3.4): n evaluations on steps of order 3, the last ones lower, on an
    even grid in log sigma, which must have len(orders(n)) steps and end above 0. With eta its ancestral form: down to
    sigma_down, not below the end, then noise. Order 3 but for its last steps, up to three evaluations per step."""

    n: int = 10
    eta: float = 0.0
    order = 3
    evals = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n must be a number of evaluations of at least 1, got {self.n!r}")

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        division, end = orders(self.n), sigmas[-1]
        if len(sigmas) - 1 != len(division) or end <= 0:
            raise ValueError(f"{self.n} evaluations are {len(division)} steps to a sigma above 0, got {list(sigmas)}")
        steps = []
        for order, (s, t) in zip(division, pairwise(sigmas)):
            down, up = t, 0.0
            if self.eta:
                down = max(end, ancestral_step(s, t, self.eta)[0])
                up = math.sqrt(max(t**2 - down**2, 0.0)) * self.s_noise
            evals, rows = stages(s, down, order)
            scaled = [weight / sigma for row in rows for weight, sigma in zip(row, evals)]
            steps.append(Step(evals, (up, *scaled), pairs(up, s, t)))
        return steps

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        up, *weights = c.weights
        at, differences = x, []
        for k, sigma in enumerate(c.evals):
            differences.append(at - evaluate(at, sigma))
            row, weights = weights[: k + 1], weights[k + 1 :]
            at = linear((1.0, x), *zip(row, differences))
        return (at + noise(0) * up if up else at), state
