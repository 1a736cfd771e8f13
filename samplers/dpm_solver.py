"""DPM-Solver (2206.00927) in one to three stages, and DPM-Solver-fast, which spends a budget of evaluations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ella_kd.samplers.registry import (
    RANGE_SAMPLERS,
    Args,
    Callback,
    Model,
    NoiseSampler,
    Seeds,
    range_of,
    sampler,
    walk,
)
from ella_kd.samplers.solver import Ancestral, Evaluate, Noise, State, Step, ancestral_step, linear, pairs

__all__ = ["DPMFast", "sample_dpm_fast"]


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


class FastWeights(NamedTuple):
    """For each stage and for the end the weights of each x - D, added to x, and the noise's."""

    rows: tuple[tuple[float, ...], ...]
    up: float


@dataclass(frozen=True)
class DPMFast(Ancestral[FastWeights]):
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

    def steps(self, sigmas: Sequence[float]) -> list[Step[FastWeights]]:
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
            scaled = tuple(tuple(weight / sigma for weight, sigma in zip(row, evals)) for row in rows)
            steps.append(Step(evals, FastWeights(scaled, up), pairs(up, s, t)))
        return steps

    def step(
        self, c: Step[FastWeights], x: Tensor, state: State, evaluate: Evaluate, noise: Noise
    ) -> tuple[Tensor, State]:
        at, differences = x, []
        for sigma, row in zip(c.evals, c.weights.rows):
            differences.append(at - evaluate(at, sigma))
            at = linear((1.0, x), *zip(row, differences))
        return (at + noise(0) * c.weights.up if c.weights.up else at), {}


def sample_dpm_fast(
    model: Model, x: Tensor, sigma_min: float, sigma_max: float, n: int, extra_args: Args = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 0.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, *, seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver-fast (2206.00927): n evaluations on steps of order 3, the last ones lower, from x at sigma_max to
    sigma_min, above 0 (a sigma_min above sigma_max inverts)."""
    solver = DPMFast(eta, s_noise, n)
    high, low = float(sigma_max), float(sigma_min)
    if not (0 < low < math.inf and 0 < high < math.inf):
        raise ValueError(f"sigma_min and sigma_max must be above 0 and finite, got {low} and {high}")
    places = torch.linspace(math.log(high), math.log(low), len(orders(n)) + 1, dtype=torch.float64)
    sigmas = places.exp().to(x.dtype)
    return walk(solver, model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler)


@sampler(None, "DPM-Solver", name="dpm_fast", order=3, table=RANGE_SAMPLERS)
def _dpm_fast(model: Model, x: Tensor, sigmas: Tensor, *args: Any, seeds: Seeds = None, **options: Any) -> Tensor:
    """dpm_fast over the range of a schedule, with an evaluation for each of its steps, as in ComfyUI."""
    high, low = range_of(sigmas)
    return sample_dpm_fast(model, x, low, high, len(sigmas) - 1, *args, seeds=seeds, **options)
