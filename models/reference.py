"""Reference-only (Zhang 2023, Mikubill/sd-webui-controlnet discussion 1236): self-attention sees another picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from ella_kd.models.blocks import Attention
from ella_kd.models.context import Context
from ella_kd.models.network import Patches
from ella_kd.models.partial import ForRows, rows_of
from ella_kd.models.patches import SelfAttentionPatch, Several


@dataclass(frozen=True, eq=False)
class Reference(ForRows):
    """Another picture that some rows of a context look at.

    latents [n, C, h, w]: one per row, of any size, at the noise level of the call and times c_in, as x is. strengths:
    how much of the answer with the picture a row takes; the rest is of the answer without.
    """

    columns: ClassVar[tuple[str, ...]] = ("strengths", "latents")
    latents: Tensor

    @property
    def key(self) -> Any:
        return *super().key, *self.latents.shape[1:]


@dataclass(frozen=True, eq=False)
class _Keep(SelfAttentionPatch):
    """Keeps what each self-attention looks at, normalised, and changes nothing; made for one call."""

    places: tuple[str, ...]
    kept: list[tuple[Attention, Tensor]] = field(default_factory=list)

    def attention(self, attn: Attention, x: Tensor, size: tuple[int, int]) -> Tensor:
        self.kept.append((attn, x))
        return attn(x, x)


@dataclass(frozen=True, eq=False)
class _Beside(SelfAttentionPatch):
    """Rows look at their own pixels and at those kept for the reference's rows; weights [n, 1, 1], None for all 1."""

    places: tuple[str, ...]
    keep: _Keep
    rows: tuple[int, ...]
    weights: Tensor | None

    def attention(self, attn: Attention, x: Tensor, size: tuple[int, int]) -> Tensor:
        others = next(kept for module, kept in self.keep.kept if module is attn)
        seen = attn(x, torch.cat([x, rows_of(others, self.rows)], 1))
        return seen if self.weights is None else torch.lerp(attn(x, x), seen, self.weights)


def beside_references(unet: Any, t: Tensor, seen: Context, patches: Patches, changes: Sequence[Any] = ()) -> Patches:
    """The patches of a call whose rows look at the context's references too, which the UNet sees first.

    It sees them with the tokens and channels of their rows, at their t, and without controls. A row's own patch holds
    where it names a place. Raises ValueError for a row with two references.
    """
    places, plain = unet.places, replace(seen, references=None, controls=None)
    beside: dict[int, tuple[_Keep, int, float]] = {}
    for reference in seen.references or ():
        keep, rows = _Keep(places), reference.rows
        latents = reference.latents.to(unet.dtype)
        unet(latents, rows_of(t, rows), plain.take(rows), [(len(rows), keep)], changes)
        if beside.keys() & set(rows):
            raise ValueError("a row looks at one reference, and here at two: give them to different prompts, or put "
                             "both pictures side by side")
        beside |= {row: (keep, i, weight) for i, (row, weight) in enumerate(zip(rows, reference.strengths))}
    own = [patch for n, patch in patches or [(len(t), None)] for _ in range(n)]

    def alike(row: int) -> tuple[int, int]:
        return id(own[row]), id(beside[row][0]) if row in beside else 0

    found: list[tuple[int, Any]] = []
    for _, group in groupby(range(len(own)), alike):
        several = list(group)
        first = own[several[0]]
        if several[0] in beside:
            keep, (numbers, weights) = beside[several[0]][0], zip(*(beside[row][1:] for row in several))
            factors = None if set(weights) == {1.0} else torch.tensor(weights, dtype=unet.dtype, device=t.device)
            looks = _Beside(places, keep, numbers, None if factors is None else factors[:, None, None])
            found.append((len(several), looks if first is None else Several((first, looks))))
        else:
            found.append((len(several), first))
    return found
