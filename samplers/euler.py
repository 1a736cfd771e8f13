"""First order: Euler, Euler ancestral, and their other names DDIM and DDPM."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ella_kd.samplers.multistep import DataMultistep, DataWeights
from ella_kd.samplers.registry import Args, Callback, Model, NoiseSampler, Seeds, cfg_pp_form, sampler, walk
from ella_kd.samplers.solver import Ancestral, Churned, Evaluate, Noise, State, Step, linear, pairs

__all__ = [
    "Euler", "EulerAncestral",
    "sample_ddim", "sample_ddim_cfg_pp", "sample_ddpm", "sample_ddpm_cfg_pp",
    "sample_euler", "sample_euler_ancestral", "sample_euler_ancestral_cfg_pp", "sample_euler_cfg_pp",
]


class EulerWeights(NamedTuple):
    churn: float
    to_x: float
    to_denoised: float


@dataclass(frozen=True)
class Euler(Churned[EulerWeights]):
    """Euler steps with optional churn; Karras et al. (2022, 2206.00364), Algorithm 2 without the correction.

    Order 1, one evaluation per step."""

    order = 1
    evals = 1

    def between(self, s: float, t: float, n: int) -> Step[EulerWeights]:
        hat, churn = self.churn(s, t, n)
        return Step((hat,), EulerWeights(churn, t / hat, (hat - t) / hat), pairs(churn, s, hat))

    def step(
        self, c: Step[EulerWeights], x: Tensor, state: State, evaluate: Evaluate, noise: Noise
    ) -> tuple[Tensor, State]:
        if c.weights.churn:
            x = x + noise(0) * c.weights.churn
        return linear((c.weights.to_x, x), (c.weights.to_denoised, evaluate(x, c.evals[0]))), {}


@sampler(Euler(), "Euler")
def sample_euler(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0, *, seeds: Seeds = None,
) -> Tensor:
    """Euler steps (2206.00364, Algorithm 2 without its correction). Order 1, one evaluation per step."""
    return walk(Euler(s_churn, s_tmin, s_tmax, s_noise), model, x, sigmas, extra_args, callback, disable, seeds)


sample_euler_cfg_pp = cfg_pp_form(sample_euler)


@dataclass(frozen=True)
class EulerAncestral(DataMultistep, Ancestral[DataWeights]):
    """Euler down to sigma_down, then noise up to the next sigma (k-diffusion). Order 1, one evaluation per step."""

    order = 1

    def between(self, s: float, t: float, n: int) -> Step[DataWeights]:
        down, up = self.down_up(s, t)
        return Step((s,), DataWeights(down / s, ((s - down) / s,), up), pairs(up, s, t))


@sampler(EulerAncestral(), "Euler")
def sample_euler_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    *, seeds: Seeds = None,
) -> Tensor:
    """Euler steps with noise put back after each. Order 1 at eta 0, one evaluation per step."""
    return walk(EulerAncestral(eta, s_noise), model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler)


sample_euler_ancestral_cfg_pp = cfg_pp_form(sample_euler_ancestral)


@sampler(EulerAncestral(eta=0.0), "DDIM")
def sample_ddim(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 0.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    *, seeds: Seeds = None,
) -> Tensor:
    """DDIM (2010.02502, eq. 12 and 16), which is Euler ancestral: eta 0 is Euler, eta 1 DDPM. Order 1 at eta 0, one
    evaluation per step."""
    return walk(EulerAncestral(eta, s_noise), model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler)


sample_ddim_cfg_pp = cfg_pp_form(sample_ddim)


@sampler(EulerAncestral(), "DDPM")
def sample_ddpm(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, noise_sampler: NoiseSampler | None = None,
    *, s_noise: float = 1.0, seeds: Seeds = None,
) -> Tensor:
    """DDPM's ancestral sampling (2006.11239, Algorithm 2, the smaller variance) on any schedule: DDIM with eta 1. One
    evaluation per step."""
    return walk(EulerAncestral(s_noise=s_noise), model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler)


sample_ddpm_cfg_pp = cfg_pp_form(sample_ddpm)
