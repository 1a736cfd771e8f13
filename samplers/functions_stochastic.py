"""More public samplers beyond k-diffusion's, those that can add noise: SEEDS, SA-Solver and ER-SDE.

ComfyUI's names, argument order and defaults, and `seeds`, by keyword only. What they take, return and raise is what
`ella_kd.samplers.functions` says.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ella_kd.samplers.driver import sample
from ella_kd.samplers.functions import Args, Seeds
from ella_kd.samplers.model import Callback, Model, NoiseSampler
from ella_kd.samplers.seeds import SEEDS2, SEEDS3
from ella_kd.samplers.stochastic_multistep import (
    ERSDE,
    SASolver,
    SASolverPECE,
    Scaler,
    er_sde_scaler,
    tau_of_the_middle,
)


def sample_seeds_2(
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
    solver_type: Literal["phi_1", "phi_2"] = "phi_1",
    *,
    seeds: Seeds = None,
) -> Tensor:
    """SEEDS-2 (2305.14267), Brownian noise. Order 2 at eta 0, two evaluations per step."""
    solver = SEEDS2(eta, s_noise, r, solver_type)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_exp_heun_2_x0(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    solver_type: Literal["phi_1", "phi_2"] = "phi_2",
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Exponential Heun in data prediction: SEEDS-2 at eta 0 and r 1. Order 2, two evaluations per step."""
    solver = SEEDS2(0.0, 0.0, 1.0, solver_type)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]


def sample_exp_heun_2_x0_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: Literal["phi_1", "phi_2"] = "phi_2",
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Exponential Heun with noise: SEEDS-2 at r 1. Order 2 at eta 0, two evaluations per step."""
    solver = SEEDS2(eta, s_noise, 1.0, solver_type)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_seeds_3(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """SEEDS-3 (2305.14267), Brownian noise. Order 3 at eta 0, three evaluations per step."""
    solver = SEEDS3(eta, s_noise, r_1, r_2)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_er_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    noise_scaler: Scaler | None = None,
    max_stage: int = 3,
    corrected: bool = False,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Extended reverse-time SDE (2309.06169); noise_scaler(sigma) of one's own. Order 2, or 3 corrected, without noise;
    one evaluation per step."""
    solver = ERSDE(s_noise, noise_scaler or er_sde_scaler, max_stage, corrected)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_sa_solver(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    tau_func: Scaler | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    predictor_order: int = 3,
    corrector_order: int = 4,
    simple_order_2: bool = False,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """SA-Solver (2309.05019); tau_func(sigma), by default 1 in the middle of SD1.5's range. Order 4 at tau 0, one
    evaluation per step."""
    solver = SASolver(tau_func or tau_of_the_middle, s_noise, predictor_order, corrector_order, simple_order_2)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_sa_solver_pece(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    tau_func: Scaler | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    predictor_order: int = 3,
    corrector_order: int = 4,
    simple_order_2: bool = False,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """SA-Solver (2309.05019) that evaluates the corrected x again. Order 4 at tau 0, two evaluations per step."""
    solver = SASolverPECE(tau_func or tau_of_the_middle, s_noise, predictor_order, corrector_order, simple_order_2)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]
