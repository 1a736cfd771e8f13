"""Restart sampling: Heun's method, which now and then goes back up with fresh noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ella_kd.samplers.second_order import Heun
from ella_kd.samplers.solver import Evaluate, Noise, Solver, State, Step, refuse_negative

Interval = tuple[float, int, int, float]
"""(sigma_min, Heun steps, times, sigma_max)"""


@dataclass(frozen=True)
class Restart(Solver):
    """Restart (2306.14878, Algorithm 1): after the step that arrives at an interval's sigma_min, noise takes x up to
    its sigma_max and Heun steps on a Karras grid bring it down again, so many times. An interval's ends are the
    schedule's nearest sigmas above 0 (A1111); one whose ends coincide there is left out, as all are on ascending
    schedules.

    The schedule is walked as it is given: restarts are evaluations on top of it, two per step of theirs, within the
    step that they follow. Order 2, two evaluations per step besides; one where the step lands on sigma 0."""

    intervals: tuple[Interval, ...] = ((0.1, 9, 1, 2.0),)
    s_noise: float = 1.0
    order = 2
    evals = 2

    def __post_init__(self) -> None:
        refuse_negative(s_noise=self.s_noise)
        for low, steps, times, high in self.intervals:
            if not (0 < low < high and steps >= 1 and times >= 0):
                raise ValueError(f"expected 0 < sigma_min < sigma_max, steps >= 1 and times >= 0, got {self.intervals}")

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        walks: list[list[list[float]]] = [[list(pair)] for pair in pairwise(sigmas)]  # grids walked at each step
        positive = [sigma for sigma in sigmas if sigma > 0]
        for low, steps, times, high in self.intervals:
            bottom, top = (min(range(len(positive)), key=lambda i: abs(positive[i] - to)) for to in (low, high))
            if top < bottom and sigmas[top] > sigmas[bottom]:
                walks[bottom - 1] += [_karras(sigmas[top], sigmas[bottom], steps)] * times
        return [self._step(walk) for walk in walks]

    def _step(self, grids: Sequence[Sequence[float]]) -> Step:
        evals: list[float] = []
        weights: list[float] = []
        noises: list[tuple[float, float]] = []
        at = grids[0][0]
        for grid in grids:
            up = self.s_noise * max(grid[0] ** 2 - at**2, 0.0) ** 0.5
            if up:
                noises.append((at, grid[0]))
            for step in Heun().steps(grid):
                evals += step.evals
                weights += [up, *step.weights[1:]]  # in the place of the churn, which is 0
                up = 0.0
            at = grid[-1]
        return Step(tuple(evals), tuple(weights), tuple(noises))

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        drawn = 0
        for k in range(0, len(c.evals), 2):
            weights = c.weights[k // 2 * 5 : k // 2 * 5 + 5]
            up = weights[0]
            if up:
                x = x + noise(drawn) * up
                drawn += 1
            x, _ = Heun().step(Step(c.evals[k : k + 2], (0.0, *weights[1:])), x, {}, evaluate, noise)
        return x, state


def _karras(high: float, low: float, n: int) -> list[float]:
    inner = [(high ** (1 / 7) + k / n * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for k in range(1, n)]
    return [high, *inner, low]
