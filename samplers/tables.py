"""SAMPLERS and SCHEDULES: every sampler and schedule by name, with what is known of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

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


def _sampler(name: str, solver: Solver, family: str) -> Sampler:
    return Sampler(name, getattr(functions, f"sample_{name}"), solver, family)


def _exponential(name: str, solver: Solver, family: str) -> Sampler:
    return Sampler(name, getattr(functions_exponential, f"sample_{name}"), solver, family)


def _stochastic(name: str, solver: Solver, family: str) -> Sampler:
    return Sampler(name, getattr(functions_stochastic, f"sample_{name}"), solver, family)


def _kd(name: str, solver: Solver, family: str) -> Sampler:
    return Sampler(name, getattr(functions_kd, f"sample_{name}"), solver, family)


def _ranged(name: str, description: str) -> Schedule:
    function = getattr(schedules, f"get_sigmas_{name}")
    return Schedule(name, function, lambda n, model: function(n, model.sigma_min, model.sigma_max), description)


def _nodes(name: str, description: str) -> Schedule:
    function = getattr(schedules, f"get_sigmas_{name}")
    return Schedule(name, function, lambda n, model: function(n), description)


def _timesteps(name: str, description: str) -> Schedule:
    function = getattr(timestep_schedules, f"get_sigmas_{name}")
    return Schedule(name, function, function, description)


def _compatible(name: str, description: str, ranged: bool = False) -> Schedule:
    function = getattr(compatible_schedules, f"get_sigmas_{name}")
    if ranged:
        return Schedule(name, function, lambda n, model: function(n, model.sigma_min, model.sigma_max), description)
    return Schedule(name, function, function, description)


SAMPLERS: dict[str, Sampler] = {
    row.name: row
    for row in (
        _sampler("euler", Euler(), "Euler"),
        _sampler("euler_ancestral", EulerAncestral(), "Euler"),
        _sampler("heun", Heun(), "Heun (EDM)"),
        _sampler("dpm_2", DPM2(), "DPM-Solver"),
        _sampler("dpmpp_2s_ancestral", DPMpp2SAncestral(), "DPM-Solver++"),
        _sampler("dpmpp_2m", DPMpp2M(), "DPM-Solver++"),
        _sampler("dpmpp_2m_sde", DPMpp2M(eta=1.0), "DPM-Solver++"),
        _kd("dpm_2_ancestral", DPM2Ancestral(), "DPM-Solver"),
        _kd("lms", LMS(), "Adams-Bashforth"),
        _kd("dpmpp_sde", DPMppSDE(), "DPM-Solver++"),
        _kd("dpmpp_3m_sde", DPMpp3M(), "DPM-Solver++"),
        _kd("ddim", EulerAncestral(eta=0.0), "DDIM"),
        _kd("ddpm", EulerAncestral(), "DDPM"),
        _kd("lcm", LCM(), "consistency"),
        _kd("heunpp2", HeunPP2(), "Heun++, no paper"),
        _kd("restart", Restart(), "Restart, Heun"),
        _exponential("uni_pc", UniPC(), "UniPC"),
        _exponential("uni_pc_bh2", UniPC("bh2"), "UniPC"),
        _exponential("deis", DEIS(), "DEIS"),
        _exponential("ipndm", IPNDM(), "iPNDM"),
        _exponential("ipndm_v", DEIS(4, "sigma"), "Adams-Bashforth"),
        _exponential("res_multistep", DPMpp2M(solver_type="heun"), "RES, DPM-Solver++"),
        _exponential("res_multistep_ancestral", ResMultistepAncestral(), "RES"),
        _exponential("gradient_estimation", GradientEstimation(), "gradient estimation"),
        _stochastic("exp_heun_2_x0", SEEDS2(eta=0.0, r=1.0, solver_type="phi_2"), "SEEDS"),
        _stochastic("exp_heun_2_x0_sde", SEEDS2(r=1.0, solver_type="phi_2"), "SEEDS"),
        _stochastic("seeds_2", SEEDS2(), "SEEDS"),
        _stochastic("seeds_3", SEEDS3(), "SEEDS"),
        _stochastic("er_sde", ERSDE(), "ER-SDE"),
        _stochastic("sa_solver", SASolver(), "SA-Solver"),
        _stochastic("sa_solver_pece", SASolverPECE(), "SA-Solver"),
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
        _ranged("karras", "even in sigma^(1/7), Karras et al. 2022"),
        _ranged("exponential", "even in log sigma"),
        _ranged("polyexponential", "log sigma falls as a power of even steps; with power 1, its default, exponential"),
        Schedule(
            "vp",
            schedules.get_sigmas_vp,
            lambda n, model: schedules.get_sigmas_vp(n, *schedules.vp_betas(model.sigma_min, model.sigma_max)),
            "even in the time of a continuous VP process, fitted to the model's range",
        ),
        _ranged("laplace", "even quantiles of a Laplace distribution of log sigma: dense about sigma 1"),
        _ranged("kl_optimal", "even in arctan sigma"),
        Schedule(
            "linear_quadratic",
            schedules.get_sigmas_linear_quadratic,
            lambda n, model: schedules.get_sigmas_linear_quadratic(n, model.sigma_max),
            "half the steps linear in sigma near the top, then a parabola; made for flow models",
        ),
        _nodes("ays", "Align Your Steps, ten nodes optimised for SD1.5"),
        _nodes("ays_sdxl", "Align Your Steps, ten nodes optimised for SDXL"),
        _nodes("gits", "GITS, ten nodes found for SD1.5"),
        _timesteps("normal", "even in the model's timestep"),
        _timesteps("sgm_uniform", "even in the model's timestep, the step to 0 included"),
        _timesteps("simple", "every (N / n)-th timestep from the last down"),
        _timesteps("ddim_uniform", "every (N / n)-th timestep from 1 up, the spacing of DDIM"),
        _timesteps("beta", "timesteps at quantiles of a Beta distribution: dense at both ends"),
        _timesteps("leading", "diffusers' default spacing: starts below the largest sigma"),
        _timesteps("trailing", "diffusers' spacing from the last timestep down"),
        _timesteps("linspace", "diffusers' even spacing in the timestep, sigma linear between whole ones"),
    )
}

COMPATIBLE_SCHEDULES: dict[str, Schedule] = {
    row.name: row
    for row in (
        _compatible("beta_comfyui", "ComfyUI's beta: rounded timesteps, equal ones dropped"),
        _compatible("beta_a1111", "A1111's Beta: quantiles of sigma itself", ranged=True),
        _compatible("kl_optimal_a1111", "A1111's KL Optimal: ends at sigma_min, no 0", ranged=True),
        _compatible("laplace_comfyui", "ComfyUI's Laplace: clamped to the range, no 0", ranged=True),
        _compatible("ddim_uniform_comfyui", "ComfyUI's ddim_uniform: more steps than asked where n does not divide N"),
        Schedule(
            "ays_a1111",
            compatible_schedules.get_sigmas_ays_a1111,
            lambda n, model: compatible_schedules.get_sigmas_ays_a1111(n),
            "A1111's Align Your Steps: eleven nodes interpolated to n, then 0",
        ),
    )
}
"""What other programs mean by a name where `SCHEDULES` means something else; not all give n + 1 values, or end in 0."""

Row = TypeVar("Row")


def get_sampler(name: str) -> Sampler:
    """The row of SAMPLERS of that name; ValueError names the nearest ones where there is none."""
    return _lookup(SAMPLERS, name, "sampler")


def get_schedule(name: str) -> Schedule:
    """The row of SCHEDULES or COMPATIBLE_SCHEDULES of that name; ValueError names the nearest ones if there is none."""
    return _lookup({**SCHEDULES, **COMPATIBLE_SCHEDULES}, name, "schedule")


def _lookup(table: Mapping[str, Row], name: str, what: str) -> Row:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=3, cutoff=0.4)
    advice = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(table)}"
    raise ValueError(f"unknown {what} {name!r}: {advice}")
