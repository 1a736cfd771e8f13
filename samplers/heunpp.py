"""Heun++ 2, a heuristic with three slopes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ella_kd.samplers.solver import Churned, Evaluate, Noise, State, Step, linear, pairs


@dataclass(frozen=True)
class HeunPP2(Churned):
    """Heun++ as in ComfyUI: Euler's trial steps to the next sigma and the one after it, and the mean of the slopes
    weighted by sigma over the schedule's first, (1 - w_2 - w_3) d + w_2 d_2 + w_3 d_3 with w_k = sigma_k / (3 sigma_0).

    Order 1 (measured 1.01), because these weights are no quadrature's, at three evaluations per step; two in the last
    step but one, where w_2 = sigma_2 / (2 sigma_0), and one in the last. It has no paper."""

    order = 1
    evals = 3

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        n, steps = len(sigmas) - 1, []
        for i in range(n):
            s, t = sigmas[i], sigmas[i + 1]
            hat, churn = self.churn(s, t, n)
            later = tuple(sigmas[i + 1 : min(i + 3, n)])  # the trial steps' ends: none, one, or two
            ends = (hat, *later)
            weights = [sigma / ((len(later) + 1) * sigmas[0]) for sigma in later]
            slopes = [(t - hat) * w / sigma for w, sigma in zip([1 - sum(weights), *weights], ends)]
            trials = [(after - at) / at for at, after in zip(ends, later)]
            steps.append(Step(ends, (churn, t / hat, *trials, *slopes), pairs(churn, s, hat)))
        return steps

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        churn, to_x, *rest = c.weights
        trials, slopes = rest[: len(c.evals) - 1], rest[len(c.evals) - 1 :]
        if churn:
            x = x + noise(0) * churn
        denoised = evaluate(x, c.evals[0])
        if not trials:
            return linear((to_x, x), (1 - to_x, denoised)), state
        differences = [x - denoised]
        at = x
        for sigma, trial in zip(c.evals[1:], trials):
            at = linear((1.0, at), (trial, differences[-1]))
            differences.append(at - evaluate(at, sigma))
        return linear((1.0, x), *zip(slopes, differences)), state
