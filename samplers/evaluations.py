"""The model as a step sees it: counted, checked for NaN and Inf without waiting, reported, and split for CFG++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ella_kd.samplers.cfg_pp import CFGpp
from ella_kd.samplers.solver import Step

Model = Callable[..., Any]
"""model(x, sigma [B], **extra_args) -> denoised; for CFG++ model.predict too; model.planned where it has one."""
Record = dict[str, Any]
"""x (as it was evaluated), i, sigma, sigma_hat, denoised, nfe (evaluations so far); with CFG++ also lam and w."""
Callback = Callable[[Record], object]


class Evaluations:
    """evaluate(x, sigma) of a run; tells the callback, and remembers D - U of each step's first for CFG++."""

    def __init__(
        self,
        model: Model,
        extra_args: dict[str, Any],
        cfg_pp: CFGpp | None,
        callback: Callback | None,
        sigmas: Tensor,
        values: Sequence[float],
        steps: Sequence[Step],
    ) -> None:
        self.model, self.extra_args, self.cfg_pp = model, extra_args, cfg_pp
        self.callback, self.sigmas, self.values, self.steps = callback, sigmas, values, steps
        self.before = list(accumulate((len(step.evals) for step in steps), initial=0))
        self.counts: list[tuple[int, float, Tensor]] = []  # (step, sigma, how many values are NaN or Inf)
        self.guidance: Tensor | None = None
        scale = extra_args.get("cond_scale")
        self.lambdas: list[tuple[float, float]] | None = None
        if cfg_pp is not None and isinstance(scale, (int, float)):
            self.lambdas = cfg_pp.lambdas(values, steps, scale)

    def plan(self, planned: Callable[..., dict[str, Any]], sigmas: Tensor) -> None:
        """Lets the model prepare for all the sigmas of the run. A `level` among what it returns is asked for: each
        evaluation fills in its sigma as a number, so that the model need not read it back from the device."""
        self.extra_args = planned(sigmas, self.extra_args)

    def begin(self, i: int) -> None:
        """Starts step i."""
        self.i, self.calls, self.guidance = i, 0, None
        if self.cfg_pp is not None and self.cfg_pp.scale != "lam" and self.lambdas is not None:
            self.extra_args = {**self.extra_args, "cond_scale": self.lambdas[i][0]}

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        assert sigma in self.steps[self.i].evals, f"evaluated at sigma {sigma}, which eval_sigmas does not list"
        sigma_in = x.new_full((len(x),), sigma)
        extra_args = {**self.extra_args, "level": sigma} if "level" in self.extra_args else self.extra_args
        if self.cfg_pp is not None:
            prediction = self.model.predict(x, sigma_in, need_uncond=True, **extra_args)  # type: ignore[attr-defined]
            denoised, used = prediction.denoised, prediction.uncond
            _check("uncond", used, x)
        else:
            denoised = used = self.model(x, sigma_in, **extra_args)
        _check("denoised", denoised, x)
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


def _check(what: str, value: Any, x: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != x.shape or value.dtype != x.dtype:
        got = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the model must return {what} like x, {list(x.shape)} {x.dtype}, got {got}")
