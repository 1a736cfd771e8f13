"""Heun++ 2, a heuristic with three slopes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ella_kd.samplers.registry import Args, Callback, Model, Seeds, cfg_pp_form, sampler, walk
from ella_kd.samplers.solver import Churned, Evaluate, Noise, State, Step, linear, pairs

__all__ = ["HeunPP2", "sample_heunpp2", "sample_heunpp2_cfg_pp"]


class HeunPPWeights(NamedTuple):
    """to_x is that of an Euler step, which the last one is; trials and slopes are those of each x - D."""

    churn: float
    to_x: float
    trials: tuple[float, ...]
    slopes: tuple[float, ...]


@dataclass(frozen=True)
class HeunPP2(Churned[HeunPPWeights]):
    """Heun++ as in ComfyUI: Euler's trial steps to the next sigma and the one after it, and the mean of the slopes
    weighted by sigma over the schedule's first, (1 - w_2 - w_3) d + w_2 d_2 + w_3 d_3 with w_k = sigma_k / (3 sigma_0).

    Order 1 (measured 1.01), because these weights are no quadrature's, at three evaluations per step; two in the last
    step but one, where w_2 = sigma_2 / (2 sigma_0), and one in the last. It has no paper."""

    order = 1
    evals = 3

    def steps(self, sigmas: Sequence[float]) -> list[Step[HeunPPWeights]]:
        n, steps = len(sigmas) - 1, []
        for i in range(n):
            s, t = sigmas[i], sigmas[i + 1]
            hat, churn = self.churn(s, t, n)
            later = tuple(sigmas[i + 1 : min(i + 3, n)])  # the trial steps' ends: none, one, or two
            ends = (hat, *later)
            weights = [sigma / ((len(later) + 1) * sigmas[0]) for sigma in later]
            slopes = [(t - hat) * w / sigma for w, sigma in zip([1 - sum(weights), *weights], ends)]
            trials = [(after - at) / at for at, after in zip(ends, later)]
            c = HeunPPWeights(churn, t / hat, tuple(trials), tuple(slopes))
            steps.append(Step(ends, c, pairs(churn, s, hat)))
        return steps

    def step(
        self, c: Step[HeunPPWeights], x: Tensor, state: State, evaluate: Evaluate, noise: Noise
    ) -> tuple[Tensor, State]:
        w = c.weights
        if w.churn:
            x = x + noise(0) * w.churn
        denoised = evaluate(x, c.evals[0])
        if not w.trials:
            return linear((w.to_x, x), (1 - w.to_x, denoised)), {}
        differences = [x - denoised]
        for k, sigma in enumerate(c.evals[1:], start=1):
            at = linear((1.0, x), *zip(w.trials[:k], differences))
            differences.append(at - evaluate(at, sigma))
        return linear((1.0, x), *zip(w.slopes, differences)), {}


@sampler(HeunPP2(), "Heun++, no paper")
def sample_heunpp2(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0, *, seeds: Seeds = None,
) -> Tensor:
    """Heun++, a heuristic of three slopes. Order 1, three evaluations per step."""
    return walk(HeunPP2(s_churn, s_tmin, s_tmax, s_noise), model, x, sigmas, extra_args, callback, disable, seeds)


sample_heunpp2_cfg_pp = cfg_pp_form(sample_heunpp2)
