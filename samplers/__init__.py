"""Samplers, step schedules and noise: they know x, sigma and a model, nothing of text or networks."""

from ella_kd.samplers.dpmpp import DPMpp2M, DPMpp2SAncestral
from ella_kd.samplers.driver import sample
from ella_kd.samplers.euler import Euler, EulerAncestral
from ella_kd.samplers.functions import (
    sample_dpm_2,
    sample_dpmpp_2m,
    sample_dpmpp_2m_cfg_pp,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_euler,
    sample_euler_ancestral,
    sample_euler_ancestral_cfg_pp,
    sample_euler_cfg_pp,
    sample_heun,
)
from ella_kd.samplers.noise import BrownianNoise, NormalNoise, randn
from ella_kd.samplers.schedules import (
    get_sigmas_ays,
    get_sigmas_ays_sdxl,
    get_sigmas_exponential,
    get_sigmas_gits,
    get_sigmas_karras,
    get_sigmas_kl_optimal,
    get_sigmas_laplace,
    get_sigmas_linear_quadratic,
    get_sigmas_polyexponential,
    get_sigmas_vp,
)
from ella_kd.samplers.second_order import DPM2, Heun
from ella_kd.samplers.solver import Solver, Step
from ella_kd.samplers.tables import SAMPLERS, SCHEDULES, Sampler, Schedule, get_sampler, get_schedule
from ella_kd.samplers.timestep_schedules import (
    get_sigmas_beta,
    get_sigmas_ddim_uniform,
    get_sigmas_leading,
    get_sigmas_linspace,
    get_sigmas_normal,
    get_sigmas_sgm_uniform,
    get_sigmas_simple,
    get_sigmas_trailing,
)

__all__ = [
    "DPM2",
    "SAMPLERS",
    "SCHEDULES",
    "BrownianNoise",
    "DPMpp2M",
    "DPMpp2SAncestral",
    "Euler",
    "EulerAncestral",
    "Heun",
    "NormalNoise",
    "Sampler",
    "Schedule",
    "Solver",
    "Step",
    "get_sampler",
    "get_schedule",
    "get_sigmas_ays",
    "get_sigmas_ays_sdxl",
    "get_sigmas_beta",
    "get_sigmas_ddim_uniform",
    "get_sigmas_exponential",
    "get_sigmas_gits",
    "get_sigmas_karras",
    "get_sigmas_kl_optimal",
    "get_sigmas_laplace",
    "get_sigmas_leading",
    "get_sigmas_linear_quadratic",
    "get_sigmas_linspace",
    "get_sigmas_normal",
    "get_sigmas_polyexponential",
    "get_sigmas_sgm_uniform",
    "get_sigmas_simple",
    "get_sigmas_trailing",
    "get_sigmas_vp",
    "randn",
    "sample",
    "sample_dpm_2",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_cfg_pp",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_euler_ancestral_cfg_pp",
    "sample_euler_cfg_pp",
    "sample_heun",
]
