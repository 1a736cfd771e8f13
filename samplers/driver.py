"""The one loop every sampler runs in: validation, planning, progress bar, callback, noise, CFG++, pause and resume.

The loop itself never waits for the device: every number it needs is a Python float beforehand, the noise is uploaded
once, and NaN or Inf from the model is counted on the device and read when a callback runs and at the end.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ella_kd.samplers.cfg_pp import CFGpp
from ella_kd.samplers.checks import check_latents, check_sigmas
from ella_kd.samplers.model import (
    Bound,
    Callback,
    Model,
    NoiseSampler,
    Record,
    bind,
    check_answer,
    digests,
    memory,
    rounded,
)
from ella_kd.samplers.noise import noise_of_steps
from ella_kd.samplers.solver import Solver, State, Step
from ella_kd.samplers.state import GIVEN, RESERVED, REUSED, begin, check_given, given, save_run, without_history


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run: `x` and `state` are those after the last whole step, from which it resumes bit for bit."""

    def __init__(self, x: Tensor, state: State, steps: int) -> None:
        super().__init__(f"interrupted after {int(state['step'])} of {steps} steps; .x and .state resume the run")
        self.x, self.state = x, state


class Run(Iterator[Record]):
    """A run of a sampling method as an iterator: each `next` takes one step and gives its record.

    The record: x before the step (as it was evaluated), i, sigma, sigma_hat, denoised, nfe (evaluations so far, the
    step's own included); with CFG++ also lam and w. `run.x` is x after the step and `run.state` what goes with it, to
    save, to resume, or to branch into another run. Arguments and errors are those of `sample`. An exception inside a
    step, KeyboardInterrupt too, leaves the run where it was before that step: it can be iterated further.
    """

    @torch.no_grad()
    def __init__(
        self,
        solver: Solver,
        model: Model | CFGpp,
        x: Tensor,
        sigmas: Tensor | None = None,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        *,
        seeds: Sequence[int] | None = None,
        noise_sampler: NoiseSampler | None = None,
        cfg_pp: bool = False,
        state: State | None = None,
        stop: int | None = None,
    ) -> None:
        check_latents(x)
        guidance = model if isinstance(model, CFGpp) else CFGpp(model) if cfg_pp else None
        model = model.model if isinstance(model, CFGpp) else model
        if extra_args is not None and not isinstance(extra_args, Mapping):
            raise TypeError(f"extra_args must be a dict of keyword arguments for the model, got {extra_args!r}")
        if seeds is not None and noise_sampler is not None:
            raise ValueError("give seeds or a noise_sampler, not both: a noise_sampler has seeds of its own")
        self._kept, sigmas, start = begin(solver, x, sigmas, seeds, state)
        values = check_sigmas(sigmas, x.dtype)
        self._solver, self._steps = solver, solver.steps(values)
        self.stop = len(self._steps) if stop is None else operator.index(stop)
        if not start < self.stop <= len(self._steps):
            raise ValueError(
                f"a run of {len(self._steps)} steps that starts before step {start} "
                f"cannot stop before step {self.stop}"
            )
        lambdas = None if guidance is None else guidance.lambdas(values, self._steps, extra_args or {})
        levels = {sigma: rounded(sigma, x.dtype) for step in self._steps for sigma in step.evals}
        bound = bind(model, x, tuple(dict.fromkeys(levels.values())), guidance is not None, extra_args)
        if GIVEN in self._kept:
            check_given(self._kept, digests(bound))
        self._evaluate = Evaluations(bound, levels, guidance, lambdas, callback, sigmas, values, self._steps)
        self._sigmas = sigmas
        self._noise = noise_of_steps(solver, self._steps, x, sigmas, noise_sampler, self._kept)
        history = {key: value.to(x.device) for key, value in self._kept.items() if key not in RESERVED}
        reused = {key.removeprefix(REUSED): history.pop(key) for key in list(history) if key.startswith(REUSED)}
        if memory(bound) is not None:
            bound.resume(reused)  # type: ignore[attr-defined]
        elif reused:
            raise ValueError("the state holds what its model reuses of earlier steps: resume with that model, or go on "
                             "with this one from state=without_history(state)")
        self._kept = without_history(self._kept)
        # One assignment, so that an interrupt leaves the old step or the new one.
        self._at = start, x, history, memory(bound)

    @property
    def step(self) -> int:
        """How many steps of the schedule are done."""
        return self._at[0]

    @property
    def total(self) -> int:
        """How many steps the schedule has."""
        return len(self._steps)

    @property
    def x(self) -> Tensor:
        """x after the last whole step."""
        return self._at[1]

    @property
    def state(self) -> State:
        """A flat dict of tensors from which `sample` or a new Run goes on, together with `x`."""
        now = {GIVEN: given(digests(self._evaluate.bound)), "step": torch.tensor(self._at[0])}
        return {**self._kept, **self._at[2], **self._reused(), **now}

    def _reused(self) -> State:
        bound: Any = self._evaluate.bound
        if memory(bound) is None:
            return {}
        bound.memory = self._at[3]
        return {REUSED + key: value for key, value in bound.saved().items()}

    def save(self, path: str | Path) -> None:
        """Writes x and the state to a safetensors file, from which `load_run` brings them back."""
        self._evaluate.raise_if_not_finite()
        save_run(path, self.x, self.state)

    def __len__(self) -> int:
        """How many steps are left."""
        return self.stop - self.step

    @torch.no_grad()
    def __next__(self) -> Record:
        if self.step >= self.stop:
            raise StopIteration
        self.advance()
        return self._evaluate.record()

    def go_on_from(self, step: int, x: Tensor, noise_sampler: NoiseSampler | None = None) -> None:
        """Begins anew at a step with x, without what the method remembers of the steps before; noise_sampler: in place
        of the run's noise from now on. What the model keeps of its evaluations stays."""
        if noise_sampler is not None:
            self._noise = noise_of_steps(self._solver, self._steps, x, self._sigmas, noise_sampler, self._kept)
        self._at = step, x, {}, self._at[3]

    def advance(self, steps: int = 1, progress: tqdm | None = None) -> None:
        """Takes so many steps. Reads the counts of NaN and Inf at the last one; ValueError names the first."""
        for _ in range(steps):
            i, x, history, kept = self._at
            if kept is not None:  # of the whole steps: one that was interrupted leaves nothing
                self._evaluate.bound.memory = kept  # type: ignore[attr-defined]
            self._evaluate.begin(i)
            x, history = self._solver.step(self._steps[i], x, history, self._evaluate, self._noise(i))
            if self._evaluate.guidance is not None:
                x = x + self._evaluate.guidance
            if i + 1 == self.stop:
                self._evaluate.raise_if_not_finite()
            self._at = i + 1, x, history, memory(self._evaluate.bound)
            if progress is not None:
                progress.update()

    @contextmanager
    def bar(self, disable: bool | None) -> Iterator[tqdm]:
        """A bar of the run's steps; Ctrl-C within becomes `Interrupted`."""
        with tqdm(total=self.total, initial=self.step, disable=disable, leave=None) as progress:
            try:
                yield progress
            except KeyboardInterrupt as error:
                raise Interrupted(self.x, self.state, self.total) from error


@torch.no_grad()
def sample(
    solver: Solver,
    model: Model | CFGpp,
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
    callback: called in each step after its first evaluation with dict(x, i, sigma, sigma_hat, denoised, nfe), x as it
    was evaluated, nfe the evaluations so far; with CFG++ also lam and w, the step's lambda and the scale of plain
    guidance that a first-order step makes of it (None where cond_scale is not a number).
    disable: tqdm's; None hides the bar where there is no terminal.
    seeds: one per row; noise_sampler instead of seeds: your own noise, called once for each noise a step adds.
    cfg_pp: CFG++ (2406.08070): the method walks on the unconditional denoised U, and each step adds D - U of its first
    evaluation once, where D = U + lambda (C - U) and lambda is the model's cond_scale; the same as model=CFGpp(model),
    which also has other scales. Ctrl-C raises `Interrupted`, a KeyboardInterrupt that carries x and the state.

    ValueError for a bad schedule, shape, seed or option, and for NaN or Inf from the model (naming step and sigma);
    TypeError for things of the wrong kind, and for CFG++ with a model that has no `predict`.
    """
    run = Run(
        solver,
        model,
        x,
        sigmas,
        extra_args,
        callback,
        seeds=seeds,
        noise_sampler=noise_sampler,
        cfg_pp=cfg_pp,
        state=state,
        stop=stop,
    )
    with run.bar(disable) as progress:
        run.advance(len(run), progress)
    return run.x, run.state


@torch.no_grad()
def walk(
    solver: Solver, model: Model | CFGpp, x: Tensor, sigmas: Tensor, extra_args: Mapping[str, Any] | None,
    callback: Callback | None, disable: bool | None, seeds: Sequence[int] | None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """x at the end of the whole schedule: what every `sample_NAME` returns."""
    run = Run(solver, model, x, sigmas, extra_args, callback, seeds=seeds, noise_sampler=noise_sampler)
    with run.bar(disable) as progress:
        run.advance(len(run), progress)
    return run.x


class Evaluations:
    """evaluate(x, sigma) of a run; tells the callback, and remembers D - U of each step's first for CFG++.

    levels: the sigmas of all evaluations, each as x's dtype rounds it."""

    def __init__(
        self,
        bound: Bound,
        levels: Mapping[float, float],
        cfg_pp: CFGpp | None,
        lambdas: list[tuple[float, float]] | None,
        callback: Callback | None,
        sigmas: Tensor,
        values: Sequence[float],
        steps: Sequence[Step],
    ) -> None:
        self.bound, self.levels, self.cfg_pp, self.lambdas = bound, levels, cfg_pp, lambdas
        self.callback, self.sigmas, self.values, self.steps = callback, sigmas, values, steps
        self.before = list(accumulate((len(step.evals) for step in steps), initial=0))
        self.counts: list[tuple[int, float, Tensor]] = []  # (step, sigma, how many values are NaN or Inf)
        self.guidance: Tensor | None = None

    def begin(self, i: int) -> None:
        """Starts step i."""
        self.i, self.calls, self.guidance = i, 0, None
        rescaled = self.cfg_pp is not None and self.cfg_pp.scale != "lam"
        self.scale = self.lambdas[i][0] if rescaled and self.lambdas is not None else None

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
