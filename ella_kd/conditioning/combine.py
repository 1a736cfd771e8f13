"""Conditionings made of others, token by token: side by side, one under the other, between two, with an image."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from itertools import islice
from typing import Self

import torch
from torch import Tensor

from ella_kd.conditioning.base import Conditioning, Context, Levels, Map, to_batch
from ella_kd.models.text import TextFeatures
from ella_kd.models.tokens import mask_of, pile


class Combination(Conditioning):
    """A conditioning made of others, each of one row or of as many as the rest."""

    parts: tuple[Conditioning, ...]

    def __init__(self, *parts: Conditioning) -> None:
        for part in parts:
            if not isinstance(part, Conditioning):
                raise TypeError(f"{type(self).__name__} takes conditionings, got {type(part).__name__}: features "
                                "become one as ELLA(tsc, features), or as Constant(features) for CLIP's")
        self._set(parts=parts)
        self._check_rows([part.rows for part in parts])

    def _check_rows(self, rows: list[int]) -> None:
        if not rows or len(set(rows) - {1}) > 1:
            raise ValueError(f"{type(self).__name__} takes conditionings of one row or of equal rows, got rows {rows}")

    def _set(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"conditionings are values: {name} cannot be set; make a new one")

    @abstractmethod
    def of(self, parts: tuple[Conditioning, ...]) -> Self:
        """The same combination of other parts."""

    @property
    def rows(self) -> int:
        return max(part.rows for part in self.parts)

    @property
    def varies(self) -> bool:
        return any(part.varies for part in self.parts)

    def at(self, levels: Levels) -> Conditioning:
        return self._map(lambda part: part.at(levels)) if self.varies else self

    def repeat(self, n: int) -> Self:
        return self._map(lambda part: part.repeat(n) if part.rows == self.rows else part)

    def leaves(self) -> list[Conditioning]:
        return [leaf for part in self.parts for leaf in part.leaves()]

    def map_leaves(self, f: Map) -> Self:
        return self._map(lambda part: part.map_leaves(f))

    def _map(self, f: Map) -> Self:
        return self.of(tuple(map(f, self.parts)))


def of_rows(conditioning: Conditioning, rows: int) -> Conditioning:
    """The same with this many rows: as it is, or its one row repeated."""
    return conditioning if conditioning.rows == rows else conditioning.repeat(rows)


class Concat(Combination):
    """The tokens of several conditionings in a row, masks kept: `Concat(ELLA(...), Constant(...))`, ELLA first."""

    def of(self, parts: tuple[Conditioning, ...]) -> Self:
        return type(self)(*parts)

    def __call__(self, t: Tensor) -> Context:
        contexts = [part(t) for part in self.parts]
        shown = [context for context in contexts if context.tokens.shape[1]] or contexts[:1]
        if len({context.tokens.shape[2] for context in shown}) > 1:
            raise ValueError("conditionings of one UNet need tokens of one width, got "
                             f"{[context.tokens.shape[2] for context in shown]}")
        tokens = torch.cat([context.tokens for context in shown], 1)
        seen = None if all(c.mask is None for c in shown) else torch.cat([mask_of(c) for c in shown], 1)
        return Context(tokens, seen, the_channels(contexts))


class Stack(Combination):
    """Conditionings one under the other, as the rows of one batch: `Stack(a, b)` has a's rows, then b's.

    Shorter tokens are padded and the padding is masked: an unmasked zero key still takes its share of the softmax.
    """

    def _check_rows(self, rows: list[int]) -> None:
        if not rows:
            raise ValueError("Stack takes at least one conditioning")

    def of(self, parts: tuple[Conditioning, ...]) -> Self:
        return type(self)(*parts)

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    def __call__(self, t: Tensor) -> Context:
        if self.rows == 1:
            return self.parts[0](t)
        if len(t) != self.rows:
            raise ValueError(f"the stack has {self.rows} rows and the batch {len(t)}: a stack does not broadcast")
        of_parts = t.split([part.rows for part in self.parts])
        contexts = [part(rows) for part, rows in zip(self.parts, of_parts, strict=True)]
        return Context(*pile(contexts), pile_channels(contexts))

    def at(self, levels: Levels) -> Conditioning:
        if not self.varies:
            return self
        if self.rows == 1:
            return self.parts[0].at(levels)
        rows = iter(levels * self.rows if len(levels) == 1 else levels)
        each = [tuple(islice(rows, part.rows)) for part in self.parts]
        return self.of(tuple(of_rows(part.at(own[:1] if len(set(own)) == 1 else own), part.rows)
                             for part, own in zip(self.parts, each)))

    def repeat(self, n: int) -> Self:
        return self._map(lambda part: part.repeat(n))


class Lerp(Combination):
    """Tokens between two prompts, at every timestep: `(1 - weight) * a(t) + weight * b(t)`.

    weight outside [0, 1] extrapolates. The tokens must have one shape and no mask, as ELLA's and CLIP's have.
    `lerp_features` is the other meaning: the connector reads a mixture, instead of reading each prompt.
    """

    weight: float

    def __init__(self, a: Conditioning, b: Conditioning, weight: float) -> None:
        if not math.isfinite(weight):
            raise ValueError(f"the weight of Lerp must be finite, 0 for the first and 1 for the second, got {weight}")
        self._set(weight=float(weight))
        super().__init__(a, b)

    def of(self, parts: tuple[Conditioning, ...]) -> Self:
        a, b = parts
        return type(self)(a, b, self.weight)

    def __call__(self, t: Tensor) -> Context:
        a, b = (part(t) for part in self.parts)
        if a.tokens.shape != b.tokens.shape or a.mask is not None or b.mask is not None:
            raise ValueError(f"Lerp needs tokens of one shape without a mask, got {list(a.tokens.shape)} and "
                             f"{list(b.tokens.shape)}, masks: {a.mask is not None} and {b.mask is not None}")
        return Context(torch.lerp(a.tokens, b.tokens, self.weight), None, the_channels([a, b]))


def lerp_features(a: TextFeatures, b: TextFeatures, weight: float) -> TextFeatures:
    """Features between two prompts, `(1 - weight) * a + weight * b`, position by position: one shape and one mask.

    Encode both in ELLA's fixed mode (max_length=128): prompts of other lengths have no common positions.
    Raises ValueError otherwise.
    """
    same_mask = (a.mask is None) == (b.mask is None) and (a.mask is None or torch.equal(a.mask, mask_of(b)))
    if a.tokens.shape != b.tokens.shape or not same_mask:
        raise ValueError(f"lerp_features needs features of one shape and one mask, got {list(a.tokens.shape)} and "
                         f"{list(b.tokens.shape)}: encode both with max_length=128, or use Lerp, which mixes tokens")
    return TextFeatures(torch.lerp(a.tokens, b.tokens, weight), a.mask)


class Channels(Combination):
    """A conditioning with channels for the UNet to see beside x: an image to edit (InstructPix2Pix), a masked one.

    channels [B, C, h, w], as large as the latents, of one row or one per sample; unscaled by c_in.
    """

    channels: Tensor

    def __init__(self, part: Conditioning, channels: Tensor) -> None:
        if channels.ndim != 4:
            raise ValueError(f"channels must be [B, C, h, w], got {list(channels.shape)}")
        self._set(channels=channels)
        super().__init__(part)

    def _check_rows(self, rows: list[int]) -> None:
        super()._check_rows([*rows, len(self.channels)])

    def of(self, parts: tuple[Conditioning, ...]) -> Self:
        return type(self)(parts[0], self.channels)

    @property
    def rows(self) -> int:
        return max(self.parts[0].rows, len(self.channels))

    def __call__(self, t: Tensor) -> Context:
        context = self.parts[0](t)
        own = Context(context.tokens, context.mask, to_batch(self.channels, len(t)))
        return Context(own.tokens, own.mask, the_channels([context, own]))

    def repeat(self, n: int) -> Self:
        part = self.parts[0]
        repeated = part.repeat(n) if part.rows == self.rows else part
        channels = self.channels.repeat_interleave(n, 0) if len(self.channels) == self.rows else self.channels
        return type(self)(repeated, channels)


def pile_channels(contexts: Sequence[Context]) -> Tensor | None:
    """The channels of contexts one under the other. Raises ValueError if some have channels and some have none."""
    found = [context.channels for context in contexts if context.channels is not None]
    if found and len(found) < len(contexts):
        raise ValueError("one UNet call has channels beside x for all of its conditionings or for none: wrap "
                         "each in Channels (zeros where there is no image)")
    return torch.cat(found) if found else None


def the_channels(contexts: Sequence[Context]) -> Tensor | None:
    found = [context.channels for context in contexts if context.channels is not None]
    if len(found) > 1:
        raise ValueError("two parts of one conditioning have channels: put Channels around the combination")
    return found[0] if found else None
