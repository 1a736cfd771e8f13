"""`sample_NAME_cfg_pp` for every sampler that walks a fixed grid, made from `sample_NAME` by one function.

Same arguments, and by keyword only `scale`, what the model's cond_scale means: "lam" (lambda itself, 0 to 1, as in the
paper and ComfyUI), "cfg / 12.5" (A1111's slider) or "normalised" (equal strength at any number of steps); see
`ella_kd.samplers.cfg_pp.CFGpp`. The model must have `predict`, as CFGDenoiser has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ella_kd.samplers import functions, functions_exponential, functions_kd, functions_stochastic
from ella_kd.samplers.cfg_pp import CFGpp, Scale
from ella_kd.samplers.solver import Step

Function = Callable[..., Tensor]


def cfg_pp_form(function: Function, gain: Callable[[Step], float] | None = None, variant: str = "") -> Function:
    """`sample_NAME_cfg_pp` of a `sample_NAME`: the same method on U, with D - U added once per step.

    gain: how many times a step adds D - U instead; variant: what sets that apart in the name, NAME_VARIANT_cfg_pp."""

    def form(model: Any, *args: Any, scale: Scale = "lam", **kwargs: Any) -> Tensor:
        return function(CFGpp(model, scale, **({} if gain is None else {"gain": gain})), *args, **kwargs)

    signature = inspect.signature(function, eval_str=False)
    parameters = list(signature.parameters.values())
    own = inspect.Parameter("scale", inspect.Parameter.KEYWORD_ONLY, default="lam", annotation="Scale")
    form.__signature__ = signature.replace(parameters=[*parameters, own])  # type: ignore[attr-defined]
    form.__name__ = form.__qualname__ = f"{function.__name__}{variant and '_' + variant}_cfg_pp"
    form.__annotations__ = {**function.__annotations__, "scale": "Scale"}
    form.__doc__ = (
        f"{(function.__doc__ or '').strip()}\n\n"
        "    With CFG++ (2406.08070): these steps walk on U, and each adds D - U of its first evaluation once"
        f"{'' if gain is None else ' (' + (gain.__doc__ or '').strip() + ')'}.\n"
        "    cond_scale is lambda, or what `scale` says."
    )
    return form


def _paper_code(step: Step) -> float:
    """as the paper's code and ComfyUI do it: D - U_old in the extrapolation where the paper's text has U - U_old"""
    return 1 + step.weights[2]


def _comfyui_res(step: Step) -> float:
    """as ComfyUI does it: e^-h (D - U) on each step that extrapolates"""
    to_x, _, extra, _ = step.weights
    return to_x if extra else 1.0


sample_euler_cfg_pp = cfg_pp_form(functions.sample_euler)
sample_euler_ancestral_cfg_pp = cfg_pp_form(functions.sample_euler_ancestral)
sample_heun_cfg_pp = cfg_pp_form(functions.sample_heun)
sample_dpm_2_cfg_pp = cfg_pp_form(functions.sample_dpm_2)
sample_dpmpp_2s_ancestral_cfg_pp = cfg_pp_form(functions.sample_dpmpp_2s_ancestral)
sample_dpmpp_2m_cfg_pp = cfg_pp_form(functions.sample_dpmpp_2m)
sample_dpmpp_2m_paper_cfg_pp = cfg_pp_form(functions.sample_dpmpp_2m, _paper_code, "paper")
sample_dpmpp_2m_sde_cfg_pp = cfg_pp_form(functions.sample_dpmpp_2m_sde)
sample_dpm_2_ancestral_cfg_pp = cfg_pp_form(functions_kd.sample_dpm_2_ancestral)
sample_lms_cfg_pp = cfg_pp_form(functions_kd.sample_lms)
sample_dpmpp_sde_cfg_pp = cfg_pp_form(functions_kd.sample_dpmpp_sde)
sample_dpmpp_3m_sde_cfg_pp = cfg_pp_form(functions_kd.sample_dpmpp_3m_sde)
sample_ddim_cfg_pp = cfg_pp_form(functions_kd.sample_ddim)
sample_ddpm_cfg_pp = cfg_pp_form(functions_kd.sample_ddpm)
sample_lcm_cfg_pp = cfg_pp_form(functions_kd.sample_lcm)
sample_heunpp2_cfg_pp = cfg_pp_form(functions_kd.sample_heunpp2)
sample_restart_cfg_pp = cfg_pp_form(functions_kd.sample_restart)
sample_uni_pc_cfg_pp = cfg_pp_form(functions_exponential.sample_uni_pc)
sample_uni_pc_bh2_cfg_pp = cfg_pp_form(functions_exponential.sample_uni_pc_bh2)
sample_deis_cfg_pp = cfg_pp_form(functions_exponential.sample_deis)
sample_ipndm_cfg_pp = cfg_pp_form(functions_exponential.sample_ipndm)
sample_ipndm_v_cfg_pp = cfg_pp_form(functions_exponential.sample_ipndm_v)
sample_res_multistep_cfg_pp = cfg_pp_form(functions_exponential.sample_res_multistep)
sample_res_multistep_comfyui_cfg_pp = cfg_pp_form(functions_exponential.sample_res_multistep, _comfyui_res, "comfyui")
sample_res_multistep_ancestral_cfg_pp = cfg_pp_form(functions_exponential.sample_res_multistep_ancestral)
sample_gradient_estimation_cfg_pp = cfg_pp_form(functions_exponential.sample_gradient_estimation)
sample_exp_heun_2_x0_cfg_pp = cfg_pp_form(functions_stochastic.sample_exp_heun_2_x0)
sample_exp_heun_2_x0_sde_cfg_pp = cfg_pp_form(functions_stochastic.sample_exp_heun_2_x0_sde)
sample_seeds_2_cfg_pp = cfg_pp_form(functions_stochastic.sample_seeds_2)
sample_seeds_3_cfg_pp = cfg_pp_form(functions_stochastic.sample_seeds_3)
sample_er_sde_cfg_pp = cfg_pp_form(functions_stochastic.sample_er_sde)
sample_sa_solver_cfg_pp = cfg_pp_form(functions_stochastic.sample_sa_solver)
sample_sa_solver_pece_cfg_pp = cfg_pp_form(functions_stochastic.sample_sa_solver_pece)

COMFYUI: dict[str, Function] = {
    "euler_cfg_pp": sample_euler_cfg_pp,
    "euler_ancestral_cfg_pp": sample_euler_ancestral_cfg_pp,
    "dpmpp_2s_ancestral_cfg_pp": sample_dpmpp_2s_ancestral_cfg_pp,
    "dpmpp_2m_cfg_pp": sample_dpmpp_2m_paper_cfg_pp,
    "res_multistep_cfg_pp": sample_res_multistep_comfyui_cfg_pp,
    "gradient_estimation_cfg_pp": sample_gradient_estimation_cfg_pp,
}
"""ComfyUI's CFG++ samplers by its names, with its meaning; its cfg is cond_scale, lambda."""
