"""One-step methods with stages on denoised: exponential Runge-Kutta, with the noise of each stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from torch import Tensor

from ella_kd.samplers.solver import Evaluate, Noise, Solver, State, Step, linear


class Stage(NamedTuple):
    """Where the next stage, or the step's end, lies: the weights of the step's x, of every D so far, of new noise, and
    of the noise that the stage before had."""

    to_x: float
    to_denoised: Sequence[float]
    fresh: float = 0.0
    kept: float = 0.0


Stages = tuple[Stage, ...]


@dataclass(frozen=True)
class Staged(Solver[Stages]):
    """x_k = a_k x + sum_j b_kj D_j + W_k, W_k = kept W_{k-1} + fresh noise, one evaluation each, up to the end."""

    def step(self, c: Step[Stages], x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        drawn = (noise(k) for k in count())
        denoised: list[Tensor] = []
        path: Tensor | None = None
        stage = x
        for sigma, w in zip(c.evals, c.weights):
            denoised.append(evaluate(stage, sigma))
            stage = linear((w.to_x, x), *zip(w.to_denoised, denoised))
            path = path * w.kept if path is not None and w.kept else None
            if w.fresh:
                new = next(drawn) * w.fresh
                path = new if path is None else path + new
            stage = stage if path is None else stage + path
        return stage, {}


LAND: Stages = (Stage(0.0, (1.0,)),)
"""The step to sigma 0, which is its one evaluation's D."""
