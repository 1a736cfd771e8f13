"""The public samplers that k-diffusion has beside those of `ella_kd.samplers.functions`, and the old ones that others
added to it: names, argument order and defaults are theirs, and `seeds`, by keyword only.

What they take, return and raise is what `ella_kd.samplers.functions` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ella_kd.samplers.dpm_solver import DPMFast, orders
from ella_kd.samplers.dpmpp_sde import DPMpp3M, DPMppSDE
from ella_kd.samplers.driver import sample
from ella_kd.samplers.euler import EulerAncestral
from ella_kd.samplers.functions import Args, Seeds
from ella_kd.samplers.heunpp import HeunPP2
from ella_kd.samplers.lcm import LCM
from ella_kd.samplers.lms import LMS
from ella_kd.samplers.model import Callback, Model, NoiseSampler
from ella_kd.samplers.restart import Restart
from ella_kd.samplers.second_order import DPM2Ancestral


def sample_dpm_2_ancestral(
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
    """DPM-Solver-2 (2206.00927) with noise put back. Order 2 at eta 0, two evaluations per step."""
    solver = DPM2Ancestral(eta, s_noise)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Linear multistep through the last `order` slopes. Order 4 from an exact start, falling towards 2 from Euler's,
    which is a run's. One evaluation per step."""
    solver = LMS(order)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]


def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 0.5,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++(2S) SDE (2211.01095), Brownian noise at both stages. Order 2 at eta 0, two evaluations per step."""
    solver = DPMppSDE(eta, s_noise, r)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_dpmpp_3m_sde(
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
    corrected: bool = False,
    seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++(3M) SDE, Brownian noise. One evaluation per step. Order 2 at eta 0 as in k-diffusion; corrected:
    with the factor 2 that its third-order term lacks there, order 3 from an exact start."""
    solver = DPMpp3M(eta, s_noise, corrected)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_ddim(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DDIM (2010.02502, eq. 12 and 16), which is Euler ancestral: eta 0 is Euler, eta 1 DDPM. Order 1 at eta 0, one
    evaluation per step."""
    solver = EulerAncestral(eta, s_noise)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_ddpm(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    *,
    s_noise: float = 1.0,
    seeds: Seeds = None,
) -> Tensor:
    """DDPM's ancestral sampling (2006.11239, Algorithm 2, the smaller variance) on any schedule: DDIM with eta 1. One
    evaluation per step."""
    solver = EulerAncestral(s_noise=s_noise)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_lcm(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    *,
    s_noise: float = 1.0,
    seeds: Seeds = None,
) -> Tensor:
    """Multistep consistency sampling (2303.01469, 2310.04378), for models distilled for it. One evaluation per step."""
    solver = LCM(s_noise)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_heunpp2(
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
    """Heun++, a heuristic of three slopes. Order 1, three evaluations per step."""
    solver = HeunPP2(s_churn, s_tmin, s_tmax, s_noise)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]


def sample_dpm_fast(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    n: int,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver-fast (2206.00927): n evaluations on steps of order 3, the last ones lower, from x at sigma_max to
    sigma_min, above 0 (a sigma_min above sigma_max inverts)."""
    solver = DPMFast(eta, s_noise, n)
    high, low = float(sigma_max), float(sigma_min)
    if not (0 < low < math.inf and 0 < high < math.inf):
        raise ValueError(f"sigma_min and sigma_max must be above 0 and finite, got {low} and {high}")
    places = torch.linspace(math.log(high), math.log(low), len(orders(n)) + 1, dtype=torch.float64)
    sigmas = places.exp().to(x.dtype)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_restart(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    restart_list: Mapping[float, Sequence[float]] | None = None,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Restart sampling (2306.14878) on Heun steps. restart_list is A1111's, {sigma_min: [sigmas, times, sigma_max]},
    sigmas counting those of the way down with both ends; None is {0.1: [10, 1, 2]}. Order 2, two evaluations per
    step, and the restarts' on top: the schedule is not shortened for them, as A1111 does."""
    listed = {0.1: (10, 1, 2.0)} if restart_list is None else restart_list
    intervals = tuple((float(low), int(n) - 1, int(times), float(high)) for low, (n, times, high) in listed.items())
    solver = Restart(intervals, s_noise)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]
