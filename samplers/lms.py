"""Linear multistep in sigma on the schedule's own grid: LMS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ella_kd.samplers.history import SlopeMultistep, integrate, lagrange


@dataclass(frozen=True)
class LMS(SlopeMultistep):
    """Adams-Bashforth on the schedule's own grid (k-diffusion's LMS): the polynomial in sigma through the last `terms`
    slopes d = (x - D) / sigma, integrated exactly over the step.

    DEIS in sigma (2204.13902) is the same but for the step to sigma 0, which it takes with one slope and this with all.
    The first steps have fewer slopes, the very first is Euler's, whose error stays: with 4 terms the order measured on
    an exact mixture falls towards 2 as steps grow; from an exact start it is 4. One evaluation per step."""

    terms: int = 4
    order = 2

    def __post_init__(self) -> None:
        if isinstance(self.terms, bool) or not isinstance(self.terms, int) or self.terms < 1:
            raise ValueError(f"order must be an integer of at least 1, got {self.terms!r}")

    @property
    def memory(self) -> int:
        return self.terms - 1

    def slope_weights(self, i: int, sigmas: Sequence[float]) -> Sequence[float]:
        nodes = sigmas[max(0, i - self.memory) : i + 1][::-1]
        weights: list[float] = integrate(lambda u: lagrange(nodes, u), sigmas[i], sigmas[i + 1]).tolist()
        return weights
