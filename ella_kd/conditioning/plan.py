"""A run's timesteps evaluated beforehand: one connector call for all of them, and lookups in the loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ella_kd.conditioning.base import ELLA, Conditioning, Context, to_batch
from ella_kd.conditioning.compose import Composition
from ella_kd.models.tokens import pile
from ella_kd.models.tsc import TSC

T = TypeVar("T", Conditioning, Composition, Conditioning | Composition)


@dataclass(frozen=True, eq=False)
class Planned(Conditioning):
    """An ELLA prompt at the timesteps of a run, already evaluated; made by `planned`.

    timesteps [N] fp32, table [N, P, L, D], prompts [rows]. A t is found by exact equality, never as its neighbour. One
    that was not planned is a ValueError on the CPU, and NaN tokens on a device, where telling would stall the loop.
    """

    timesteps: Tensor
    table: Tensor
    prompts: Tensor

    @property
    def rows(self) -> int:
        return len(self.prompts)

    def __call__(self, t: Tensor) -> Context:
        if t.device.type == "cpu":
            self.check_covers(t)
        hit = t[:, None] == self.timesteps  # [B, N]
        tokens = self.table[hit.int().argmax(1), to_batch(self.prompts, len(t))]
        return Context(torch.where(hit.any(1)[:, None, None], tokens, torch.nan))

    def check_covers(self, timesteps: Tensor) -> None:
        """Raises ValueError if one of timesteps [N] was not planned. Waits for the device: before the loop only."""
        missing = timesteps[~(timesteps[:, None] == self.timesteps).any(1)]
        if len(missing):
            raise ValueError(f"this conditioning was planned for other timesteps: it lacks {len(missing)} of "
                             f"{len(timesteps)}, first {missing[0].item():g}; plan the unplanned one for this run")

    def repeat(self, n: int) -> "Planned":
        return Planned(self.timesteps, self.table, self.prompts.repeat_interleave(n))


def plan(conditionings: Sequence[T], timesteps: Tensor) -> list[T]:
    """Each conditioning, evaluated at timesteps [N] fp32 in one batched call per connector, then only looked up.

    Prompts of all the conditionings that share a connector go into the same call: N times their number of rows.
    Raises ValueError for a conditioning that was planned before, for other timesteps.
    """
    timesteps = timesteps.unique()
    prompts: dict[TSC, list[ELLA]] = {}
    for leaf in dict.fromkeys(leaf for conditioning in conditionings for leaf in conditioning.leaves()):
        if isinstance(leaf, ELLA):
            prompts.setdefault(leaf.tsc, []).append(leaf)
    planned: dict[Conditioning, Conditioning] = {}
    for tsc, leaves in prompts.items():
        tokens, mask = pile([leaf.features for leaf in leaves])
        n, p = len(timesteps), len(tokens)
        table = tsc(tokens.repeat(n, 1, 1), timesteps.repeat_interleave(p), None if mask is None else mask.repeat(n, 1))
        tables = table.unflatten(0, (n, p)).split([len(leaf.features.tokens) for leaf in leaves], 1)
        planned |= {leaf: Planned(timesteps, part, leaf.prompts) for leaf, part in zip(leaves, tables, strict=True)}

    def of(leaf: Conditioning) -> Conditioning:
        if isinstance(leaf, Planned):
            leaf.check_covers(timesteps)
        return planned.get(leaf, leaf)

    return [conditioning.map_leaves(of) for conditioning in conditionings]
