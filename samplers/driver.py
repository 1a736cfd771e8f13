"""The one loop every sampler runs in: validation, planning, progress bar, callback, noise, CFG++, pause and resume.

The loop itself never waits for the device: every number it needs is a Python float beforehand, the noise is uploaded
once, and NaN or Inf from the model is counted on the device and read when a callback runs and at the end.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ella_kd.samplers.cfg_pp import CFGpp
from ella_kd.samplers.checks import check_latents, check_sigmas
from ella_kd.samplers.evaluations import Evaluations
from ella_kd.samplers.model import Callback, Model, NoiseSampler, Record, bind
from ella_kd.samplers.noise import check_seeds, noise_grid, random_seeds
from ella_kd.samplers.saving import save_run
from ella_kd.samplers.solver import Noise, Solver, State, Step

RESERVED = ("sigmas", "step", "seeds", "like", "solver")  # the driver's own keys of a state; the rest is history

__all__ = [
    "Callback",
    "Interrupted",
    "Model",
    "NoiseSampler",
    "Record",
    "Run",
    "check_latents",
    "check_sigmas",
    "sample",
]


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
        self._kept, sigmas, start = _begin(solver, x, sigmas, seeds, state)
        values = check_sigmas(sigmas, x.dtype)
        self._solver, self._steps = solver, solver.steps(values)
        self.stop = len(self._steps) if stop is None else operator.index(stop)
        if not start < self.stop <= len(self._steps):
            raise ValueError(
                f"a run of {len(self._steps)} steps that starts before step {start} "
                f"cannot stop before step {self.stop}"
            )
        lambdas = None if guidance is None else guidance.lambdas(values, self._steps, extra_args or {})
        evals = tuple(dict.fromkeys(sigma for step in self._steps for sigma in step.evals))
        bound = bind(model, x, evals, guidance is not None, extra_args)
        self._evaluate = Evaluations(bound, guidance, lambdas, callback, sigmas, values, self._steps, x.dtype)
        self._noise = _noise(solver, self._steps, x, sigmas, noise_sampler, self._kept)
        history = {key: value.to(x.device) for key, value in self._kept.items() if key not in RESERVED}
        self._kept = {key: value for key, value in self._kept.items() if key in RESERVED}
        self._at = start, x, history  # one assignment, so that an interrupt leaves the old step or the new one

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
        return {**self._kept, **self._at[2], "step": torch.tensor(self._at[0])}

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

    def advance(self) -> None:
        """Takes one step. Reads the counts of NaN and Inf at the last one; ValueError names the first."""
        i, x, history = self._at
        self._evaluate.begin(i)
        x, history = self._solver.step(self._steps[i], x, history, self._evaluate, self._noise(i))
        if self._evaluate.guidance is not None:
            x = x + self._evaluate.guidance
        if i + 1 == self.stop:
            self._evaluate.raise_if_not_finite()
        self._at = i + 1, x, history


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
    with tqdm(total=run.total, initial=run.step, disable=disable) as progress:
        try:
            while run.step < run.stop:
                run.advance()
                progress.update()
        except KeyboardInterrupt as error:
            raise Interrupted(run.x, run.state, run.total) from error
    return run.x, run.state


def _begin(
    solver: Solver, x: Tensor, sigmas: Tensor | None, seeds: Sequence[int] | None, state: State | None
) -> tuple[State, Tensor, int]:
    """The run's state, its whole schedule, and the step it starts at."""
    name = re.sub(r" at 0x[0-9a-f]+", "", repr(solver))  # of a function the address, another in every process
    own = {"like": x.new_empty((0, *x.shape)), "solver": torch.tensor(list(name.encode()), dtype=torch.uint8)}
    if state is None:
        if sigmas is None:
            raise TypeError("sigmas is missing: a run starts from a schedule, or resumes from a state")
        state, start = ({"sigmas": sigmas.detach().clone(), **own} if isinstance(sigmas, Tensor) else {}), 0
    else:
        if "sigmas" not in state or "step" not in state:
            raise ValueError(f"not a run's state: expected the keys 'sigmas' and 'step', got {sorted(state)}")
        if sigmas is not None:
            raise ValueError("a resumed run keeps its own schedule: pass sigmas=None together with state")
        if seeds is not None and "seeds" in state:
            raise ValueError("a resumed run keeps its own seeds: pass seeds=None together with state")
        _check_resumed(state, own)
        state, sigmas, start = {**state, **own}, state["sigmas"], int(state["step"])
    if seeds is not None:
        state["seeds"] = torch.tensor(check_seeds(seeds, len(x)))
    return state, sigmas, start


def without_history(state: State) -> State:
    """A run's state as another method can take it over: schedule, step and seeds, as after a first step."""
    return {key: value for key, value in state.items() if key in RESERVED}


def _check_resumed(state: State, own: State) -> None:
    """Raises ValueError for x or a method that is not what the state was made with."""
    before, now = state.get("like", own["like"]), own["like"]
    if before.shape != now.shape or before.dtype != now.dtype:
        raise ValueError(
            f"the state is of a run with x {list(before.shape[1:])} {before.dtype}, got x {list(now.shape[1:])} "
            f"{now.dtype}: resume with the x that came with it"
        )
    if state["step"].numel() != 1 or int(state["step"]) < 0:
        raise ValueError(f"a state's step counts the steps done, 0 or more, got {state['step'].tolist()}")
    begun, solver = (bytes(s.get("solver", own["solver"]).tolist()).decode() for s in (state, own))
    history = sorted(state.keys() - set(RESERVED))
    if history and begun != solver:
        raise ValueError(
            f"the state holds the history ({', '.join(history)}) of {begun}, got {solver}: resume with the same "
            "method, or go on with another from state=without_history(state)"
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
        grid = noise_grid(solver.noise, x, check_seeds(state["seeds"], len(x)), pairs)

    offsets = list(accumulate((len(step.noises) for step in steps), initial=0))

    def of_step(i: int) -> Noise:
        def noise(k: int) -> Tensor:
            if sampler is None:
                return grid[offsets[i] + k]
            drawn = sampler(*(sigmas.new_full((), sigma) for sigma in steps[i].noises[k]))
            if drawn.shape != x.shape:
                raise ValueError(f"noise_sampler must return noise like x {list(x.shape)}, got {list(drawn.shape)}")
            return drawn.to(x)

        return noise

    return of_step
