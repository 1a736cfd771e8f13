"""The public samplers beyond k-diffusion's: ComfyUI's names, argument order and defaults, and `seeds`, by keyword only.

What they take, return and raise is what `ella_kd.samplers.functions` says.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ella_kd.samplers.adams import DEIS, IPNDM, GradientEstimation, Variable
from ella_kd.samplers.dpmpp import DPMpp2M
from ella_kd.samplers.driver import sample
from ella_kd.samplers.functions import Args, Seeds
from ella_kd.samplers.model import Callback, Model, NoiseSampler
from ella_kd.samplers.unipc import ResMultistepAncestral, UniPC


def sample_uni_pc(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 3,
    variant: Literal["bh1", "bh2"] = "bh1",
    lower_order_final: bool = True,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """UniPC (2302.04867), B(h) = h. Order max_order + 1, one evaluation per step."""
    solver = UniPC(variant, max_order, lower_order_final)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]


def sample_uni_pc_bh2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 3,
    lower_order_final: bool = True,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """UniPC (2302.04867), B(h) = e^h - 1. Order max_order + 1, one evaluation per step."""
    solver = UniPC("bh2", max_order, lower_order_final)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]


def sample_deis(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 3,
    variable: Variable = "log_sigma",
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DEIS (2204.13902), polynomial in log sigma, sigma or VP time. Order 3 (max_order), one evaluation per step."""
    return sample(DEIS(max_order, variable), model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]


def sample_ipndm(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 4,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """iPNDM (2202.09778), the weights of an even grid. Order 2 on uneven grids, one evaluation per step."""
    return sample(IPNDM(max_order), model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]


def sample_ipndm_v(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 4,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """iPNDM with the weights of the real grid: Adams-Bashforth in sigma, which is LMS. One evaluation per step.

    ComfyUI's weights of three and four terms are exact on even grids alone; these are exact on every grid."""
    return sample(DEIS(max_order, "sigma"), model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]


def sample_res_multistep(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """RES multistep (2308.02157), which is DPM-Solver++(2M) "heun". Order 2, one evaluation per step."""
    solver = DPMpp2M(solver_type="heun")
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]


def sample_res_multistep_ancestral(
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
    """RES multistep (2308.02157) with noise put back. Order 2 at eta 0, one evaluation per step."""
    solver = ResMultistepAncestral(eta, s_noise)
    return sample(solver, model, x, sigmas, extra_args, callback, disable, seeds=seeds, noise_sampler=noise_sampler)[0]


def sample_gradient_estimation(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Args = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    ge_gamma: float = 2.0,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Gradient estimation (2306.04848). Order 1 (2 at ge_gamma 1.5 on even grids), one evaluation per step."""
    return sample(GradientEstimation(ge_gamma), model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]
