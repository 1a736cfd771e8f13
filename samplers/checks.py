"""What a run's latents and schedule must be, found out before the loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_latents(x: Tensor) -> None:
    """x is [B, C, h, w], float32 or float64, not empty and finite; TypeError or ValueError otherwise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor of latents [B, C, h, w], got {type(x).__name__}")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x must be latents [B, C, h, w], got shape {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64 (the network inside may be any dtype), got {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or Inf before the first step")


def check_sigmas(sigmas: Tensor, dtype: torch.dtype) -> list[float]:
    """The schedule as Python floats: 1-D, at least two values, finite, strictly monotone, positive save a last 0, and
    each within the range of `dtype`; TypeError or ValueError otherwise."""
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point():
        raise TypeError(f"sigmas must be a 1-D tensor of floats, got {sigmas!r}")
    if sigmas.ndim != 1:
        raise ValueError(f"sigmas must be 1-D, [steps + 1], got shape {list(sigmas.shape)}")
    values: list[float] = sigmas.tolist()
    if len(values) < 2:
        raise ValueError(f"sigmas must hold steps + 1 values, so at least 2 (one step), got {values}")
    for i, sigma in enumerate(values):
        if not math.isfinite(sigma) or sigma < 0:
            raise ValueError(f"sigmas must be finite and not negative, got sigmas[{i}] = {sigma}")
    if 0.0 in values[:-1]:
        raise ValueError(f"only the last sigma may be 0, got sigmas[{values.index(0.0)}] = 0")
    down = values[1] < values[0]
    for i in range(1, len(values)):
        if (values[i] < values[i - 1]) != down or values[i] == values[i - 1]:
            raise ValueError(
                "sigmas must be strictly decreasing (or strictly ascending, for inversion), "
                f"got {values[i - 1]:g}, {values[i]:g} at {i - 1}, {i}"
            )
    limits = torch.finfo(dtype)
    if min(value for value in values if value) < limits.tiny or max(values) > limits.max:
        raise ValueError(f"sigmas must be representable in x's dtype {dtype}, got {min(values):g} to {max(values):g}")
    return values
