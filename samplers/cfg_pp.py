"""CFG++ (Chung et al., 2406.08070) for any method: the method walks on U, and each step adds D - U once.

U is the unconditional denoised, D = U + lambda (C - U). Every evaluation of a step, second stages and correctors too,
sees U; D - U is that of the step's first evaluation, added at the end of the step. On a first-order step that is plain
guidance of scale w = lambda / (1 - e^-h) = lambda s / (s - t), which grows with the number of steps.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ella_kd.samplers.solver import Step

ScaleMode = Literal["lam", "cfg / 12.5", "normalised"]
REFERENCE_STEPS = 20


def _once(step: Step) -> float:
    return 1.0


@dataclass(frozen=True)
class CFGpp:
    """A model as CFG++ walks on it: give it as `model` to any sampler that runs in the driver.

    scale: what the model's cond_scale means. "lam": lambda itself, 0 to 1 (the paper; ComfyUI's cfg). "cfg / 12.5":
    12.5 lambda (A1111's slider). "normalised": kappa, from which each step has lambda = kappa (1 - e^-h) /
    (1 - e^-h_ref), h_ref the mean step in log sigma of 20 steps over the same range: the strength no longer depends on
    the number of steps, and on 20 exponential steps lambda is kappa until the last.
    gain: how many times a step adds D - U, where that is not once (variants of others).
    """

    model: Any
    scale: ScaleMode = "lam"
    gain: Callable[[Step], float] = _once

    def __post_init__(self) -> None:
        if self.scale not in get_args(ScaleMode):
            raise ValueError(f"the CFG++ scale must be one of {get_args(ScaleMode)}, got {self.scale!r}")

    def lambdas(self, sigmas: Sequence[float], steps: Sequence[Step],
                extra_args: Mapping[str, Any]) -> list[tuple[float, float]] | None:
        """(lambda, effective w) of every step, w that of a first-order step without noise; None where the model's
        cond_scale is no number. TypeError for a scale mode without a number to scale; ValueError for an ascending
        schedule; a warning where cond_scale looks like plain guidance's."""
        if sigmas[1] > sigmas[0]:
            raise ValueError("CFG++ samples downwards: it has no form for an ascending schedule (inversion)")
        scale = extra_args.get("cond_scale")
        if not isinstance(scale, (int, float)):
            if self.scale != "lam":
                raise TypeError(f"the CFG++ scale {self.scale!r} needs a number as cond_scale, got {scale!r}")
            return None
        self._warn(scale)
        shares = [1 - t / step.evals[0] for step, t in zip(steps, sigmas[1:])]  # 1 - e^-h
        if self.scale == "lam":
            lambdas = [float(scale)] * len(steps)
        elif self.scale == "cfg / 12.5":
            lambdas = [scale / 12.5] * len(steps)
        else:
            lambdas = [scale * share / reference_share(sigmas) for share in shares]
        return [(lam, lam / share) for lam, share in zip(lambdas, shares)]

    def _warn(self, scale: float) -> None:
        name, limit = {"lam": ("lambda", 2), "cfg / 12.5": ("12.5 lambda", 25), "normalised": ("kappa", 2)}[self.scale]
        if scale > limit:
            warnings.warn(
                f"with CFG++ cond_scale is {name}, usually 0 to {limit / 2:g}; {scale:g} is above {limit} "
                "(a plain guidance scale, perhaps?)",
                stacklevel=_caller(),
            )


def reference_share(sigmas: Sequence[float]) -> float:
    """1 - e^-h_ref, h_ref the mean step in log sigma of 20 steps over the range of these sigmas.

    A schedule that ends in 0 has 19 finite steps of its 20; where there is no range, one step to 0, it is 1."""
    to_zero = sigmas[-1] == 0
    last = sigmas[-2] if to_zero else sigmas[-1]
    if last == sigmas[0]:
        return 1.0
    return -math.expm1(-math.log(sigmas[0] / last) / (REFERENCE_STEPS - to_zero))


def _caller() -> int:
    """The warnings' stacklevel, seen from who called this, of the nearest frame outside the samplers and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("ella_kd.samplers", "torch.")):
        level, frame = level + 1, frame.f_back
    return level
