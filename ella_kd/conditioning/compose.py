"""Conditionings made of others at the level of what the network answers: weighted prompts (AND) and regions.

A composition stands for C = sum_i W_i D(x; c_i) + (1 - sum_i W_i) D(x; u), so every guidance rule works on it as on a
single prompt.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

from ella_kd.conditioning.base import Combination, Conditioning, Term, Weight
from ella_kd.conditioning.leaves import as_conditioning
from ella_kd.models.context import Context
from ella_kd.models.network import Levels
from ella_kd.scale import Scale, check_scale, resolve


class Composition(Combination):
    """Several conditions and how much each counts, perhaps differently at each place of the picture."""

    of_answers = True

    def __init__(self, parts: Sequence[Any], **fields: Any) -> None:
        for part in parts:
            if isinstance(part, (str, bytes)):
                raise TypeError(f"{type(self).__name__} takes encoded prompts, got the text {part!r}: encode it first")
        self._set(**fields)
        super().__init__(*map(as_conditioning, parts))

    def _check_part(self, part: object) -> None:
        """Any conditioning, other compositions too."""

    @abstractmethod
    def weights(self, h: int, w: int, levels: Levels) -> list[Weight]:
        """The weight of each part; what they lack of 1 is the uncond's."""

    def __call__(self, t: Tensor) -> Context:
        raise TypeError(f"{type(self).__name__} combines several answers of the network and has no tokens of its own: "
                        "give it to a denoiser")

    def terms(self, h: int, w: int, levels: Levels) -> list[Term]:
        """Each conditioning once; inner compositions are multiplied out; what weighs nothing is left out."""
        weights = self.weights(h, w, levels)
        total: dict[Conditioning | None, Weight] = {}
        for part, weight in zip(self.parts, weights, strict=True):
            for term, share in part.terms(h, w, levels):
                total[term] = total.get(term, 0.0) + weight * share
        total[None] = total.get(None, 0.0) + (1.0 - sum(weights))
        return [(term, 1.0 if _is(weight, 1.0) else weight) for term, weight in total.items() if not _is(weight, 0.0)]


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
        super().__init__([part for part, _ in terms], amounts=amounts)

    def of(self, parts: tuple[Any, ...]) -> Self:
        return type(self)(*zip(parts, self.amounts, strict=True))

    @property
    def weights_vary(self) -> bool:
        return super().weights_vary or any(callable(amount) for amount in self.amounts)

    def weights(self, h: int, w: int, levels: Levels) -> list[Weight]:
        amounts = [resolve(amount, levels) for amount in self.amounts]
        return [amount if isinstance(amount, float) else torch.tensor(amount, dtype=torch.float64).view(-1, 1, 1, 1)
                for amount in amounts]


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
        values = values.detach().to("cpu", torch.float64, copy=True)
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError("a mask holds numbers from 0 to 1, got "
                             f"{values.min().item():g} to {values.max().item():g}: divide grey levels by 255")
        object.__setattr__(self, "values", values)

    def draw(self, h: int, w: int, feather: float) -> Tensor:
        """[h, w] float64: its mean over each pixel; each of its own pixels is a Box, with a box's soft edges."""
        rows, columns = (torch.stack([_ramp(i / size, (i + 1) / size, n, feather) for i in range(size)])
                         for size, n in zip(self.values.shape, (h, w)))
        return rows.mT @ self.values @ columns


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
        super().__init__(parts, areas=tuple(area for _, area in terms), feather=float(feather))

    def of(self, parts: tuple[Any, ...]) -> Self:
        background = parts[len(self.areas)] if len(parts) > len(self.areas) else None
        return type(self)(*zip(parts, self.areas), background=background, feather=self.feather)

    def weights(self, h: int, w: int, levels: Levels) -> list[Weight]:
        weights: list[Weight] = [*_blend(self.areas, self.feather, h, w)]
        return [*weights, 1.0 - sum(weights)] if len(self.parts) > len(self.areas) else weights


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


def _is(weight: Weight, value: float) -> bool:
    """Whether a weight is this number everywhere, to rounding."""
    return abs(weight - value) < 1e-9 if isinstance(weight, float) else bool(((weight - value).abs() < 1e-9).all())
