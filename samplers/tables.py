"""SAMPLERS and SCHEDULES: every sampler and schedule by name, with what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ella_kd.samplers import (
    cfg_pp_functions,
    compatible_schedules,
    functions,
    functions_exponential,
    functions_kd,
    functions_stochastic,
    schedules,
    timestep_schedules,
)
from ella_kd.samplers.adams import DEIS, IPNDM, GradientEstimation
from ella_kd.samplers.dpmpp import DPMpp2M, DPMpp2SAncestral
from ella_kd.samplers.dpmpp_sde import DPMpp3M, DPMppSDE
from ella_kd.samplers.euler import Euler, EulerAncestral
from ella_kd.samplers.heunpp import HeunPP2
from ella_kd.samplers.lcm import LCM
from ella_kd.samplers.lms import LMS
from ella_kd.samplers.restart import Restart
from ella_kd.samplers.second_order import DPM2, DPM2Ancestral, Heun
from ella_kd.samplers.seeds import SEEDS2, SEEDS3
from ella_kd.samplers.solver import Solver
from ella_kd.samplers.stochastic_multistep import ERSDE, SASolver, SASolverPECE
from ella_kd.samplers.unipc import ResMultistepAncestral, UniPC


@dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS. `function` is the public sample_*, `solver` the method with that function's defaults."""

    name: str
    function: Callable[..., Tensor]
    solver: Solver
    family: str
    cfg_pp: bool = False

    @property
    def order(self) -> int:
        """Order of convergence of the deterministic form."""
        return self.solver.order

    @property
    def evals(self) -> int:
        """Model evaluations per step."""
        return self.solver.evals

    @property
    def stochastic(self) -> bool:
        """Whether it adds noise with the default options."""
        return bool(self.solver.steps((2.0, 1.0))[0].noises)


@dataclass(frozen=True)
class Schedule:
    """A row of SCHEDULES. `function` is the public get_sigmas_*; `sigmas(n, model)` calls it with what it needs of a
    denoiser (sigma_min, sigma_max, sigmas) and returns [n + 1] on the CPU."""

    name: str
    function: Callable[..., Tensor]
    sigmas: Callable[[int, Any], Tensor]
    description: str


def _sampler(function: Callable[..., Tensor], solver: Solver, family: str) -> Sampler:
    return Sampler(function.__name__.removeprefix("sample_"), function, solver, family)


def _schedule(
    function: Callable[..., Tensor], description: str, sigmas: Callable[[int, Any], Tensor] | None = None
) -> Schedule:
    """A row whose `sigmas(n, model)` is the function itself, which takes the model, or as given."""
    return Schedule(function.__name__.removeprefix("get_sigmas_"), function, sigmas or function, description)


def _ranged(function: Callable[..., Tensor], description: str) -> Schedule:
    return _schedule(function, description, lambda n, model: function(n, model.sigma_min, model.sigma_max))


def _nodes(function: Callable[..., Tensor], description: str) -> Schedule:
    return _schedule(function, description, lambda n, model: function(n))


SAMPLERS: dict[str, Sampler] = {
    row.name: row
    for row in (
        _sampler(functions.sample_euler, Euler(), "Euler"),
        _sampler(functions.sample_euler_ancestral, EulerAncestral(), "Euler"),
        _sampler(functions.sample_heun, Heun(), "Heun (EDM)"),
        _sampler(functions.sample_dpm_2, DPM2(), "DPM-Solver"),
        _sampler(functions.sample_dpmpp_2s_ancestral, DPMpp2SAncestral(), "DPM-Solver++"),
        _sampler(functions.sample_dpmpp_2m, DPMpp2M(), "DPM-Solver++"),
        _sampler(functions.sample_dpmpp_2m_sde, DPMpp2M(eta=1.0), "DPM-Solver++"),
        _sampler(functions_kd.sample_dpm_2_ancestral, DPM2Ancestral(), "DPM-Solver"),
        _sampler(functions_kd.sample_lms, LMS(), "Adams-Bashforth"),
        _sampler(functions_kd.sample_dpmpp_sde, DPMppSDE(), "DPM-Solver++"),
        _sampler(functions_kd.sample_dpmpp_3m_sde, DPMpp3M(), "DPM-Solver++"),
        _sampler(functions_kd.sample_ddim, EulerAncestral(eta=0.0), "DDIM"),
        _sampler(functions_kd.sample_ddpm, EulerAncestral(), "DDPM"),
        _sampler(functions_kd.sample_lcm, LCM(), "consistency"),
        _sampler(functions_kd.sample_heunpp2, HeunPP2(), "Heun++, no paper"),
        _sampler(functions_kd.sample_restart, Restart(), "Restart, Heun"),
        _sampler(functions_exponential.sample_uni_pc, UniPC(), "UniPC"),
        _sampler(functions_exponential.sample_uni_pc_bh2, UniPC("bh2"), "UniPC"),
        _sampler(functions_exponential.sample_deis, DEIS(), "DEIS"),
        _sampler(functions_exponential.sample_ipndm, IPNDM(), "iPNDM"),
        _sampler(functions_exponential.sample_ipndm_v, DEIS(4, "sigma"), "Adams-Bashforth"),
        _sampler(functions_exponential.sample_res_multistep, DPMpp2M(solver_type="heun"), "RES, DPM-Solver++"),
        _sampler(functions_exponential.sample_res_multistep_ancestral, ResMultistepAncestral(), "RES"),
        _sampler(functions_exponential.sample_gradient_estimation, GradientEstimation(), "gradient estimation"),
        _sampler(functions_stochastic.sample_exp_heun_2_x0, SEEDS2(eta=0.0, r=1.0, solver_type="phi_2"), "SEEDS"),
        _sampler(functions_stochastic.sample_exp_heun_2_x0_sde, SEEDS2(r=1.0, solver_type="phi_2"), "SEEDS"),
        _sampler(functions_stochastic.sample_seeds_2, SEEDS2(), "SEEDS"),
        _sampler(functions_stochastic.sample_seeds_3, SEEDS3(), "SEEDS"),
        _sampler(functions_stochastic.sample_er_sde, ERSDE(), "ER-SDE"),
        _sampler(functions_stochastic.sample_sa_solver, SASolver(), "SA-Solver"),
        _sampler(functions_stochastic.sample_sa_solver_pece, SASolverPECE(), "SA-Solver"),
    )
}


def _cfg_pp_rows(base: Sampler) -> Iterator[Sampler]:
    for variant in ("", "_paper", "_comfyui"):
        name = f"{base.name}{variant}_cfg_pp"
        function = getattr(cfg_pp_functions, f"sample_{name}", None)
        if function is not None:
            yield Sampler(name, function, base.solver, base.family, cfg_pp=True)


SAMPLERS.update({row.name: row for base in list(SAMPLERS.values()) for row in _cfg_pp_rows(base)})

SCHEDULES: dict[str, Schedule] = {
    row.name: row
    for row in (
        _ranged(schedules.get_sigmas_karras, "even in sigma^(1/7), Karras et al. 2022"),
        _ranged(schedules.get_sigmas_exponential, "even in log sigma"),
        _ranged(
            schedules.get_sigmas_polyexponential,
            "log sigma falls as a power of even steps; with power 1, its default, exponential",
        ),
        _schedule(
            schedules.get_sigmas_vp,
            "even in the time of a continuous VP process, fitted to the model's range",
            lambda n, model: schedules.get_sigmas_vp(n, *schedules.vp_betas(model.sigma_min, model.sigma_max)),
        ),
        _ranged(
            schedules.get_sigmas_laplace,
            "even quantiles of a Laplace distribution of log sigma: dense about sigma 1",
        ),
        _ranged(schedules.get_sigmas_kl_optimal, "even in arctan sigma"),
        _schedule(
            schedules.get_sigmas_linear_quadratic,
            "half the steps linear in sigma near the top, then a parabola; made for flow models",
            lambda n, model: schedules.get_sigmas_linear_quadratic(n, model.sigma_max),
        ),
        _nodes(schedules.get_sigmas_ays, "Align Your Steps, ten nodes optimised for SD1.5"),
        _nodes(schedules.get_sigmas_ays_sdxl, "Align Your Steps, ten nodes optimised for SDXL"),
        _nodes(schedules.get_sigmas_gits, "GITS, ten nodes found for SD1.5"),
        _schedule(timestep_schedules.get_sigmas_normal, "even in the model's timestep"),
        _schedule(timestep_schedules.get_sigmas_sgm_uniform, "even in the model's timestep, the step to 0 included"),
        _schedule(timestep_schedules.get_sigmas_simple, "every (N / n)-th timestep from the last down"),
        _schedule(
            timestep_schedules.get_sigmas_ddim_uniform,
            "every (N / n)-th timestep from 1 up, the spacing of DDIM",
        ),
        _schedule(
            timestep_schedules.get_sigmas_beta,
            "timesteps at quantiles of a Beta distribution: dense at both ends",
        ),
        _schedule(timestep_schedules.get_sigmas_leading, "diffusers' default spacing: starts below the largest sigma"),
        _schedule(timestep_schedules.get_sigmas_trailing, "diffusers' spacing from the last timestep down"),
        _schedule(
            timestep_schedules.get_sigmas_linspace,
            "diffusers' even spacing in the timestep, sigma linear between whole ones",
        ),
    )
}

COMPATIBLE_SCHEDULES: dict[str, Schedule] = {
    row.name: row
    for row in (
        _schedule(
            compatible_schedules.get_sigmas_beta_comfyui,
            "ComfyUI's beta: rounded timesteps, equal ones dropped",
        ),
        _ranged(compatible_schedules.get_sigmas_beta_a1111, "A1111's Beta: quantiles of sigma itself"),
        _ranged(compatible_schedules.get_sigmas_kl_optimal_a1111, "A1111's KL Optimal: ends at sigma_min, no 0"),
        _ranged(compatible_schedules.get_sigmas_laplace_comfyui, "ComfyUI's Laplace: clamped to the range, no 0"),
        _schedule(
            compatible_schedules.get_sigmas_ddim_uniform_comfyui,
            "ComfyUI's ddim_uniform: more steps than asked where n does not divide N",
        ),
        _nodes(
            compatible_schedules.get_sigmas_ays_a1111,
            "A1111's Align Your Steps: eleven nodes interpolated to n, then 0",
        ),
    )
}
"""What other programs mean by a name where `SCHEDULES` means something else; not all give n + 1 values, or end in 0."""
