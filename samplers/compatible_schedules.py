"""What other programs call by a schedule's name, where it is not what `SCHEDULES` has under that name.

Each returns what the program returns, so the number of values may not be n + 1 and the last may not be 0; ValueError
where the program's own result cannot be walked (a value repeated, or a division by 0).
"""

import math
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from ella_kd.samplers.registry import COMPATIBLE_SCHEDULES, schedule
from ella_kd.samplers.schedules import AYS_SD15, Values, count, sigma_range
from ella_kd.samplers.timestep_schedules import sigma_table

__all__ = [
    "get_sigmas_ays_a1111", "get_sigmas_beta_a1111", "get_sigmas_beta_comfyui", "get_sigmas_ddim_uniform_comfyui",
    "get_sigmas_kl_optimal_a1111", "get_sigmas_laplace_comfyui",
]


@schedule("ComfyUI's beta: rounded timesteps, equal ones dropped", table=COMPATIBLE_SCHEDULES)
def get_sigmas_beta_comfyui(n: int, model_or_sigmas: Any, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """ComfyUI's "beta": timesteps rounded, equal ones dropped. Returns at most n + 1, ending in 0."""
    table = sigma_table(model_or_sigmas)
    t = np.rint(special.betaincinv(alpha, beta, 1 - np.arange(count(n)) / n) * (len(table) - 1)).astype(int)
    return _walkable("beta_comfyui", n, np.append(table[np.unique(t)[::-1]], 0.0))


@schedule("A1111's Beta: quantiles of sigma itself", table=COMPATIBLE_SCHEDULES)
def get_sigmas_beta_a1111(
    n: int, sigma_min: float, sigma_max: float, alpha: float = 0.6, beta: float = 0.6
) -> Tensor:
    """A1111's "Beta": sigma itself, not t, at the Beta distribution's quantiles. Returns [n + 1], ending in 0."""
    low, high = sigma_range(sigma_min, sigma_max)
    share = special.betaincinv(alpha, beta, 1 - np.linspace(0, 1, count(n)))
    return _walkable("beta_a1111", n, np.append(low + share * (high - low), 0.0))


@schedule("A1111's KL Optimal: ends at sigma_min, no 0", table=COMPATIBLE_SCHEDULES)
def get_sigmas_kl_optimal_a1111(n: int, sigma_min: float, sigma_max: float) -> Tensor:
    """A1111's "KL Optimal": n even steps in arctan sigma that end at sigma_min. Returns [n + 1], with no 0."""
    low, high = sigma_range(sigma_min, sigma_max)
    return _walkable("kl_optimal_a1111", n, np.tan(np.linspace(math.atan(high), math.atan(low), count(n) + 1)))


@schedule("ComfyUI's Laplace: clamped to the range, no 0", table=COMPATIBLE_SCHEDULES)
def get_sigmas_laplace_comfyui(
    n: int, sigma_min: float, sigma_max: float, mu: float = 0.0, beta: float = 0.5
) -> Tensor:
    """ComfyUI's "LaplaceScheduler": the whole distribution, clamped to the range. Returns [n], with no 0.

    With many steps several are clamped to the same sigma, which is refused."""
    low, high = sigma_range(sigma_min, sigma_max)
    side = 0.5 - np.linspace(0, 1, count(n))
    log = mu - beta * np.sign(side) * np.log(1 - 2 * np.abs(side) + 1e-5)
    return _walkable("laplace_comfyui", n, np.clip(np.exp(log), low, high))


@schedule("ComfyUI's ddim_uniform: more steps than asked where n does not divide N", table=COMPATIBLE_SCHEDULES)
def get_sigmas_ddim_uniform_comfyui(n: int, model_or_sigmas: Any) -> Tensor:
    """ComfyUI's and A1111's "ddim_uniform": every (N // n)-th timestep from 1 on; where n does not divide N that is
    more than n. Returns [steps + 1], ending in 0."""
    table = sigma_table(model_or_sigmas)
    t = np.arange(1, len(table), max(len(table) // count(n), 1))
    return _walkable("ddim_uniform_comfyui", n, np.append(table[t[::-1]], 0.0))


@schedule("A1111's Align Your Steps: eleven nodes interpolated to n, then 0", table=COMPATIBLE_SCHEDULES)
def get_sigmas_ays_a1111(n: int) -> Tensor:
    """A1111's "Align Your Steps" for SD1.5: all eleven nodes interpolated to n values, then 0. Returns [n + 1]."""
    u = np.linspace(0, 1, count(n))
    if n == 1:
        u = np.array([1.0])  # its interpolation runs upwards, so a single value is the smallest
    nodes = np.exp(np.interp(u, np.linspace(0, 1, len(AYS_SD15)), np.log(AYS_SD15)))
    return _walkable("ays_a1111", n, np.append(nodes, 0.0))


def _walkable(name: str, n: int, sigmas: Values) -> Tensor:
    """Rounded to the default dtype; ValueError unless at least two values that fall strictly."""
    rounded = torch.tensor(sigmas, dtype=torch.get_default_dtype())
    if len(rounded) < 2 or not bool((rounded.diff() < 0).all()):
        raise ValueError(f"{name} gives no schedule of {n} steps that falls strictly: {rounded.tolist()[:4]} ...")
    return rounded
