"""Inputs that some rows of a call have and others have not, and the algebra of their rows, known to the host."""

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ella_kd.models.devices import upload

Box = tuple[int, int, int, int]
"""A part of a picture in latents: top, left, height, width."""


@dataclass(frozen=True, eq=False)
class ForRows(ABC):
    """What these rows of a context have: a ControlNet's picture, an image prompt.

    rows: their numbers. strengths: how much it counts in each, a tuple of numbers. columns: the fields with an entry
    per row: a tuple, a tensor or a Context; None for none. What agrees in all other fields, and in which columns are
    None, is joined where contexts are stacked: it is one call.
    """

    columns: ClassVar[tuple[str, ...]] = ("strengths",)
    rows: tuple[int, ...]
    strengths: Any

    def weighed(self, factor: float) -> Self:
        """The same, `factor` times as strong."""
        return replace(self, strengths=tuple(factor * strength for strength in self.strengths))

    @property
    def key(self) -> tuple[Any, ...]:
        """What those that go together have in common."""
        shared = (getattr(self, own.name) for own in fields(self) if own.name not in ("rows", *self.columns))
        return type(self), *shared, *(getattr(self, name) is None for name in self.columns)

    def crop(self, box: Box, canvas: tuple[int, int]) -> Self:
        """The same for a part of the picture; canvas: height and width of the whole, in latents."""
        return self

    def taken(self, rows: Sequence[int]) -> Self | None:
        """The same for a context of these rows; None if it has none of them."""
        own = {row: i for i, row in enumerate(self.rows)}
        found = [(new, own[row]) for new, row in enumerate(rows) if row in own]
        if not found:
            return None
        picked = {name: _pick(getattr(self, name), [i for _, i in found]) for name in self.columns}
        return replace(self, rows=tuple(new for new, _ in found), **picked)


def take(some: Sequence[ForRows], rows: Sequence[int]) -> tuple[ForRows, ...] | None:
    """Of the inputs of a context those of these rows."""
    return tuple(new for each in some if (new := each.taken(rows)) is not None) or None


def join(several: Sequence[Sequence[ForRows] | None], starts: Sequence[int]) -> tuple[ForRows, ...] | None:
    """The inputs of several contexts whose rows start here; those of one key and of different rows become one."""
    found: list[ForRows] = []
    for some, start in zip(several, starts, strict=True):
        for each in some or ():
            new = replace(each, rows=tuple(start + row for row in each.rows))
            for i, old in enumerate(found):
                if old.key == new.key and not set(old.rows) & set(new.rows):
                    columns = {name: _join(getattr(old, name), getattr(new, name)) for name in new.columns}
                    found[i] = replace(old, rows=old.rows + new.rows, **columns)
                    break
            else:
                found.append(new)
    return tuple(found) or None


def rows_of(x: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows of x [B, ...]: a view where they follow one another, else a copy; nothing waits for the device."""
    if list(rows) == list(range(len(x))):
        return x
    parts = runs(rows)
    if len(parts) > 8:
        return x[upload(torch.tensor(rows), x.device)]
    return x[parts[0]] if len(parts) == 1 else torch.cat([x[part] for part in parts])


def add_to_rows(x: Tensor, rows: Sequence[int], more: Tensor) -> Tensor:
    """x [B, ...] with `more` [len(rows), ...] added to these rows; the others keep their bits."""
    if list(rows) == list(range(len(x))):
        return x + more
    order = sorted(range(len(rows)), key=rows.__getitem__)
    more = rows_of(more, order)
    done: list[Tensor] = []
    taken = start = 0
    for part in runs([rows[i] for i in order]):
        count = part.stop - part.start
        done += [x[start:part.start], x[part] + more[taken:taken + count]]
        start, taken = part.stop, taken + count
    return torch.cat([*done, x[start:]])


def cut(x: Tensor, box: Box) -> Tensor:
    """The box of x [..., h, w]; one that goes beyond an edge goes on at the opposite one."""
    top, left, height, width = box
    if top + height > x.shape[-2] or left + width > x.shape[-1]:
        x, top, left = x.roll((-top, -left), (-2, -1)), 0, 0
    return x[..., top:top + height, left:left + width]


def scaled(x: Tensor, amounts: Sequence[float]) -> Tensor:
    """x [n, ...], each row times its number."""
    if len(set(amounts)) == 1:
        return x if amounts[0] == 1 else x * amounts[0]
    return x * upload(torch.tensor(amounts, dtype=x.dtype), x.device).view(-1, *[1] * (x.ndim - 1))


def runs(rows: Sequence[int]) -> list[slice]:
    """Rows as slices of neighbours: 0, 1, 2, 5 are 0:3 and 5:6."""
    found: list[slice] = []
    for row in rows:
        if found and found[-1].stop == row:
            found[-1] = slice(found[-1].start, row + 1)
        else:
            found.append(slice(row, row + 1))
    return found


def _pick(column: Any, entries: Sequence[int]) -> Any:
    if column is None:
        return None
    if isinstance(column, tuple):
        return tuple(column[i] for i in entries)
    return rows_of(column, entries) if isinstance(column, Tensor) else column.take(entries)


def _join(a: Any, b: Any) -> Any:
    if a is None:
        return None
    if isinstance(a, tuple):
        return a + b
    return torch.cat([a, b]) if isinstance(a, Tensor) else a.stack([a, b])
