"""Runs in segments: between two steps x may change, and what a method remembers of the steps before is dropped."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ella_kd.samplers import Run, get_sampler, randn, without_history
from ella_kd.samplers.model import Bound, Callback, Model, bind
from ella_kd.samplers.noise import check_seeds, random_seeds
from ella_kd.samplers.registry import RANGE_SAMPLERS


@torch.no_grad()
def sample_in_segments(
    sampler: str,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    *,
    seeds: Sequence[int] | None = None,
    repeats: int = 1,
    jump: int = 1,
    fresh: Collection[int] = (),
    disable: bool | None = None,
) -> Tensor:
    """A sampler by name over a schedule, each step taken `repeats` times, with noise between that takes x back up.

    RePaint (Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1, jumps of one step): what is repainted around a kept
    part (`Keep`) then agrees better with it, for repeats times the evaluations. fresh: steps that begin without the
    history of the steps before, at first order, where the model has just become another one (`Unlock.changes`).
    With repeats 1 and nothing fresh it is the sampler itself, bit for bit. Noise is the seeds' own, other in each
    repeat. Raises ValueError for a sampler that is no `Solver` of steps, TypeError and ValueError as `sample` does.
    """
    row = get_sampler(sampler)
    if row.name in RANGE_SAMPLERS:
        raise ValueError(f"{row.name} finds its own steps, which cannot be repeated: choose another sampler")
    given = random_seeds(len(x)) if seeds is None else check_seeds(seeds, len(x))
    extra_args = dict(extra_args or {})

    def begin(x: Tensor, model: Any, **options: Any) -> Run:
        return Run(row.solver, model, x, extra_args=extra_args, callback=callback, cfg_pp=row.cfg_pp, **options)

    def fresh_at(i: int, own: Sequence[int]) -> dict[str, Tensor]:
        return {**without_history(run.state), "step": torch.tensor(i), "seeds": torch.tensor(own)}

    run = begin(x, model, sigmas=sigmas, seeds=given)
    once = _BoundOnce(bind(model, x, tuple(sigmas.tolist()), row.cfg_pp, extra_args))
    with run.bar(disable) as progress:
        for first in range(0, run.total, jump):
            steps = range(first, min(first + jump, run.total))
            for repeat in range(repeats):
                if repeat:  # back up to the level at which these steps began
                    up = (sigmas[first].double() ** 2 - sigmas[steps[-1] + 1].double() ** 2).sqrt().to(run.x)
                    x = run.x + up * randn(run.x.shape, _other(given, 2 * repeat, first)).to(run.x)
                    run = begin(x, once, state=fresh_at(first, _other(given, 2 * repeat + 1, 0)))
                for i in steps:
                    if i in fresh and not (repeat and i == first):
                        run = begin(run.x, once, state=fresh_at(i, run.state["seeds"].tolist()))
                    run.advance()
                    progress.update(repeat == 0)
    return run.x


class _BoundOnce:
    """A model that is bound already."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound

    def bind(self, x: Tensor, sigmas: Any, **_: Any) -> Bound:
        return self.bound

    def __call__(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        return self.bound(x, tuple(sigma.tolist())).denoised


def _other(seeds: Sequence[int], stream: int, i: int) -> list[int]:
    """Seeds of another stream, made of these."""
    words = (np.random.SeedSequence([seed, 2, stream, i]).generate_state(1, np.uint64)[0] for seed in seeds)
    return [int(word) >> 1 for word in words]
