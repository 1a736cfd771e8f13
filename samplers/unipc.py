"""UniPC (2302.04867) in data prediction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from torch import Tensor

from ella_kd.samplers.multistep import DataMultistep, DataWeights, integrate, padded, used_order
from ella_kd.samplers.registry import Args, Callback, Model, Seeds, cfg_pp_form, sampler, walk
from ella_kd.samplers.solver import Step, refuse_order, refuse_other

__all__ = ["UniPC", "sample_uni_pc", "sample_uni_pc_bh2", "sample_uni_pc_bh2_cfg_pp", "sample_uni_pc_cfg_pp"]


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

    def __post_init__(self) -> None:
        refuse_order("max_order", self.max_order, 3)
        refuse_other("solver_type", self.solver_type, "bh1", "bh2")

    def steps(self, sigmas: Sequence[float]) -> list[Step[DataWeights]]:
        steps, size = [], self.max_order + 1
        correct: list[float] = []
        for i, (s, t) in enumerate(pairwise(sigmas)):
            order = used_order(i, sigmas, self.max_order, self.lower_order_final)
            predict, corrected = self._weights(i, sigmas, order)
            weights = DataWeights(t / s, padded(predict, size), correct=padded(correct, size))
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


@sampler(UniPC(), "UniPC")
def sample_uni_pc(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, max_order: int = 3, variant: Literal["bh1", "bh2"] = "bh1",
    lower_order_final: bool = True, *, seeds: Seeds = None,
) -> Tensor:
    """UniPC (2302.04867), B(h) = h. Order max_order + 1, one evaluation per step."""
    return walk(UniPC(variant, max_order, lower_order_final), model, x, sigmas, extra_args, callback, disable, seeds)


sample_uni_pc_cfg_pp = cfg_pp_form(sample_uni_pc)


@sampler(UniPC("bh2"), "UniPC")
def sample_uni_pc_bh2(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, max_order: int = 3, lower_order_final: bool = True, *, seeds: Seeds = None,
) -> Tensor:
    """UniPC (2302.04867), B(h) = e^h - 1. Order max_order + 1, one evaluation per step."""
    return walk(UniPC("bh2", max_order, lower_order_final), model, x, sigmas, extra_args, callback, disable, seeds)


sample_uni_pc_bh2_cfg_pp = cfg_pp_form(sample_uni_pc_bh2)
