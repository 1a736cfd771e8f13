"""Scales: how strong a guidance is; a number, one per sample, or a function of sigma."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Scale = float | Sequence[float] | Callable[[float], float]
"""A number; one per sample (a sequence or a tensor [B]); or a function of sigma, `lambda s: 7 if s > 1 else 3`."""


def check_scale(name: str, scale: Any, per_sample: bool = True) -> Scale:
    """The scale as a value: a float, a tuple, or the function. TypeError or ValueError if it is none of them."""
    if callable(scale) and not isinstance(scale, Tensor):
        return scale
    if isinstance(scale, Tensor) and scale.ndim == 0:
        scale = scale.item()
    several = isinstance(scale, (Tensor, list, tuple))
    values = scale.tolist() if isinstance(scale, Tensor) else list(scale) if several else [scale]
    if several and not (per_sample and values):
        raise ValueError(f"{name} must be one number{', or one per sample' if per_sample else ''}, got {scale!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, one per sample, or a function of sigma, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    return tuple(map(float, values)) if several else float(values[0])


def resolve(scale: Scale, levels: tuple[float, ...]) -> float | tuple[float, ...]:
    """A scale at the noise levels of a call (one for all rows, or one per row): a number, or one per row.

    Raises ValueError for a function of sigma whose value is not a finite number.
    """
    if not callable(scale):
        return scale if isinstance(scale, float) else tuple(scale)
    values = tuple(float(scale(level)) for level in levels)
    for level, value in zip(levels, values):
        if not math.isfinite(value):
            raise ValueError(f"the scale's function gives {value} at sigma {level:g}: expected a finite number")
    return values[0] if len(set(values)) == 1 else values
