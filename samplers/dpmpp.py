"""DPM-Solver++ (2211.01095): 2S ancestral and its SDE form, 2M and 3M with theirs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ella_kd.samplers.multistep import DataMultistep, DataWeights
from ella_kd.samplers.registry import Args, Callback, Model, NoiseSampler, Seeds, cfg_pp_form, sampler, walk
from ella_kd.samplers.solver import Ancestral, Step, pairs, refuse_other
from ella_kd.samplers.stages import LAND, Stage, Staged, Stages

__all__ = [
    "DPMpp2M", "DPMpp2SAncestral", "DPMpp3M", "DPMppSDE", "sample_dpmpp_2m", "sample_dpmpp_2m_cfg_pp",
    "sample_dpmpp_2m_paper_cfg_pp", "sample_dpmpp_2m_sde", "sample_dpmpp_2m_sde_cfg_pp", "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_2s_ancestral_cfg_pp", "sample_dpmpp_3m_sde", "sample_dpmpp_3m_sde_cfg_pp", "sample_dpmpp_sde",
    "sample_dpmpp_sde_cfg_pp",
]


@dataclass(frozen=True)
class DPMpp2SAncestral(Staged, Ancestral[Stages]):
    """DPM-Solver++(2S) down to sigma_down through the middle in log sigma, then noise (k-diffusion).

    Order 2 at eta 0, two evaluations per step; one where sigma_down is 0."""

    order = 2
    evals = 2

    def between(self, s: float, t: float, n: int) -> Step[Stages]:
        down, up = self.down_up(s, t)
        noises = pairs(up, s, t)
        if down == 0:
            return Step((s,), (Stage(0.0, (1.0,), up),), noises)
        mid = (s * down) ** 0.5
        stages = Stage(mid / s, ((s - mid) / s,)), Stage(down / s, (0.0, (s - down) / s), up)
        return Step((s, mid), stages, noises)


@sampler(DPMpp2SAncestral(), "DPM-Solver++")
def sample_dpmpp_2s_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    *, seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++(2S) (2211.01095) with noise put back. Order 2 at eta 0, two evaluations per step."""
    return walk(DPMpp2SAncestral(eta, s_noise), model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler)


sample_dpmpp_2s_ancestral_cfg_pp = cfg_pp_form(sample_dpmpp_2s_ancestral)


@dataclass(frozen=True)
class DPMppSDE(Staged, Ancestral[Stages]):
    """DPM-Solver++(2S) with noise at both stages: an ancestral trial step to a sigma m, a fraction r of the way in log
    sigma, then an ancestral step along (1 - 1/2r) D + 1/2r D(m). At eta 0 and r = 1/2 it equals DPMpp2SAncestral.

    Order 2 at eta 0, two evaluations per step; one where the step lands on sigma 0. Brownian noise."""

    r: float = 0.5
    order = 2
    evals = 2
    noise = "brownian"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.r <= 1:
            raise ValueError(f"r must be above 0 and at most 1, got {self.r}")

    def between(self, s: float, t: float, n: int) -> Step[Stages]:
        if t == 0:
            return Step((s,), LAND)
        m, mix = s ** (1 - self.r) * t**self.r, 1 / (2 * self.r)
        (down_m, up_m), (down, up) = (self.down_up(s, to) for to in (m, t))
        trial = Stage(down_m / s, ((s - down_m) / s,), up_m)
        whole = (s - down) / s
        end = Stage(down / s, (whole * (1 - mix), whole * mix), up)
        return Step((s, m), (trial, end), pairs(up_m, s, m) + pairs(up, s, t))


@sampler(DPMppSDE(), "DPM-Solver++")
def sample_dpmpp_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    r: float = 0.5, *, seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++(2S) SDE (2211.01095), Brownian noise at both stages. Order 2 at eta 0, two evaluations per step."""
    return walk(DPMppSDE(eta, s_noise, r), model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler)


sample_dpmpp_sde_cfg_pp = cfg_pp_form(sample_dpmpp_sde)


@dataclass(frozen=True)
class DPMpp2M(DataMultistep, Ancestral[DataWeights]):
    """DPM-Solver++(2M), and with eta > 0 its SDE form: two-step multistep, first order at the start and to sigma 0.

    x' = e^-H x + b D + k (h / h_old) (D - D_old) + t sqrt(1 - e^-2 eta h) noise, with H = (1 + eta) h, b = 1 - e^-H,
    k = b / 2 ("midpoint") or 1 - b / H ("heun"). Order 2 at eta 0, one evaluation per step. Brownian noise."""

    eta: float = 0.0
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    order = 2
    noise = "brownian"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_other("solver_type", self.solver_type, "midpoint", "heun")

    def steps(self, sigmas: Sequence[float]) -> list[Step[DataWeights]]:
        steps, h_old = [], math.inf  # no step before: no extrapolation
        for s, t in pairwise(sigmas):
            h, H, up = self.sde(s, t)
            b = -math.expm1(-H)
            extra = b / 2 if self.solver_type == "midpoint" else 1 - b / H
            extra = extra * h / h_old if t > 0 else 0.0
            steps.append(Step((s,), DataWeights(math.exp(-H), (b + extra, -extra), up), pairs(up, s, t)))
            h_old = h
        return steps


def _paper_code(step: Step[DataWeights]) -> float:
    """as the paper's code and ComfyUI do it: D - U_old in the extrapolation where the paper's text has U - U_old"""
    _, old = step.weights.to_denoised
    return 1 - old


@sampler(DPMpp2M(), "DPM-Solver++", variants={"paper": _paper_code})
def sample_dpmpp_2m(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, *, seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++(2M) (2211.01095). Order 2, one evaluation per step."""
    return walk(DPMpp2M(), model, x, sigmas, extra_args, callback, disable, seeds)


sample_dpmpp_2m_cfg_pp = cfg_pp_form(sample_dpmpp_2m)
sample_dpmpp_2m_paper_cfg_pp = cfg_pp_form(sample_dpmpp_2m, "paper")


@sampler(DPMpp2M(eta=1.0), "DPM-Solver++")
def sample_dpmpp_2m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    solver_type: Literal["midpoint", "heun"] = "midpoint", *, seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++(2M) SDE, Brownian noise. Order 2 at eta 0, one evaluation per step."""
    return walk(
        DPMpp2M(eta, s_noise, solver_type),
        model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler,
    )


sample_dpmpp_2m_sde_cfg_pp = cfg_pp_form(sample_dpmpp_2m_sde)


@dataclass(frozen=True)
class DPMpp3M(DataMultistep, Ancestral[DataWeights]):
    """DPM-Solver++(3M) and, with eta > 0, its SDE form: a parabola in log sigma through three denoised, lower order at
    the first two steps, and first order to sigma 0.

    x' = e^-H x + (1 - e^-H) D + phi2 d1 - phi3 d2, H = (1 + eta) h, phi2 = expm1(-H)/H + 1, phi3 = phi2/H - 1/2, with
    the divided differences d1, d2 of D per step h. The parabola's exact integral is -2 phi3 d2: k-diffusion, ComfyUI
    and diffusers leave out the 2, and measured on an exact mixture are of order 1.97. `corrected=True` puts it in:
    order 3.04 with an exact start, 2.7 with a run's own. There the uncorrected error was the smaller at n = 8 to 40.
    One evaluation per step. Brownian noise."""

    corrected: bool = False
    order = 2
    noise = "brownian"

    def steps(self, sigmas: Sequence[float]) -> list[Step[DataWeights]]:
        steps = []
        h_1 = h_2 = math.inf  # no step before: a difference over it weighs nothing
        for s, t in pairwise(sigmas):
            h, H, up = self.sde(s, t)
            newer = older = 0.0
            if t > 0:
                phi_2 = math.expm1(-H) / H + 1
                phi_3 = (phi_2 / H - 0.5) * (2 if self.corrected else 1)
                r_0, r_1 = h_1 / h, h_2 / h
                # d2 = (d10 - d11) / span, d1 = d10 + r_0 d2, with d10 = (D - D_1) / r_0 and d11 = (D_1 - D_2) / r_1.
                second = (phi_2 * r_0 - phi_3) / (r_0 + r_1) if h_2 < math.inf else 0.0
                newer, older = (phi_2 + second) / r_0, -second / r_1
            weights = DataWeights(math.exp(-H), (-math.expm1(-H) + newer, older - newer, -older), up)
            steps.append(Step((s,), weights, pairs(up, s, t)))
            h_1, h_2 = h, h_1
        return steps


@sampler(DPMpp3M(), "DPM-Solver++")
def sample_dpmpp_3m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    *, corrected: bool = False, seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++(3M) SDE, Brownian noise. One evaluation per step. Order 2 at eta 0 as in k-diffusion; corrected:
    with the factor 2 that its third-order term lacks there, order 3 from an exact start."""
    return walk(DPMpp3M(eta, s_noise, corrected), model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler)


sample_dpmpp_3m_sde_cfg_pp = cfg_pp_form(sample_dpmpp_3m_sde)
