"""Noise, seeded per sample: row k depends on its own seed and never on its batch mates.

Everything is drawn on the CPU in float32 and then converted, so that it is the same for any device and dtype. The three
streams of one seed (initial noise, `NormalNoise`, `BrownianNoise`) are independent: a sampler that began from the same
generator as the initial latents would add those very numbers again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import cast

import numpy as np
import torch
import torchsde
from torch import Tensor

from ella_kd.samplers.model import NoiseSampler
from ella_kd.samplers.solver import Noise, Solver, State, Step

_BROWNIAN_RANGE = 14.0  # in log sigma: sigmas from 8e-7 to 1.2e6
_BROWNIAN_DIGITS = 6  # the tree resolves log sigma to 1e-6


def check_seeds(seeds: Sequence[int] | Tensor, rows: int) -> list[int]:
    """`seeds` as a list of `rows` integers in [0, 2^63); TypeError or ValueError otherwise."""
    if isinstance(seeds, Tensor):
        seeds = seeds.tolist()
    try:
        values = [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise TypeError(f"seeds must be a sequence of {rows} integers, one per row, got {seeds!r}") from error
    if len(values) != rows:
        raise ValueError(f"seeds must name one seed per row: expected {rows}, got {len(values)}")
    if not all(0 <= seed < 2**63 for seed in values):
        raise ValueError(f"seeds must lie in [0, 2^63), got {values}")
    return values


def random_seeds(rows: int) -> list[int]:
    """One seed per row from torch's global generator, so that torch.manual_seed reproduces a run."""
    return cast(list[int], torch.randint(0, 2**63 - 1, (rows,)).tolist())


def randn(
    shape: Sequence[int],
    seeds: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Initial noise [B, ...] of unit variance, one seed per row; multiply it by sigmas[0].

    Row k is torch.randn(shape[1:], generator=torch.Generator().manual_seed(seeds[k])), as in most of the field (of a
    seed torch's CPU generator uses the low 32 bits). Without seeds, one per row comes from torch's global generator.
    """
    rows, *rest = shape
    values = random_seeds(rows) if seeds is None else check_seeds(seeds, rows)
    noise = [torch.randn(rest, dtype=torch.float32, generator=torch.Generator().manual_seed(seed)) for seed in values]
    return torch.stack(noise).to(device, dtype)


class NormalNoise:
    """A noise sampler, (sigma, sigma_next) -> noise like x: each call draws anew, per row from its own generator."""

    def __init__(self, x: Tensor, seeds: Sequence[int]) -> None:
        self.like = x
        words = [np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64) for seed in check_seeds(seeds, len(x))]
        self.generators = [torch.Generator().manual_seed(int(word[0])) for word in words]

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        rows = [torch.randn(self.like.shape[1:], dtype=torch.float32, generator=g) for g in self.generators]
        return torch.stack(rows).to(self.like)


class BrownianNoise:
    """A noise sampler, (sigma, sigma_next) -> noise like x: the normalised increment of one Brownian path per row.

    The path runs over log sigma in a fixed range and depends on its seed alone, so a run of 10 steps, one of 50 and a
    partial one see the same path. Raises ValueError outside sigma 8e-7 to 1.2e6, and for sigmas closer than 1e-6.
    """

    def __init__(self, x: Tensor, seeds: Sequence[int]) -> None:
        self.like = x
        start = torch.zeros(x.shape[1:], dtype=torch.float32)
        self.trees = [
            torchsde.BrownianTree(-_BROWNIAN_RANGE, start, _BROWNIAN_RANGE, entropy=seed)
            for seed in check_seeds(seeds, len(x))
        ]

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        # Rounded here as the tree rounds, so that the increment is divided by the length it really has.
        a, b = (round(math.log(float(value)), _BROWNIAN_DIGITS) for value in (sigma, sigma_next))
        if a == b or max(abs(a), abs(b)) > _BROWNIAN_RANGE:
            raise ValueError(f"no Brownian increment from sigma {float(sigma)} to {float(sigma_next)}")
        increments = torch.stack([tree(min(a, b), max(a, b)) for tree in self.trees])
        return (increments * (math.copysign(1.0, a - b) / math.sqrt(abs(a - b)))).to(self.like)


NOISES: dict[str, type[NormalNoise] | type[BrownianNoise]] = {"normal": NormalNoise, "brownian": BrownianNoise}


def noise_grid(kind: str, x: Tensor, seeds: Sequence[int], pairs: Sequence[tuple[float, float]]) -> Tensor:
    """The noise of a whole run, [len(pairs), B, C, h, w] like x: drawn on the CPU and uploaded once."""
    sampler = NOISES[kind](torch.empty(x.shape, dtype=torch.float32), seeds)
    return torch.stack([sampler(s, t) for s, t in pairs]).to(x)


def like(x: Tensor, drawn: Tensor) -> Tensor:
    """What a noise_sampler returned, in x's dtype. Raises ValueError for another shape."""
    if drawn.shape != x.shape:
        raise ValueError(f"noise_sampler must return noise like x {list(x.shape)}, got {list(drawn.shape)}")
    return drawn.to(x)


def noise_of_steps(
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
            return like(x, sampler(*(sigmas.new_full((), sigma) for sigma in steps[i].noises[k])))

        return noise

    return of_step
