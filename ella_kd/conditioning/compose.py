"""Conditions made of others at the level of what the network answers: weighted prompts (AND) and regions.

A composition is given to a guided denoiser as `cond`. It stands for C = sum_i W_i D(x; c_i) + (1 - sum_i W_i) D(x; u),
so every guidance rule works on it as on a single prompt.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ella_kd.conditioning.base import Conditioning, Levels, Map
from ella_kd.scale import Scale, check_scale, resolve

Term = tuple[Conditioning | None, float | Tensor]
"""A conditioning, None for the uncond, and its weight: a number, or [h, w]."""


class Composition(ABC):
    """Several conditions and how much each counts, perhaps differently at each place of the picture."""

    parts: tuple[Any, ...]

    def _set(self, parts: Sequence[Any], **fields: Any) -> None:
        for part in parts:
            if isinstance(part, (str, bytes)):
                raise TypeError(f"{type(self).__name__} takes encoded prompts, got the text {part!r}: encode it first")
        for name, value in {"parts": tuple(parts), **fields}.items():
            object.__setattr__(self, name, value)

    @abstractmethod
    def of(self, parts: tuple[Any, ...]) -> Self:
        """The same composition of other parts."""

    @abstractmethod
    def weights(self, h: int, w: int, levels: Levels) -> tuple[list[float | Tensor], float | Tensor]:
        """The weight of each part, and what is left for the uncond: numbers or CPU tensors [h, w]."""

    @property
    def rows(self) -> int:
        return max(part.rows for part in self.parts)

    @property
    def varies(self) -> bool:
        return any(part.varies for part in self.parts)

    def at(self, levels: Levels) -> Self:
        """The same at these noise levels, with every switch decided."""
        return self.map(lambda part: part.at(levels)) if any(part.varies for part in self.parts) else self

    def repeat(self, n: int) -> Self:
        """n samples per row, side by side."""
        return self.map(lambda part: part.repeat(n) if part.rows == self.rows else part)

    def leaves(self) -> list[Conditioning]:
        """The conditionings it is made of that are not themselves made of others."""
        return [leaf for part in self.parts for leaf in part.leaves()]

    def map_leaves(self, f: Map) -> Self:
        """The same composition of f(leaf)."""
        return self.map(lambda part: part.map_leaves(f))

    def map(self, f: Callable[[Any], Any]) -> Self:
        """The same composition of f(part)."""
        return self.of(tuple(map(f, self.parts)))

    def terms(self, h: int, w: int, levels: Levels) -> list[Term]:
        """What to evaluate for latents of h x w, and each answer's weight; inner compositions are multiplied out."""
        weights, left = self.weights(h, w, levels)
        terms: list[Term] = []
        for part, weight in zip(self.parts, weights, strict=True):
            if isinstance(part, Composition):
                terms += [(term, weight * inner) for term, inner in part.terms(h, w, levels)]
            elif not _is_zero(weight):
                terms.append((part, weight))
        return terms if _is_zero(left) else [*terms, (None, left)]


class And(Composition):
    """Several prompts at once, each pulling with its weight (Liu et al. 2022, arXiv 2206.01714, eq. 11).

    `And((a, 1.0), (b, 0.5), (c, -0.3))`: guided with scale s, D = U + s * sum_i w_i (C_i - U). A negative weight pushes
    away from a prompt. A weight is a number or a function of sigma. Weights that sum to 1 need no uncond at scale 1.
    """

    amounts: tuple[Scale, ...]

    def __init__(self, *terms: tuple[Any, Scale]) -> None:
        if not terms or any(not isinstance(term, tuple) or len(term) != 2 for term in terms):
            raise ValueError("And takes pairs of a condition and its weight: And((a, 1.0), (b, -0.5))")
        amounts = tuple(check_scale("a weight of And", weight, per_sample=False) for _, weight in terms)
        self._set([part for part, _ in terms], amounts=amounts)

    def of(self, parts: tuple[Any, ...]) -> Self:
        return type(self)(*zip(parts, self.amounts, strict=True))

    @property
    def varies(self) -> bool:
        return super().varies or any(callable(amount) for amount in self.amounts)

    def weights(self, h: int, w: int, levels: Levels) -> tuple[list[float | Tensor], float | Tensor]:
        if len(levels) > 1 and any(callable(amount) for amount in self.amounts):
            raise ValueError("weights of And that depend on sigma need one sigma for the whole batch, got rows at "
                             f"{list(levels)[:4]}: draw them one by one")
        weights = [resolve(amount, levels) for amount in self.amounts]
        left = 1.0 - sum(weights)  # type: ignore[arg-type]
        return list(weights), 0.0 if abs(left) < 1e-9 else left  # type: ignore[arg-type]


@dataclass(frozen=True)
class Box:
    """A rectangle of the picture in fractions of its sides: left, top, right, bottom, 0 at the top left corner."""

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        if not (0 <= self.left < self.right <= 1 and 0 <= self.top < self.bottom <= 1):
            raise ValueError(f"a box needs 0 <= left < right <= 1 and 0 <= top < bottom <= 1, got {self}")

    def draw(self, h: int, w: int, feather: float) -> Tensor:
        """[h, w] float64: how much of each pixel it covers; soft over `feather` of the side around inner edges."""
        return _ramp(self.top, self.bottom, h, feather)[:, None] * _ramp(self.left, self.right, w, feather)[None]


@dataclass(frozen=True, eq=False)
class Mask:
    """A part of the picture, drawn: [H, W] of any size, 1 inside, 0 outside (a bool mask, or grey levels / 255)."""

    values: Tensor

    def __post_init__(self) -> None:
        values = self.values
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"a mask must be [H, W], got {list(values.shape)}")
        values = values.detach().to("cpu", torch.float64)
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError("a mask holds numbers from 0 to 1, got "
                             f"{values.min().item():g} to {values.max().item():g}: divide grey levels by 255")
        object.__setattr__(self, "values", values)

    def draw(self, h: int, w: int, feather: float) -> Tensor:
        """[h, w] float64: its mean over each pixel; averaged over `feather` of the side."""
        drawn = F.interpolate(self.values[None, None], (h, w), mode="area")
        ry, rx = round(feather * h / 2), round(feather * w / 2)
        if rx or ry:
            drawn = F.avg_pool2d(F.pad(drawn, (rx, rx, ry, ry), mode="replicate"), (2 * ry + 1, 2 * rx + 1), 1)
        return drawn[0, 0]


class Regions(Composition):
    """Each part of the picture by its own prompt: `Regions((a, Box(0, 0, .5, 1)), (b, Box(.5, 0, 1, 1)))`.

    The network's answers are blended, each from its own tokens: W_i = m_i / max(1, sum_j m_j) with the areas m_i drawn
    at the latents' size, so that overlapping regions share a place. What no region covers belongs to `background`, or
    to the uncond without one. feather: the width of the soft edges, in fractions of the picture's sides.
    """

    areas: tuple[Box | Mask, ...]
    feather: float

    def __init__(self, *terms: tuple[Any, Box | Mask], background: Any = None, feather: float = 0.0) -> None:
        if not terms or not all(isinstance(t, tuple) and len(t) == 2 and isinstance(t[1], (Box, Mask)) for t in terms):
            raise ValueError("Regions takes pairs of a condition and its Box or Mask")
        if not 0 <= feather <= 1:
            raise ValueError(f"feather is a fraction of the side, from 0 to 1, got {feather}")
        parts = [part for part, _ in terms] + ([] if background is None else [background])
        self._set(parts, areas=tuple(area for _, area in terms), feather=float(feather))

    def of(self, parts: tuple[Any, ...]) -> Self:
        background = parts[len(self.areas)] if len(parts) > len(self.areas) else None
        return type(self)(*zip(parts, self.areas), background=background, feather=self.feather)

    def weights(self, h: int, w: int, levels: Levels) -> tuple[list[float | Tensor], float | Tensor]:
        weights = _blend(self.areas, self.feather, h, w)
        left: float | Tensor = 1.0 - sum(weights)
        if bool((torch.as_tensor(left).abs() < 1e-9).all()):
            left = 0.0
        if len(self.parts) > len(self.areas):
            return [*weights, left], 0.0
        return list(weights), left


@lru_cache(64)
def _blend(areas: tuple[Box | Mask, ...], feather: float, h: int, w: int) -> tuple[Tensor, ...]:
    drawn = [area.draw(h, w, feather) for area in areas]
    total = torch.stack(drawn).sum(0).clamp(min=1)
    return tuple(m / total for m in drawn)


def _ramp(start: float, stop: float, n: int, feather: float) -> Tensor:
    """[n]: the share of each of n pixels that lies in [start, stop]; edges inside the picture are soft."""
    edges = torch.linspace(0, 1, n + 1, dtype=torch.float64)

    def covered(edge: float, soft: bool) -> Tensor:
        """The integral over each pixel of the step up at `edge`, or of a ramp of width feather around it."""
        if soft and feather > 0:
            u = ((edges - edge) / feather + 0.5).clamp(0, 1)
            below = feather * u * u / 2 + (edges - edge - feather / 2).clamp(min=0)
        else:
            below = (edges - edge).clamp(min=0)
        return (below[1:] - below[:-1]) * n

    return (covered(start, start > 0) - covered(stop, stop < 1)).clamp(0, 1)


def _is_zero(weight: float | Tensor) -> bool:
    return weight == 0 if isinstance(weight, float) else not bool(weight.any())
