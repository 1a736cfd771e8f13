"""The one loop every sampler runs in: validation, planning, progress bar, callback, noise, CFG++, pause and resume.

The loop itself never waits for the device: every number it needs is a Python float beforehand, the noise is uploaded
once, and NaN or Inf from the model is counted on the device and read when a callback runs and at the end.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ella_kd.samplers.noise import check_seeds, draw, random_seeds
from ella_kd.samplers.solver import Noise, Solver, State, Step

Model = Callable[..., Any]
"""model(x, sigma [B], **extra_args) -> denoised; for CFG++ model.predict too; model.planned where it has one."""
Callback = Callable[[dict[str, Any]], object]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]
"""noise_sampler(sigma, sigma_next) -> [B, C, h, w] of unit variance; the sigmas are 0-dim tensors (k-diffusion)."""

RESERVED = ("sigmas", "step", "seeds")  # the driver's own keys of a run's state; the rest is the method's history


@torch.no_grad()
def sample(
    solver: Solver,
    model: Model,
    x: Tensor,
    sigmas: Tensor | None = None,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    seeds: Sequence[int] | None = None,
    noise_sampler: NoiseSampler | None = None,
    cfg_pp: bool = False,
    state: State | None = None,
    stop: int | None = None,
) -> tuple[Tensor, State]:
    """Runs a sampling method over a schedule; returns the new x and the run's state, from which it can go on.

    x [B, C, h, w] float32 or float64, at noise level sigmas[0]; it is not modified and its dtype is kept.
    sigmas [n + 1]: strictly decreasing (partial for img2img, ending in 0 or above) or strictly ascending and positive
    (inversion). stop: pause before this step. To resume, pass the x and the state that came back instead of sigmas and
    seeds; the result equals the unpaused run bitwise. The state is a flat dict of tensors.
    callback: called in each step after its first evaluation with dict(x, i, sigma, sigma_hat, denoised), x as it was
    evaluated. disable: tqdm's; None hides the bar where there is no terminal.
    seeds: one per row; noise_sampler instead of seeds: your own noise, called once for each noise a step adds.
    cfg_pp: CFG++ (2406.08070): the method walks on the unconditional denoised U, and each step adds D - U of its first
    evaluation once, where D = U + lambda (C - U) and lambda is the model's cond_scale.

    ValueError for a bad schedule, shape, seed or option, and for NaN or Inf from the model (naming step and sigma);
    TypeError for things of the wrong kind, and for CFG++ with a model that has no `predict`.
    """
    check_latents(x)
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, sigma, **extra_args), got {type(model).__name__}")
    if extra_args is not None and not isinstance(extra_args, Mapping):
        raise TypeError(f"extra_args must be a dict of keyword arguments for the model, got {extra_args!r}")
    if seeds is not None and noise_sampler is not None:
        raise ValueError("give seeds or a noise_sampler, not both: a noise_sampler has seeds of its own")
    state, sigmas, start = _begin(x, sigmas, seeds, state)
    values = check_sigmas(sigmas, x.dtype)
    if cfg_pp:
        _check_cfg_pp(model, values, extra_args or {})
    steps = solver.steps(values)
    stop = len(steps) if stop is None else operator.index(stop)
    if not start < stop <= len(steps):
        raise ValueError(f"a run of {len(steps)} steps that starts before step {start} cannot stop before step {stop}")

    evals = solver.eval_sigmas(values)
    run = _Evaluations(model, dict(extra_args or {}), cfg_pp, callback, sigmas, frozenset(evals))
    planned = getattr(model, "planned", None)
    if planned is not None:
        distinct = torch.tensor(list(dict.fromkeys(evals)), dtype=x.dtype, device=x.device)
        run.extra_args = planned(distinct, run.extra_args)
    noise = _noise(solver, steps, x, sigmas, noise_sampler, state)

    history = {key: value.to(x.device) for key, value in state.items() if key not in RESERVED}
    progress = tqdm(total=len(steps), initial=start, disable=disable)
    with progress:
        for i in range(start, stop):
            run.begin(i, values[i])
            x, history = solver.step(steps[i], x, history, run, noise(i))
            if run.guidance is not None:
                x = x + run.guidance
            progress.update()
    run.raise_if_not_finite()
    kept = {key: value for key, value in state.items() if key in RESERVED}
    return x, {**kept, **history, "step": torch.tensor(stop)}


def check_latents(x: Tensor) -> None:
    """x is [B, C, h, w], float32 or float64, not empty and finite; TypeError or ValueError otherwise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor of latents [B, C, h, w], got {type(x).__name__}")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x must be latents [B, C, h, w], got shape {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64 (the network inside may be any dtype), got {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or Inf before the first step")


def check_sigmas(sigmas: Tensor, dtype: torch.dtype) -> list[float]:
    """The schedule as Python floats: 1-D, at least two values, finite, strictly monotone, positive save a last 0, and
    each within the range of `dtype`; TypeError or ValueError otherwise."""
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point():
        raise TypeError(f"sigmas must be a 1-D tensor of floats, got {sigmas!r}")
    if sigmas.ndim != 1:
        raise ValueError(f"sigmas must be 1-D, [steps + 1], got shape {list(sigmas.shape)}")
    values: list[float] = sigmas.tolist()
    if len(values) < 2:
        raise ValueError(f"sigmas must hold steps + 1 values, so at least 2 (one step), got {values}")
    for i, sigma in enumerate(values):
        if not math.isfinite(sigma) or sigma < 0:
            raise ValueError(f"sigmas must be finite and not negative, got sigmas[{i}] = {sigma}")
    if 0.0 in values[:-1]:
        raise ValueError(f"only the last sigma may be 0, got sigmas[{values.index(0.0)}] = 0")
    down = values[1] < values[0]
    for i in range(1, len(values)):
        if (values[i] < values[i - 1]) != down or values[i] == values[i - 1]:
            raise ValueError(
                "sigmas must be strictly decreasing (or strictly ascending, for inversion), "
                f"got {values[i - 1]:g}, {values[i]:g} at {i - 1}, {i}"
            )
    limits = torch.finfo(dtype)
    if min(value for value in values if value) < limits.tiny or max(values) > limits.max:
        raise ValueError(f"sigmas must be representable in x's dtype {dtype}, got {min(values):g} to {max(values):g}")
    return values


def _begin(
    x: Tensor, sigmas: Tensor | None, seeds: Sequence[int] | None, state: State | None
) -> tuple[State, Tensor, int]:
    """The run's state, its whole schedule, and the step it starts at."""
    if state is None:
        if sigmas is None:
            raise TypeError("sigmas is missing: a run starts from a schedule, or resumes from a state")
        state, start = ({"sigmas": sigmas.detach().clone()} if isinstance(sigmas, Tensor) else {}), 0
    else:
        if "sigmas" not in state or "step" not in state:
            raise ValueError(f"not a run's state: expected the keys 'sigmas' and 'step', got {sorted(state)}")
        if sigmas is not None:
            raise ValueError("a resumed run keeps its own schedule: pass sigmas=None together with state")
        if seeds is not None and "seeds" in state:
            raise ValueError("a resumed run keeps its own seeds: pass seeds=None together with state")
        state, sigmas, start = dict(state), state["sigmas"], int(state["step"])
    if seeds is not None:
        state["seeds"] = torch.tensor(check_seeds(seeds, len(x)))
    return state, sigmas, start


def _check_cfg_pp(model: Model, values: list[float], extra_args: Mapping[str, Any]) -> None:
    if not callable(getattr(model, "predict", None)):
        raise TypeError(
            f"CFG++ needs the unconditional denoised: a model with .predict(x, sigma, need_uncond=True, **extra_args), "
            f"such as CFGDenoiser; {type(model).__name__} has none"
        )
    if values[1] > values[0]:
        raise ValueError("CFG++ samples downwards: it has no form for an ascending schedule (inversion)")
    scale = extra_args.get("cond_scale")
    if isinstance(scale, (int, float)) and scale > 2:
        warnings.warn(
            f"with CFG++ cond_scale is lambda, usually 0 to 1; {scale:g} is above 2 (a plain guidance scale, perhaps?)",
            stacklevel=5,  # the caller of sample_*_cfg_pp
        )


def _noise(
    solver: Solver, steps: list[Step], x: Tensor, sigmas: Tensor, sampler: NoiseSampler | None, state: State
) -> Callable[[int], Noise]:
    """noise(i)(k): the k-th noise of step i, from the user's sampler or from a grid drawn here for the whole run.
    Seeds drawn here are put into `state`. Where no step adds noise, no random number is consumed."""
    pairs = [pair for step in steps for pair in step.noises]
    if sampler is None and pairs:
        if "seeds" not in state:
            if "step" in state:
                raise ValueError("the state holds no seeds: pass the noise_sampler the run began with, or seeds")
            state["seeds"] = torch.tensor(random_seeds(len(x)))
        grid = draw(solver.noise, x, check_seeds(state["seeds"], len(x)), pairs)

    offsets = list(accumulate((len(step.noises) for step in steps), initial=0))

    def of_step(i: int) -> Noise:
        def noise(k: int) -> Tensor:
            if sampler is None:
                return grid[offsets[i] + k]
            drawn = sampler(*(sigmas.new_full((), sigma) for sigma in steps[i].noises[k]))
            if drawn.shape != x.shape:
                raise ValueError(f"noise_sampler must return noise like x {list(x.shape)}, got {list(drawn.shape)}")
            return drawn

        return noise

    return of_step


class _Evaluations:
    """The model as a step sees it, evaluate(x, sigma); tells the callback, and remembers D - U for CFG++."""

    def __init__(
        self,
        model: Model,
        extra_args: dict[str, Any],
        cfg_pp: bool,
        callback: Callback | None,
        sigmas: Tensor,
        planned: frozenset[float],
    ) -> None:
        self.model, self.extra_args, self.cfg_pp = model, extra_args, cfg_pp
        self.callback, self.sigmas, self.planned = callback, sigmas, planned
        self.counts: list[tuple[int, float, Tensor]] = []  # (step, sigma, how many values are NaN or Inf)
        self.guidance: Tensor | None = None

    def begin(self, i: int, sigma: float) -> None:
        self.i, self.sigma, self.first, self.guidance = i, sigma, True, None

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        assert sigma in self.planned, f"evaluated at sigma {sigma}, which eval_sigmas does not list"
        sigma_in = x.new_full((len(x),), sigma)
        if self.cfg_pp:
            prediction = self.model.predict(x, sigma_in, need_uncond=True, **self.extra_args)  # type: ignore[attr-defined]
            denoised, used = prediction.denoised, prediction.uncond
        else:
            denoised = used = self.model(x, sigma_in, **self.extra_args)
        for what, value in (("denoised", denoised), ("uncond", used)):
            if not isinstance(value, Tensor) or value.shape != x.shape or value.dtype != x.dtype:
                got = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the model must return {what} like x, {list(x.shape)} {x.dtype}, got {got}")
        self.counts.append((self.i, sigma, torch.isfinite(denoised).logical_not().sum()))
        if self.first:
            self.first = False
            if self.cfg_pp:
                self.guidance = denoised - used
            if self.callback is not None:
                self.raise_if_not_finite()
                level = self.sigmas[self.i]
                hat = level if sigma == self.sigma else self.sigmas.new_full((), sigma)
                self.callback({"x": x, "i": self.i, "sigma": level, "sigma_hat": hat, "denoised": denoised})
        return used

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
