"""UniPC (2302.04867) in data prediction, and RES multistep's ancestral form (2308.02157)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from ella_kd.samplers.history import DataMultistep, integrate, padded, refuse_order, used_order
from ella_kd.samplers.solver import Ancestral, Step, ancestral_step, pairs


@dataclass(frozen=True)
class UniPC(DataMultistep):
    """UniPC-p, predictor and corrector (2302.04867, algorithms 7 and 8). The corrector of a step reuses the next
    step's evaluation, so it is one evaluation per step; the x that a run ends with is a predictor's.

    Order max_order (1 to 3) and one more for the corrector, from a start of order 1. solver_type, the paper's B(h),
    matters where the paper sets rho = 1/2: the predictor of order 2 and the corrector of order 1. The step to sigma 0
    is first order; with lower_order_final the order falls to it by one a step, on schedules that end in 0 (diffusers
    and ComfyUI lower it on every schedule, which costs one that ends above 0 its order)."""

    solver_type: Literal["bh1", "bh2"] = "bh1"
    max_order: int = 3
    lower_order_final: bool = True
    order = 4
    evals = 1

    def __post_init__(self) -> None:
        refuse_order("max_order", self.max_order, 3)
        if self.solver_type not in ("bh1", "bh2"):
            raise ValueError(f"solver_type must be 'bh1' or 'bh2', got {self.solver_type!r}")

    @property
    def memory(self) -> int:
        return self.max_order

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        correct: list[float] = []
        for i, (s, t) in enumerate(pairwise(sigmas)):
            order = used_order(i, sigmas, self.max_order, self.lower_order_final)
            predict, corrected = self._weights(i, sigmas, order)
            size = self.memory + 1
            weights = (0.0, t / s, *padded(predict, size), *padded(correct, size))
            steps.append(Step((s,), weights))
            correct = [after - before for after, before in zip(corrected, (0.0, *predict), strict=True)]
        return steps

    def _weights(self, i: int, sigmas: Sequence[float], order: int) -> tuple[list[float], list[float]]:
        """Weights of the predictor for (D_i, D_{i-1}, ..) and of the corrector for (D_{i+1}, D_i, ..), besides
        (t / s) x; the corrector's are zeros to sigma 0."""
        s, t = sigmas[i], sigmas[i + 1]
        first = (s - t) / s
        if t == 0:
            return [first], [0.0, first]
        h = math.log(s / t)
        scale = h if self.solver_type == "bh1" else -math.expm1(-h)  # -B(h), with B's argument -h
        r = np.array([math.log(s / sigmas[i - k]) / h for k in range(1, order)] + [1.0])
        powers = np.arange(order)[:, None]
        # b_k B(h) of the paper, (-h) k! phi_{k+1}(-h), as the integral that phi is
        right = h * integrate(lambda u: np.exp(-h * (1 - u)) * u ** (powers + 1), 0.0, 1.0)
        if order == 2:
            rho_p = np.array([scale / 2])
        else:
            rho_p = np.linalg.solve(r[:-1] ** powers[:-1], right[:-1]) if order > 2 else np.zeros(0)
        rho_c = np.array([scale / 2]) if order == 1 else np.linalg.solve(r**powers, right)
        past_p, past_c = (rho_p / r[:-1]).tolist(), (rho_c[:-1] / r[:-1]).tolist()
        last = float(rho_c[-1])
        return [first - sum(past_p), *past_p], [last, first - sum(past_c) - last, *past_c]


@dataclass(frozen=True)
class ResMultistepAncestral(DataMultistep, Ancestral):
    """RES multistep (2308.02157, section 4; phi-functions in log sigma) down to sigma_down, then noise up to the next
    sigma. Order 2 at eta 0, where it is DPM-Solver++(2M) "heun"; one evaluation per step.

    D's slope is divided by the last step's length down to its sigma_down, as in ComfyUI, and not by the distance to
    where D_old was evaluated: noise has moved x since, and with the true distance the variance of Gaussian data comes
    out 56 % too large at 30 steps (4 % as it is)."""

    order = 2
    evals = 1

    @property
    def memory(self) -> int:
        return 1

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        h_old = math.inf
        for s, t in pairwise(sigmas):
            down, up = ancestral_step(s, t, self.eta)
            up *= self.s_noise
            to_denoised = (s - down) / s
            h = math.log(s / down) if down > 0 else math.inf
            extra = (h - to_denoised) / h_old if down > 0 else 0.0  # h_old is inf at the first step
            weights = (up, down / s, to_denoised + extra, -extra, 0.0, 0.0)
            steps.append(Step((s,), weights, pairs(up, s, t)))
            h_old = h
        return steps
