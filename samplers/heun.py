"""Second order in one step, in sigma: Heun, and DPM-Solver-2 with its ancestral form."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ella_kd.samplers.registry import Args, Callback, Model, NoiseSampler, Seeds, cfg_pp_form, sampler, walk
from ella_kd.samplers.solver import Ancestral, Churned, Evaluate, Noise, Solver, State, Step, linear, pairs

__all__ = [
    "DPM2", "DPM2Ancestral", "Heun", "sample_dpm_2", "sample_dpm_2_ancestral", "sample_dpm_2_ancestral_cfg_pp",
    "sample_dpm_2_cfg_pp", "sample_heun", "sample_heun_cfg_pp",
]


class SlopesWeights(NamedTuple):
    """Of the first step (to a second sigma, or the only one), of both slopes' x - D, and of noise before and after."""

    to_x: float
    to_denoised: float
    first: float = 0.0
    second: float = 0.0
    churn: float = 0.0
    up: float = 0.0


@dataclass(frozen=True)
class TwoSlopes(Solver[SlopesWeights]):
    """A trial step to a second sigma, then the step along a mix of both slopes d = (x - D) / sigma; or Euler's."""

    order = 2
    evals = 2

    def step(
        self, c: Step[SlopesWeights], x: Tensor, state: State, evaluate: Evaluate, noise: Noise
    ) -> tuple[Tensor, State]:
        w = c.weights
        if w.churn:
            x = x + noise(0) * w.churn
        denoised = evaluate(x, c.evals[0])
        end = linear((w.to_x, x), (w.to_denoised, denoised))
        if len(c.evals) == 2:
            end = linear((1.0, x), (w.first, x - denoised), (w.second, end - evaluate(end, c.evals[1])))
        return (end + noise(0) * w.up if w.up else end), {}


@dataclass(frozen=True)
class _Mixed(TwoSlopes, Churned[SlopesWeights]):
    """x' = x + (t - s) [(1 - mix) d(s) + mix d(m)]; a step to sigma 0 is Euler's."""

    @abstractmethod
    def middle(self, s: float, t: float) -> tuple[float, float]:
        """(m, mix) for a step from s to t > 0."""

    def between(self, s: float, t: float, n: int) -> Step[SlopesWeights]:
        hat, churn = self.churn(s, t, n)
        noises = pairs(churn, s, hat)
        if t == 0:
            return Step((hat,), SlopesWeights(0.0, 1.0, churn=churn), noises)
        m, mix = self.middle(hat, t)
        slopes = (t - hat) * (1 - mix) / hat, (t - hat) * mix / m
        return Step((hat, m), SlopesWeights(m / hat, (hat - m) / hat, *slopes, churn), noises)


@dataclass(frozen=True)
class Heun(_Mixed):
    """Heun's method with optional churn; Karras et al. (2022, 2206.00364), Algorithm 2.

    Order 2, two evaluations per step; one where the step lands on sigma 0."""

    def middle(self, s: float, t: float) -> tuple[float, float]:
        return t, 0.5


@sampler(Heun(), "Heun (EDM)")
def sample_heun(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0, *, seeds: Seeds = None,
) -> Tensor:
    """Heun steps (2206.00364, Algorithm 2). Order 2, two evaluations per step."""
    return walk(Heun(s_churn, s_tmin, s_tmax, s_noise), model, x, sigmas, extra_args, callback, disable, seeds)


sample_heun_cfg_pp = cfg_pp_form(sample_heun)


@dataclass(frozen=True)
class DPM2(_Mixed):
    """DPM-Solver-2 (2206.00927) with churn as in Karras et al.: the slope at the middle in log sigma.

    Order 2, two evaluations per step; one where the step lands on sigma 0."""

    def middle(self, s: float, t: float) -> tuple[float, float]:
        return (s * t) ** 0.5, 1.0


@sampler(DPM2(), "DPM-Solver")
def sample_dpm_2(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0, *, seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver-2 (2206.00927). Order 2, two evaluations per step."""
    return walk(DPM2(s_churn, s_tmin, s_tmax, s_noise), model, x, sigmas, extra_args, callback, disable, seeds)


sample_dpm_2_cfg_pp = cfg_pp_form(sample_dpm_2)


@dataclass(frozen=True)
class DPM2Ancestral(TwoSlopes, Ancestral[SlopesWeights]):
    """DPM-Solver-2 (2206.00927) down to sigma_down, then noise (k-diffusion).

    Order 2 at eta 0, two evaluations per step; one where sigma_down is 0. There, with sigma_next above 0 (eta above 1),
    k-diffusion adds no noise and goes on with an x of no noise at all; this adds it."""

    def between(self, s: float, t: float, n: int) -> Step[SlopesWeights]:
        down, up = self.down_up(s, t)
        noises = pairs(up, s, t)
        if down == 0:
            return Step((s,), SlopesWeights(0.0, 1.0, up=up), noises)
        m = (s * down) ** 0.5
        return Step((s, m), SlopesWeights(m / s, (s - m) / s, second=(down - s) / m, up=up), noises)


@sampler(DPM2Ancestral(), "DPM-Solver")
def sample_dpm_2_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    *, seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver-2 (2206.00927) with noise put back. Order 2 at eta 0, two evaluations per step."""
    return walk(DPM2Ancestral(eta, s_noise), model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler)


sample_dpm_2_ancestral_cfg_pp = cfg_pp_form(sample_dpm_2_ancestral)
