"""Step schedules over a model's timesteps: n + 1 strictly decreasing sigmas, the last of them 0.

model_or_sigmas: a denoiser, or its table `sigmas` [N], ascending; between its entries log sigma is linear in t unless
said otherwise. Those that visit whole timesteps only take n up to N and say so; the others any n from 1. All of them
raise TypeError for anything without such a table, and ValueError for an n that does not fit.
"""

from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from ella_kd.samplers.registry import schedule
from ella_kd.samplers.schedules import Values, count, finish

__all__ = [
    "get_sigmas_beta", "get_sigmas_ddim_uniform", "get_sigmas_leading", "get_sigmas_linspace", "get_sigmas_normal",
    "get_sigmas_sgm_uniform", "get_sigmas_simple", "get_sigmas_trailing",
]


@schedule("even in the model's timestep")
def get_sigmas_normal(n: int, model_or_sigmas: Any, device: torch.device | str = "cpu") -> Tensor:
    """Even steps in t, from the last timestep to 0 (k-diffusion's DiscreteSchedule.get_sigmas). Returns [n + 1]."""
    table = sigma_table(model_or_sigmas)
    return finish(_log_linear(table, np.linspace(len(table) - 1, 0, count(n))), device)


@schedule("even in the model's timestep, the step to 0 included")
def get_sigmas_sgm_uniform(n: int, model_or_sigmas: Any, device: torch.device | str = "cpu") -> Tensor:
    """Even steps in t, of which the last, to 0, is one (Stability's generative-models). Returns [n + 1]."""
    table = sigma_table(model_or_sigmas)
    return finish(_log_linear(table, np.linspace(len(table) - 1, 0, count(n) + 1)[:-1]), device)


@schedule("timesteps at quantiles of a Beta distribution: dense at both ends")
def get_sigmas_beta(
    n: int, model_or_sigmas: Any, alpha: float = 0.6, beta: float = 0.6, device: torch.device | str = "cpu"
) -> Tensor:
    """Timesteps at even quantiles of a Beta distribution (2407.12173): dense at both ends. Returns [n + 1].

    t is not rounded, so that no two are equal: ComfyUI's, which rounds, drops some from n = 139 of 1000 on."""
    table = sigma_table(model_or_sigmas)
    quantiles = 1 - np.arange(count(n)) / n
    return finish(_log_linear(table, special.betaincinv(alpha, beta, quantiles) * (len(table) - 1)), device)


@schedule("every (N / n)-th timestep from the last down")
def get_sigmas_simple(n: int, model_or_sigmas: Any, device: torch.device | str = "cpu") -> Tensor:
    """Every (N / n)-th entry of the table, from the last one down, rounded up. Returns [n + 1]; n at most N."""
    table = sigma_table(model_or_sigmas)
    i = _whole(n, table)
    return finish(table[len(table) - 1 - i * len(table) // n], device)


@schedule("every (N / n)-th timestep from 1 up, the spacing of DDIM")
def get_sigmas_ddim_uniform(n: int, model_or_sigmas: Any, device: torch.device | str = "cpu") -> Tensor:
    """Timesteps 1, 1 + N/n, 1 + 2 N/n, ..., rounded down (0, 1, ... where n is N). Returns [n + 1]; n at most N.

    The DDIM spacing of LDM where n divides N; for other n LDM and ComfyUI take more steps than they were asked for."""
    table = sigma_table(model_or_sigmas)
    i = _whole(n, table)
    return finish(table[(i * len(table) // n + (n < len(table)))[::-1]], device)


@schedule("diffusers' default spacing: starts below the largest sigma")
def get_sigmas_leading(
    n: int, model_or_sigmas: Any, steps_offset: int = 1, device: torch.device | str = "cpu"
) -> Tensor:
    """diffusers' "leading" spacing: t = i (N // n) + steps_offset. Returns [n + 1]; n at most N.

    It starts below the model's largest sigma, far below where N // n loses much: n = 600 of 1000 from t = 600, n = 1
    from t = 1.
    steps_offset is 0 where n is N, for there is no timestep N."""
    table = sigma_table(model_or_sigmas)
    t = _whole(n, table) * (len(table) // n) + (steps_offset if n < len(table) else 0)
    if not 0 <= t[0] <= t[-1] < len(table):
        raise ValueError(f"steps_offset {steps_offset} leads to timestep {t[-1]} of {len(table)} with {n} steps")
    return finish(table[t[::-1]], device)


@schedule("diffusers' spacing from the last timestep down")
def get_sigmas_trailing(n: int, model_or_sigmas: Any, device: torch.device | str = "cpu") -> Tensor:
    """diffusers' "trailing" spacing: t = N (1 - i/n), rounded, less 1. Returns [n + 1]; n at most N."""
    table = sigma_table(model_or_sigmas)
    t = np.rint(len(table) - _whole(n, table) * (len(table) / n)).astype(int) - 1
    return finish(table[t], device)


@schedule("diffusers' even spacing in the timestep, sigma linear between whole ones")
def get_sigmas_linspace(n: int, model_or_sigmas: Any, device: torch.device | str = "cpu") -> Tensor:
    """diffusers' "linspace" spacing: even steps in t, as `normal`, but with sigma itself linear between the entries.

    Returns [n + 1]. One step starts from the last timestep (diffusers' from the first, which draws nothing)."""
    table = sigma_table(model_or_sigmas)
    t = np.linspace(len(table) - 1, 0, count(n))
    return finish(np.interp(t, np.arange(len(table)), table), device)


def sigma_table(model_or_sigmas: Any) -> Values:
    """The table of sigmas [N], ascending, as float64; TypeError if there is none."""
    table = getattr(model_or_sigmas, "sigmas", model_or_sigmas)
    if not isinstance(table, Tensor) or table.ndim != 1 or len(table) < 2:
        raise TypeError(f"expected a denoiser with a 1-D tensor .sigmas, or that tensor, got {model_or_sigmas!r}")
    values: Values = table.detach().cpu().double().numpy()
    return values


def _log_linear(table: Values, t: Values) -> Values:
    return np.exp(np.interp(t, np.arange(len(table)), np.log(table)))


def _whole(n: int, table: Values) -> np.ndarray[Any, np.dtype[np.int64]]:
    """0 .. n - 1; ValueError where the table has fewer timesteps."""
    if count(n) > len(table):
        raise ValueError(f"{n} steps do not fit: this schedule visits whole timesteps, and there are {len(table)}")
    return np.arange(n)
