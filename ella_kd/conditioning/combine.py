"""Conditionings made of others, token by token: side by side, one under the other, between two, with an image."""

import math
from dataclasses import fields, replace
from itertools import islice
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ella_kd.conditioning.base import Combination, Conditioning, to_batch
from ella_kd.models.context import Context, mask_of
from ella_kd.models.network import Levels
from ella_kd.models.text import TextFeatures


class Concat(Combination):
    """The tokens of several conditionings in a row, masks kept: `Concat(ELLA(...), Constant(...))`, ELLA first.

    Of what SDXL sees beside tokens (vector, sizes, ...) the first part's holds that has one.
    """

    def of(self, parts: tuple[Conditioning, ...]) -> Self:
        return type(self)(*parts)

    def __call__(self, t: Tensor) -> Context:
        return Context.beside([part(t) for part in self.parts])


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
        return Context.stack([part(rows) for part, rows in zip(self.parts, of_parts, strict=True)])

    def at(self, levels: Levels) -> Conditioning:
        if not self.varies:
            return self
        if self.rows == 1:
            return self.parts[0].at(levels)
        rows = iter(levels * self.rows if len(levels) == 1 else levels)
        each = [tuple(islice(rows, part.rows)) for part in self.parts]
        decided = [part.at(own[:1] if len(set(own)) == 1 else own) for part, own in zip(self.parts, each)]
        return self.of(tuple(new if new.rows == part.rows else new.repeat(part.rows)
                             for new, part in zip(decided, self.parts)))

    def repeat(self, n: int) -> Self:
        return self.of(tuple(part.repeat(n) for part in self.parts))


class Lerp(Combination):
    """Tokens between two prompts, and their vectors, at every timestep: `(1 - weight) * a(t) + weight * b(t)`.

    weight outside [0, 1] extrapolates. The tokens must have one shape and no mask, as ELLA's and CLIP's have. Controls
    and image prompts keep such a share of their strengths.
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
        both = Context.beside([a.weighed(1 - self.weight), b.weighed(self.weight)])
        vector = both.vector if a.vector is None or b.vector is None else torch.lerp(a.vector, b.vector, self.weight)
        return replace(both, tokens=torch.lerp(a.tokens, b.tokens, self.weight), vector=vector)


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


class With(Combination):
    """A conditioning with more for the network to see than tokens: `With(cond, channels=image)`.

    A vector, sizes, a score, a label or a guidance scale takes the place of the conditioning's own. inputs: fields of
    `Context`, or of the subclass that a subclass of this names as `context`, tensors [B, ...] of one row or of one per
    sample. Raises ValueError for rows that do not fit, TypeError for an input that no field holds.
    """

    context: ClassVar[type[Context]] = Context
    inputs: dict[str, Tensor]

    def __init__(self, part: Conditioning, **inputs: Tensor) -> None:
        known = [own.name for own in fields(self.context)[2:] if not own.metadata.get("some")]
        unknown = [name for name in inputs if name not in known]
        if unknown or not inputs:
            raise TypeError(f"{type(self).__name__} takes the inputs {', '.join(known)}, got {', '.join(unknown)}")
        self._set(inputs=inputs)
        super().__init__(part)

    def _check_rows(self, rows: list[int]) -> None:
        super()._check_rows([*rows, *map(len, self.inputs.values())])

    def of(self, parts: tuple[Any, ...]) -> Self:
        return type(self)(parts[0], **self.inputs)

    @property
    def rows(self) -> int:
        return max(self.parts[0].rows, *map(len, self.inputs.values()))

    def __call__(self, t: Tensor) -> Context:
        seen = self.parts[0](t)
        own = self.context(seen.tokens[:, :0], **{name: to_batch(x, len(t)) for name, x in self.inputs.items()})
        return Context.beside([own, seen])  # of vectors the first holds

    def repeat(self, n: int) -> Self:
        part: Any = self.parts[0]
        inputs = {name: x.repeat_interleave(n, 0) if len(x) == self.rows else x for name, x in self.inputs.items()}
        return type(self)(part.repeat(n) if part.rows == self.rows else part, **inputs)


class Channels(With):
    """A conditioning with channels for the UNet to see beside x: an image to edit (InstructPix2Pix), a masked one.

    channels [B, C, h, w], as large as the latents, of one row or one per sample; unscaled by c_in.
    """

    def __init__(self, part: Conditioning, channels: Tensor) -> None:
        if channels.ndim != 4:
            raise ValueError(f"channels must be [B, C, h, w], got {list(channels.shape)}")
        super().__init__(part, channels=channels)
