"""The sampler of consistency models: denoise, and add the next sigma's noise anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ella_kd.samplers.solver import (
    Evaluate,
    Noise,
    Solver,
    State,
    Step,
    pairs,
    refuse_ascending,
    refuse_negative,
)


@dataclass(frozen=True)
class LCM(Solver):
    """x' = D + t noise: multistep consistency sampling (2303.01469, Algorithm 1; latent consistency, 2310.04378).

    Right for models distilled to jump to sigma 0 from any sigma. On others it draws D's noise away at each step and
    approaches no flow, so it has no order: 0. One evaluation per step."""

    s_noise: float = 1.0
    order = 0
    evals = 1

    def __post_init__(self) -> None:
        refuse_negative(s_noise=self.s_noise)

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        for s, t in pairwise(sigmas):
            refuse_ascending(s, t)
        return [Step((s,), (t * self.s_noise,), pairs(t * self.s_noise, s, t)) for s, t in pairwise(sigmas)]

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        (up,) = c.weights
        x = evaluate(x, c.evals[0])
        return (x + noise(0) * up if up else x), state
