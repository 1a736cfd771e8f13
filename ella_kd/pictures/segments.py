"""Runs in segments: between two steps x may change, and what a method remembers of the steps before is dropped."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ella_kd.samplers import Run, get_sampler, randn
from ella_kd.samplers.model import Callback, Model
from ella_kd.samplers.noise import NOISES, check_seeds, random_seeds
from ella_kd.samplers.registry import RANGE_SAMPLERS


@torch.no_grad()
def sample_in_segments(
    sampler: str,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    seeds: Sequence[int] | None = None,
    repeats: int = 1,
    jump: int = 1,
    within: tuple[float, float] | None = None,
    fresh: Collection[int] = (),
    before: Callable[[int, Tensor], Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """A sampler by name over a schedule, every `jump` steps taken `repeats` times, with noise between that takes x
    back up.

    RePaint (Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1): what is repainted around a kept part (`Keep`) then
    agrees better with it, for repeats times the evaluations. within: no more of them, but all spent on the steps that
    begin between two sigmas. Of a Gaussian field of unit variance a repeat below sigma .2 moves next to nothing, and
    what one above 2 moves is forgotten again: 5 repeats within (.2, 2) do as much as 10 everywhere. fresh: steps that
    begin without what the method remembers of the steps before, at first order, because the model has just become
    another one (`Unlock.changes`). before(i, x): what x becomes before step i, which then begins without history too.
    options: the method's own (eta, s_noise, s_churn). With repeats 1 and nothing fresh it is the sampler itself, bit
    for bit; the noise of each repeat is the seeds' own.
    Raises ValueError for a sampler that finds its own steps and where no step lies within, TypeError and ValueError as
    `sample` does.
    """
    row = get_sampler(sampler)
    if row.name in RANGE_SAMPLERS:
        raise ValueError(f"{row.name} finds its own steps, which cannot be repeated: choose another sampler")
    if not (repeats >= 1 and jump >= 1):
        raise ValueError(f"repeats and jump are whole numbers of at least 1, got {repeats} and {jump}")
    given = random_seeds(len(x)) if seeds is None else check_seeds(seeds, len(x))
    solver, noises = replace(row.solver, **options), NOISES[row.noise or "normal"]
    run = Run(solver, row.walked(model), x, sigmas, extra_args, callback, seeds=given)
    with tqdm(total=run.total, disable=disable, leave=None) as progress:
        for first, last, times in _segments(sigmas.tolist(), repeats, jump, within):
            for repeat in range(times):
                if repeat:  # back up to the level at which these steps began
                    up = math.sqrt(float(sigmas[first]) ** 2 - float(sigmas[last]) ** 2)
                    noise = randn(x.shape, other_seeds(given, 2 * repeat, first)).to(x)
                    run.go_on_from(first, run.x + up * noise, noises(x, other_seeds(given, 2 * repeat + 1, first)))
                for i in range(first, last):
                    if before is not None:
                        run.go_on_from(i, before(i, run.x))
                    elif i in fresh and not (repeat and i == first):
                        run.go_on_from(i, run.x)
                    run.advance()
                    progress.update(not repeat)
    return run.x


def _segments(sigmas: Sequence[float], repeats: int, jump: int,
              within: tuple[float, float] | None) -> list[tuple[int, int, int]]:
    """First and last step of each segment, and how often it is taken: repeats times all steps together, at most."""
    total = len(sigmas) - 1
    bounds = [(first, min(first + jump, total)) for first in range(0, total, jump)]
    if within is None or repeats == 1:
        return [(first, last, repeats) for first, last in bounds]
    low, high = within
    chosen = [(first, last) for first, last in bounds if low <= sigmas[first] <= high]
    inside = sum(last - first for first, last in chosen)
    if not inside:
        raise ValueError(f"no step begins within sigma {low:g} to {high:g}: there is nothing to repeat")
    times = (repeats * total - (total - inside)) // inside
    return [(*segment, times if segment in chosen else 1) for segment in bounds]


def other_seeds(seeds: Sequence[int], stream: int, i: int) -> list[int]:
    """Seeds of another stream, made of these."""
    words = (np.random.SeedSequence([seed, 2, stream, i]).generate_state(1, np.uint64)[0] for seed in seeds)
    return [int(word) >> 1 for word in words]
