"""The model as a step sees it: counted, checked for NaN and Inf without waiting, reported, and split for CFG++."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ella_kd.samplers.cfg_pp import CFGpp
from ella_kd.samplers.model import Bound, Callback, Record, check_answer, rounded
from ella_kd.samplers.solver import Step


class Evaluations:
    """evaluate(x, sigma) of a run; tells the callback, and remembers D - U of each step's first for CFG++."""

    def __init__(
        self,
        bound: Bound,
        cfg_pp: CFGpp | None,
        lambdas: list[tuple[float, float]] | None,
        callback: Callback | None,
        sigmas: Tensor,
        values: Sequence[float],
        steps: Sequence[Step],
        dtype: torch.dtype,
    ) -> None:
        self.bound, self.cfg_pp, self.lambdas = bound, cfg_pp, lambdas
        self.callback, self.sigmas, self.values, self.steps = callback, sigmas, values, steps
        self.before = list(accumulate((len(step.evals) for step in steps), initial=0))
        self.levels = {sigma: rounded(sigma, dtype) for step in steps for sigma in step.evals}
        self.counts: list[tuple[int, float, Tensor]] = []  # (step, sigma, how many values are NaN or Inf)
        self.guidance: Tensor | None = None

    def begin(self, i: int) -> None:
        """Starts step i."""
        self.i, self.calls, self.guidance = i, 0, None
        rescaled = self.cfg_pp is not None and self.cfg_pp.scale != "lam" and self.lambdas is not None
        self.scale = self.lambdas[i][0] if rescaled and self.lambdas else None

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        assert sigma in self.steps[self.i].evals, f"evaluated at sigma {sigma}, which eval_sigmas does not list"
        prediction = self.bound(x, self.levels[sigma], self.scale)
        denoised = used = prediction.denoised
        check_answer("denoised", denoised, x)
        if self.cfg_pp is not None:
            check_answer("uncond", prediction.uncond, x)
            assert prediction.uncond is not None
            used = prediction.uncond
        # NaN and Inf less themselves are NaN, which is not 0; isfinite takes five times as long on a CPU.
        self.counts.append((self.i, sigma, torch.count_nonzero(denoised - denoised)))
        self.calls += 1
        if self.calls == 1:
            self.first = x, sigma, denoised
            if self.cfg_pp is not None:
                gain = self.cfg_pp.gain(self.steps[self.i])
                self.guidance = denoised - used if gain == 1 else (denoised - used) * gain
            if self.callback is not None:
                self.raise_if_not_finite()
                self.callback(self.record())
        return used

    def record(self) -> Record:
        """What the step's first evaluation saw, and how many there have been in the whole run."""
        x, sigma, denoised = self.first
        level = self.sigmas[self.i]
        hat = level if sigma == self.values[self.i] else self.sigmas.new_full((), sigma)
        record = {"x": x, "i": self.i, "sigma": level, "sigma_hat": hat, "denoised": denoised}
        record["nfe"] = self.before[self.i] + self.calls
        if self.cfg_pp is not None:
            record["lam"], record["w"] = (None, None) if self.lambdas is None else self.lambdas[self.i]
        return record

    def raise_if_not_finite(self) -> None:
        """Reads the counts, which waits for the device once; ValueError names the first bad evaluation."""
        if not self.counts:
            return
        found = torch.stack([count for *_, count in self.counts]).tolist()
        for (i, sigma, _), count in zip(self.counts, found):
            if count:
                raise ValueError(
                    f"the model returned {count} NaN or Inf values at step {i} of {len(self.sigmas) - 1} "
                    f"(sigma {sigma:g}); a float16 network may have overflowed: try float32"
                )
        self.counts.clear()
