"""The public samplers: k-diffusion's names, argument order and defaults, and `seeds`, by keyword only.

model(x, sigma, **extra_args) -> denoised; x [B, C, h, w] float32 or float64 at noise level sigmas[0]; sigmas [n + 1].
All of them return x at sigmas[-1] and raise what `ella_kd.samplers.driver.sample` raises; seeds name the noise of each
row, and without them one seed per row is drawn from torch's global generator.
Their CFG++ forms are in `ella_kd.samplers.cfg_pp_functions`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from ella_kd.samplers.dpmpp import DPMpp2M, DPMpp2SAncestral
from ella_kd.samplers.driver import sample
from ella_kd.samplers.euler import Euler, EulerAncestral
from ella_kd.samplers.model import Callback, Model, NoiseSampler
from ella_kd.samplers.second_order import DPM2, Heun

Args = Mapping[str, Any] | None
Seeds = Sequence[int] | None


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Euler steps (2206.00364, Algorithm 2 without its correction). Order 1, one evaluation per step."""
    solver = Euler(s_churn, s_tmin, s_tmax, s_noise)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]


def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Euler steps with noise put back after each. Order 1 at eta 0, one evaluation per step."""
    solver = EulerAncestral(eta, s_noise)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Heun steps (2206.00364, Algorithm 2). Order 2, two evaluations per step."""
    solver = Heun(s_churn, s_tmin, s_tmax, s_noise)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]


def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver-2 (2206.00927). Order 2, two evaluations per step."""
    solver = DPM2(s_churn, s_tmin, s_tmax, s_noise)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]


def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++(2S) (2211.01095) with noise put back. Order 2 at eta 0, two evaluations per step."""
    solver = DPMpp2SAncestral(eta, s_noise)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++(2M) (2211.01095). Order 2, one evaluation per step."""
    return sample(DPMpp2M(), model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]


def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++(2M) SDE, Brownian noise. Order 2 at eta 0, one evaluation per step."""
    solver = DPMpp2M(eta, s_noise, solver_type)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]
