"""Conditionings with a picture that steers the network: `cond.with_control(...)`, `cond.with_image(...)`."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

from torch import Tensor

from ella_kd.conditioning.base import Combination, Conditioning
from ella_kd.conditioning.combine import Concat
from ella_kd.conditioning.leaves import as_conditioning
from ella_kd.conditioning.switch import window as in_window
from ella_kd.models.addons.preprocessing import Picture, pixels, preprocessor
from ella_kd.models.context import Context
from ella_kd.models.controls import FACTORS, Control, ControlNetwork, Hint
from ella_kd.models.image_prompts import ImagePrompt
from ella_kd.models.network import Levels
from ella_kd.scale import Scale, check_scale, resolve

Guess = Literal["", "ldm", "diffusers"]
Window = tuple[float, float]
ALWAYS: Window = (math.inf, 0.0)


class Steered(Concat):
    """A conditioning beside what else steers the network."""


class Steering(Combination):
    """What steers the network and has no tokens: things, one for all rows or one per row, each with its strength.

    strength: a number, one per row, or a function of sigma; rows of strength 0 go without. parts: conditionings of its
    own, of one row or of as many.
    """

    things: tuple[Any, ...]
    strength: Scale

    def __init__(self, things: Sequence[Any], strength: Scale, *own: Conditioning, **fields: Any) -> None:
        self._set(things=tuple(things), strength=strength, **fields)
        super().__init__(*own)

    @abstractmethod
    def shown(self, things: tuple[Any, ...], own: tuple[Context, ...], **rows: Any) -> dict[str, Any]:
        """The context's inputs for some of its rows (rows, strengths), with the things and own contexts of them."""

    @abstractmethod
    def like(self, things: tuple[Any, ...], strength: Scale, own: tuple[Any, ...]) -> Self:
        """The same of others."""

    def _check_rows(self, rows: list[int]) -> None:
        if len({len(self.things), self._strengths, *rows} - {1}) > 1:
            raise ValueError("pictures, strengths and tokens are one for all rows or one per row, got "
                             f"{len(self.things)} pictures, {self._strengths} strengths and tokens of rows {rows}")

    @property
    def _strengths(self) -> int:
        return len(self.strength) if isinstance(self.strength, tuple) else 1

    @property
    def rows(self) -> int:
        return max(len(self.things), self._strengths, *(part.rows for part in self.parts))

    @property
    def varies(self) -> bool:
        return callable(self.strength) or super().varies

    def of(self, parts: tuple[Any, ...]) -> Self:
        return self.like(self.things, self.strength, parts)

    def at(self, levels: Levels) -> Conditioning:
        own = tuple(part.at(levels) for part in self.parts)
        return self.like(self.things, resolve(self.strength, levels), own) if self.varies else self

    def repeat(self, n: int) -> Self:
        def each(values: Any) -> Any:
            several = isinstance(values, tuple) and len(values) == self.rows
            return tuple(x for x in values for _ in range(n)) if several else values

        own = tuple(part.repeat(n) if part.rows == self.rows else part for part in self.parts)
        return self.like(each(self.things), each(self.strength), own)

    def __call__(self, t: Tensor) -> Context:
        if callable(self.strength):
            raise ValueError("a strength that is a function of sigma is decided by sigma, and t does not tell it: call "
                             "conditioning.at((sigma,))(t), as a denoiser does")
        if self.rows not in (1, len(t)):
            raise ValueError(f"the conditioning has {self.rows} rows and the batch {len(t)}: give one row, or one per "
                             "sample (conditioning.repeat(n) makes n samples of each prompt)")
        strengths = self.strength if isinstance(self.strength, tuple) else (self.strength,)
        things, strengths = (x * len(t) if len(x) == 1 else x for x in (self.things, strengths))
        rows = tuple(row for row, strength in enumerate(strengths) if strength)
        inputs: dict[str, Any] = {}
        if rows:
            own = tuple(part(t).take(rows) for part in self.parts)
            inputs = self.shown(tuple(things[row] for row in rows), own, rows=rows,
                                strengths=tuple(strengths[row] for row in rows))
        return Context(t.new_zeros(len(t), 0, 0), **inputs)


class Hints(Steering):
    """A ControlNet or T2I-Adapter with its pictures; how: the other fields of its `Control`."""

    how: dict[str, Any]

    def like(self, things: tuple[Any, ...], strength: Scale, own: tuple[Any, ...]) -> Self:
        return type(self)(things, strength, *own, how=self.how)

    def shown(self, things: tuple[Any, ...], own: tuple[Context, ...], **rows: Any) -> dict[str, Any]:
        return {"controls": (Control(hints=things, own=next(iter(own), None), **rows, **self.how),)}


def steered(cond: Conditioning, steering: Conditioning, window: Window) -> Conditioning:
    """A conditioning, or each part of a composition, beside what steers it above window[1], up to window[0]."""
    if cond.of_answers:
        return cond.of(tuple(steered(part, steering, window) for part in cond.parts))
    return Steered(cond, steering if window == ALWAYS else in_window(steering, *window))


def with_control(cond: Conditioning, network: ControlNetwork, picture: Picture | Sequence[Picture],
                 strength: Scale = 1.0, *, window: Window = ALWAYS, guess: Guess = "", pooled: bool | None = None,
                 tokens: Any = None, preprocess: str | Callable[[Any], Any] | None = None) -> Conditioning:
    """See `Conditioning.with_control`."""
    if not hasattr(network, "residuals"):
        raise TypeError("a control is a ControlNet or a T2IAdapter, ControlNet.load(file), got "
                        f"{type(network).__name__}")
    if guess not in FACTORS:
        raise ValueError(f"guess must be one of {', '.join(map(repr, FACTORS))}, got {guess!r}")
    if network.pooled is None and (guess or pooled):
        raise ValueError(f"a {type(network).__name__} has no guess mode and is not pooled: that is a ControlNet's")
    pictures: Sequence[Any] = picture if isinstance(picture, (list, tuple)) else [picture]
    if preprocess is not None:
        pictures = [preprocessor(preprocess)(each) for each in pictures]
    hints = [Hint(row) for each in pictures for row in pixels(each).split(1)]
    if not hints:
        raise ValueError("a control needs a picture, or one per row, got none")
    how = {"network": network, "factors": guess, "pooled": bool(network.pooled if pooled is None else pooled)}
    own = () if tokens is None else (as_conditioning(tokens),)
    return steered(cond, Hints(hints, check_scale("the strength of a control", strength), *own, how=how), window)


class Images(Steering):
    """An IP-Adapter with what it makes of pictures, [L, D] for each row."""

    adapter: Any

    def like(self, things: tuple[Any, ...], strength: Scale, own: tuple[Any, ...]) -> Self:
        return type(self)(things, strength, *own, adapter=self.adapter)

    def shown(self, things: tuple[Any, ...], own: tuple[Context, ...], **rows: Any) -> dict[str, Any]:
        return {"images": (ImagePrompt(adapter=self.adapter, tokens=things, **rows),)}


def with_image(cond: Conditioning, adapter: Any, pictures: Any, weight: Scale = 1.0, *,
               window: Window = ALWAYS) -> Conditioning:
    """See `Conditioning.with_image`."""
    if not hasattr(adapter, "of_block"):
        raise TypeError(f"an image prompt takes an IPAdapter, IPAdapter.load(file, image_encoder=...), got "
                        f"{type(adapter).__name__}")
    if pictures is not None:
        pictures = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
        if not pictures:
            raise ValueError("an image prompt takes a picture or several, or None for the uncond's, got none")
    weight = check_scale("the weight of an image prompt", weight)
    return steered(cond, Images([adapter.tokens(pictures)], weight, adapter=adapter), window)
