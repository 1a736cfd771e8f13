"""Linear multistep in sigma on the schedule's own grid: LMS."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from ella_kd.samplers.solver import Evaluate, Noise, Solver, State, Step, linear


@dataclass(frozen=True)
class LMS(Solver):
    """Adams-Bashforth on the schedule's own grid (k-diffusion's LMS; DEIS, 2204.13902, in sigma): the polynomial
    through the last `terms` slopes d = (x - D) / sigma, integrated exactly over the step.

    The first steps have fewer slopes, the very first is Euler's, whose error stays: with 4 terms the order measured on
    an exact mixture falls towards 2 as steps grow; from an exact start it is 4. One evaluation per step."""

    terms: int = 4
    order = 2
    evals = 1

    def __post_init__(self) -> None:
        if isinstance(self.terms, bool) or not isinstance(self.terms, int) or self.terms < 1:
            raise ValueError(f"order must be an integer of at least 1, got {self.terms!r}")

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        for i, (s, t) in enumerate(pairwise(sigmas)):
            nodes = sigmas[max(0, i - self.terms + 1) : i + 1][::-1]
            steps.append(Step((s,), (1 / s, *multistep_weights(nodes, s, t))))
        return steps

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        to_slope, *weights = c.weights
        d = (x - evaluate(x, c.evals[0])) * to_slope
        known = [state[key] for key in sorted(state) if key.startswith("slope_")]  # the newest first
        slopes = [d, *known][: self.terms]
        padded = slopes + [d] * (len(weights) - len(slopes))
        x = linear((1.0, x), *zip(weights, padded))
        return x, {f"slope_{k:02d}": slope for k, slope in enumerate(slopes[: self.terms - 1])}


def multistep_weights(nodes: Sequence[float], s: float, t: float) -> list[float]:
    """Integrals from s to t of the Lagrange polynomials of `nodes`, by a Gauss-Legendre rule that is exact for them."""
    middle, half = (s + t) / 2, (t - s) / 2
    rule = [(middle + half * point, half * share) for point, share in _gauss_legendre((len(nodes) + 1) // 2)]
    weights = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        weights.append(sum(share * math.prod((u - other) / (node - other) for other in others) for u, share in rule))
    return weights


@functools.cache
def _gauss_legendre(points: int) -> tuple[tuple[float, float], ...]:
    """(point, share) of the rule on [-1, 1]; numpy finds them anew at each call, by eigenvalues."""
    return tuple(zip(*(values.tolist() for values in np.polynomial.legendre.leggauss(points))))
