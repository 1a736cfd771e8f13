"""Restart sampling: Heun's method, which now and then goes back up with fresh noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ella_kd.samplers.heun import Heun, SlopesWeights
from ella_kd.samplers.registry import Args, Callback, Model, NoiseSampler, Seeds, cfg_pp_form, sampler, walk
from ella_kd.samplers.solver import Evaluate, Noise, Solver, State, Step, refuse_negative

__all__ = ["Restart", "sample_restart", "sample_restart_cfg_pp"]

RestartInterval = tuple[float, int, int, float]
"""(sigma_min, Heun steps, times, sigma_max)"""
Walk = tuple[tuple[float, Step[SlopesWeights]], ...]
"""Heun steps, each with the weight of the noise before it."""


@dataclass(frozen=True)
class Restart(Solver[Walk]):
    """Restart (2306.14878, Algorithm 1): after the step that arrives at an interval's sigma_min, noise takes x up to
    its sigma_max and Heun steps on a Karras grid bring it down again, so many times. An interval's ends are the
    schedule's nearest sigmas above 0 (A1111); one whose ends coincide there is left out, as all are on ascending
    schedules.

    The schedule is walked as it is given: restarts are evaluations on top of it, two per step of theirs, within the
    step that they follow. Order 2, two evaluations per step besides; one where the step lands on sigma 0."""

    intervals: tuple[RestartInterval, ...] = ((0.1, 9, 1, 2.0),)
    s_noise: float = 1.0
    order = 2
    evals = 2

    def __post_init__(self) -> None:
        refuse_negative(s_noise=self.s_noise)
        for low, steps, times, high in self.intervals:
            if not (0 < low < high and steps >= 1 and times >= 0):
                raise ValueError(f"expected 0 < sigma_min < sigma_max, steps >= 1 and times >= 0, got {self.intervals}")

    def steps(self, sigmas: Sequence[float]) -> list[Step[Walk]]:
        walks: list[list[list[float]]] = [[list(pair)] for pair in pairwise(sigmas)]  # grids walked at each step
        positive = [sigma for sigma in sigmas if sigma > 0]
        for low, steps, times, high in self.intervals:
            bottom, top = (min(range(len(positive)), key=lambda i: abs(positive[i] - to)) for to in (low, high))
            if top < bottom:  # never on an ascending schedule
                walks[bottom - 1] += [_karras(sigmas[top], sigmas[bottom], steps)] * times
        return [self._step(walk) for walk in walks]

    def _step(self, grids: Sequence[Sequence[float]]) -> Step[Walk]:
        walk: list[tuple[float, Step[SlopesWeights]]] = []
        noises: list[tuple[float, float]] = []
        at = grids[0][0]
        for grid in grids:
            up = self.s_noise * max(grid[0] ** 2 - at**2, 0.0) ** 0.5
            noises += [(at, grid[0])] if up else []
            first, *rest = Heun().steps(grid)
            walk += [(up, first), *((0.0, step) for step in rest)]
            at = grid[-1]
        return Step(tuple(sigma for _, step in walk for sigma in step.evals), tuple(walk), tuple(noises))

    def step(self, c: Step[Walk], x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        drawn = 0
        for up, step in c.weights:
            if up:
                x = x + noise(drawn) * up
                drawn += 1
            x, _ = Heun().step(step, x, {}, evaluate, noise)
        return x, {}


def _karras(high: float, low: float, n: int) -> list[float]:
    inner = [(high ** (1 / 7) + k / n * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for k in range(1, n)]
    return [high, *inner, low]


@sampler(Restart(), "Restart, Heun")
def sample_restart(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, s_noise: float = 1.0, restart_list: Mapping[float, Sequence[float]] | None = None,
    noise_sampler: NoiseSampler | None = None, *, seeds: Seeds = None,
) -> Tensor:
    """Restart sampling (2306.14878) on Heun steps. restart_list is A1111's, {sigma_min: [sigmas, times, sigma_max]},
    sigmas counting those of the way down with both ends; None is {0.1: [10, 1, 2]}. Order 2, two evaluations per
    step, and the restarts' on top: the schedule is not shortened for them, as A1111 does."""
    listed = {0.1: (10, 1, 2.0)} if restart_list is None else restart_list
    intervals = tuple((float(low), int(n) - 1, int(times), float(high)) for low, (n, times, high) in listed.items())
    return walk(Restart(intervals, s_noise), model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler)


sample_restart_cfg_pp = cfg_pp_form(sample_restart)
