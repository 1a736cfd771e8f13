"""Step schedules: n + 1 strictly decreasing sigmas, the last of them 0, for any n from 1.

They are computed in float64 and rounded once to torch's default dtype, as k-diffusion's are of that dtype.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

AYS_SD15 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """The schedule of Karras et al. (2022, 2206.00364, equation 5): even steps in sigma^(1/rho).

    Returns [n + 1]. ValueError unless n >= 1, 0 < sigma_min < sigma_max and rho > 0."""
    low, high = _range(sigma_min, sigma_max)
    if not rho > 0:
        raise ValueError(f"rho must be above 0, got {rho}")
    ramp = np.linspace(0, 1, _count(n))
    with np.errstate(over="ignore", invalid="ignore"):
        sigmas = (np.float64(high) ** (1 / rho) * (1 - ramp) + np.float64(low) ** (1 / rho) * ramp) ** rho
    return _finish(sigmas, device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """Even steps in log sigma. Returns [n + 1]. ValueError unless n >= 1 and 0 < sigma_min < sigma_max."""
    low, high = _range(sigma_min, sigma_max)
    return _finish(np.exp(np.linspace(math.log(high), math.log(low), _count(n))), device)


def get_sigmas_normal(n: int, model_or_sigmas: Any, device: torch.device | str = "cpu") -> Tensor:
    """Even steps in the model's timestep t, from its last to 0 (k-diffusion's DiscreteSchedule.get_sigmas).

    model_or_sigmas: a denoiser, or its table `sigmas` [N], ascending; between its entries log sigma is linear in t.
    Returns [n + 1]. ValueError unless n >= 1; TypeError for anything without a table of sigmas."""
    table = getattr(model_or_sigmas, "sigmas", model_or_sigmas)
    if not isinstance(table, Tensor) or table.ndim != 1 or len(table) < 2:
        raise TypeError(f"expected a denoiser with a 1-D tensor .sigmas, or that tensor, got {model_or_sigmas!r}")
    logs = np.log(table.detach().cpu().double().numpy())
    t = np.linspace(len(logs) - 1, 0, _count(n))
    return _finish(np.exp(np.interp(t, np.arange(len(logs)), logs)), device)


def get_sigmas_ays(n: int, device: torch.device | str = "cpu") -> Tensor:
    """Align Your Steps (2404.14507) for Stable Diffusion 1.5: its ten nodes, then 0; for other n the nodes are
    interpolated in log sigma. Returns [n + 1]. ValueError unless n >= 1."""
    nodes = np.linspace(0, 1, len(AYS_SD15))
    return _finish(np.exp(np.interp(np.linspace(0, 1, _count(n) + 1), nodes, np.log(AYS_SD15)))[:-1], device)


def _count(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"the number of steps must be an integer, got {n!r}")
    if n < 1:
        raise ValueError(f"the number of steps must be at least 1, got {n}")
    return n


def _range(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    low, high = float(sigma_min), float(sigma_max)
    if not 0 < low < high < math.inf:
        raise ValueError(f"expected 0 < sigma_min < sigma_max, got sigma_min {low} and sigma_max {high}")
    return low, high


def _finish(sigmas: np.ndarray[Any, Any], device: torch.device | str) -> Tensor:
    """Rounds to the default dtype, appends 0, and refuses what rounding made equal."""
    rounded = torch.tensor([*sigmas.tolist(), 0.0], dtype=torch.get_default_dtype())
    if not (rounded.isfinite().all() and (rounded.diff() < 0).all()):
        raise ValueError(f"{len(sigmas)} steps do not fit between these sigmas in {rounded.dtype}: two would be equal")
    return rounded.to(device)
