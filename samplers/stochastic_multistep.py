"""Stochastic multistep methods on past denoised: SA-Solver (2309.05019) and ER-SDE (2309.06169)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from ella_kd.samplers.history import (
    Array,
    DataMultistep,
    integrate,
    lagrange,
    padded,
    pushed,
    refuse_order,
    used,
    used_order,
)
from ella_kd.samplers.solver import (
    Evaluate,
    Noise,
    State,
    Step,
    linear,
    pairs,
    refuse_ascending,
    refuse_negative,
)

Scaler = Callable[[float], float]


def tau_of_the_middle(sigma: float) -> float:
    """1 where SD1.5's timestep is between 200 and 800 (sigma .57 to 5.11), else 0: ComfyUI's and diffusers' default."""
    return 1.0 if 0.57 <= sigma <= 5.11 else 0.0


@dataclass(frozen=True)
class SASolver(DataMultistep):
    """SA-Solver (2309.05019, eqs. 14 to 18), predict-evaluate-correct: stochastic Adams-Bashforth and Adams-Moulton.

    Order 4 where tau is 0 (predictor_order 1 to 4; corrector_order 1 to 4, or 0 for none), one evaluation per step:
    the corrector reuses the next step's. tau(sigma_{i+1}) scales the noise of step i: 0 is the flow, 1 the reverse SDE.
    simple_order_2: the paper's appendix D instead of the exact integrals, wherever the order in use is 2. The step to
    sigma 0 is first order and adds no noise.

    diffusers asks tau at the start of a step and uses appendix D always; ComfyUI is as here."""

    tau: Scaler = tau_of_the_middle
    s_noise: float = 1.0
    predictor_order: int = 3
    corrector_order: int = 4
    simple_order_2: bool = False
    order = 4
    evals = 1

    def __post_init__(self) -> None:
        refuse_negative(s_noise=self.s_noise)
        refuse_order("predictor_order", self.predictor_order, 4)
        refuse_order("corrector_order", self.corrector_order, 4, lowest=0)

    @property
    def memory(self) -> int:
        return max(self.predictor_order, self.corrector_order - 1)

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        correct: tuple[float, ...] = padded((), self.memory + 1)
        for i, (s, t) in enumerate(pairwise(sigmas)):
            up, to_x, predict, correct_next = self._weights(i, sigmas)
            steps.append(Step((s,), (up, to_x, *predict, *correct), pairs(up, s, t)))
            correct = correct_next
        return steps

    def _weights(self, i: int, sigmas: Sequence[float]) -> tuple[float, float, tuple[float, ...], tuple[float, ...]]:
        """Of step i: the noise's and x's, the predictor's for (D_i, D_{i-1}, ..) and the corrector's, less the
        predictor's, for (D_{i+1}, D_i, ..); each [memory + 1]."""
        s, t = sigmas[i], sigmas[i + 1]
        size = self.memory + 1
        if t == 0:
            return 0.0, 0.0, padded((1.0,), size), padded((), size)
        tau = float(self.tau(t))
        if not 0 <= tau < math.inf:
            raise ValueError(f"tau({t:g}) must be a finite number >= 0, got {tau}")
        if tau:
            refuse_ascending(s, t)
        h = math.log(s / t)
        up = t * math.sqrt(-math.expm1(-2 * tau**2 * h)) * self.s_noise
        order = used_order(i, sigmas, self.predictor_order)
        predict = self._integrals(tau, sigmas[: i + 1][::-1][:order], s, t)
        order = min(self.corrector_order, i + 2)
        corrected = self._integrals(tau, sigmas[: i + 2][::-1][:order], s, t) if order else [0.0, *predict]
        before = padded((0.0, *predict), max(len(corrected), len(predict) + 1))
        after = padded(corrected, len(before))
        correct = [new - old for new, old in zip(after, before)]
        return up, t / s * math.exp(-(tau**2) * h), padded(predict, size), padded(correct, size)

    def _integrals(self, tau: float, nodes: Sequence[float], s: float, t: float) -> list[float]:
        """Weights of D at the sigmas `nodes`: the integral of its interpolation in lambda = -log sigma (eq. 15)."""
        rate = 1 + tau**2
        h = math.log(s / t)
        whole = -math.expm1(-rate * h)
        if len(nodes) == 1:
            return [whole]
        if len(nodes) == 2 and self.simple_order_2:
            if nodes[0] == t:  # the corrector
                return [rate * h / 2, whole - rate * h / 2]
            past = rate * h**2 / 2 / math.log(s / nodes[1])
            return [whole - past, past]
        end = -math.log(t)
        lambdas = [-math.log(node) for node in nodes]
        later = integrate(lambda u: rate * np.exp(rate * (u - end)) * lagrange(lambdas, u)[1:], end - h, end).tolist()
        return [whole - sum(later), *later]


@dataclass(frozen=True)
class SASolverPECE(SASolver):
    """SA-Solver that evaluates again after it corrects. Order 4 where tau is 0, two evaluations per step; one where the
    step lands on sigma 0."""

    evals = 2

    @property
    def memory(self) -> int:
        return max(self.predictor_order - 1, self.corrector_order - 2, 0)

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        for i, (s, t) in enumerate(pairwise(sigmas)):
            up, to_x, predict, correct = self._weights(i, sigmas)
            evals = (s, t) if t > 0 else (s,)
            steps.append(Step(evals, (up, to_x, *predict, *padded(correct, self.memory + 2)), pairs(up, s, t)))
        return steps

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        up, to_x, *weights = c.weights
        predict, correct = weights[: self.memory + 1], weights[self.memory + 1 :]
        denoised = evaluate(x, c.evals[0])
        x = linear((to_x, x), *used(predict, denoised, state))
        if up:
            x = x + noise(0) * up
        history = pushed(state, "denoised", self.memory + 1, denoised)
        if len(c.evals) == 2:
            x = linear((1.0, x), *used(correct, evaluate(x, c.evals[1]), history))
        return x, pushed(state, "denoised", self.memory, denoised)


def er_sde_scaler(sigma: float) -> float:
    """ER-SDE 5 of the paper, its recommendation: sigma (e^(sigma^0.3) + 10)."""
    return sigma * (math.exp(sigma**0.3) + 10)


@dataclass(frozen=True)
class ERSDE(DataMultistep):
    """Extended reverse-time SDE, data prediction in VE sigma (2309.06169, algorithm 3): with r = phi(t) / phi(s),

    x' = r x + (1 - r) D + A_1 D' + A_2 D'' + sqrt(t^2 - s^2 r^2) noise,

    A_1 = t - s + phi(t) I_0, A_2 = (t - s)^2 / 2 + phi(t) I_1, I_k the integral of (sigma - s)^k / phi from t to s. The
    noise scale function phi, noise_scaler, must grow at least as fast as sigma; phi = sigma is the flow, without noise.

    D' is the backward difference, as in the paper and ComfyUI, so that max_stage 3 has order 2 all the same. corrected
    takes D' of the parabola through three D: order 3. One evaluation per step. ComfyUI sums 200 points for I_k; these
    are Gauss-Legendre integrals."""

    s_noise: float = 1.0
    noise_scaler: Scaler = er_sde_scaler
    max_stage: int = 3
    corrected: bool = False
    order = 2
    evals = 1

    def __post_init__(self) -> None:
        refuse_negative(s_noise=self.s_noise)
        refuse_order("max_stage", self.max_stage, 3)

    @property
    def memory(self) -> int:
        return self.max_stage - 1

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        steps = []
        size = self.memory + 1
        for i, (s, t) in enumerate(pairwise(sigmas)):
            if t == 0:
                steps.append(Step((s,), (0.0, 0.0, *padded((1.0,), size))))
                continue
            phi = float(self.noise_scaler(t))
            ratio = phi / self.noise_scaler(s)
            share = 1 - (s * ratio / t) ** 2
            if not share > 1e-12:  # phi = sigma, rounded
                if not share > -1e-12:
                    refuse_ascending(s, t)
                    raise ValueError(f"noise_scaler must grow at least as fast as sigma, as it does not at {t:g}")
                share = 0.0
            up = t * math.sqrt(share) * self.s_noise
            weights = padded(self._weights(sigmas[: i + 1][::-1][: self.max_stage], t, phi), size)
            steps.append(Step((s,), (up, ratio, 1 - ratio + weights[0], *weights[1:]), pairs(up, s, t)))
        return steps

    def _weights(self, nodes: Sequence[float], t: float, phi: float) -> list[float]:
        """What A_1 D' + A_2 D'' takes of the D at `nodes`, the newest first."""
        s = nodes[0]
        if len(nodes) == 1:
            return [0.0]

        def integrand(u: Array) -> Array:
            values = [math.exp(v) / self.noise_scaler(math.exp(v)) for v in u]
            return np.stack([np.ones_like(u), np.exp(u) - s]) * values

        i_0, i_1 = integrate(integrand, math.log(t), math.log(s)).tolist()
        first = (t - s + phi * i_0) / (s - nodes[1])
        weights = [first, -first]
        if len(nodes) == 3:
            # f[0,1,2] = D'' / 2 = (f[0,1] - f[1,2]) / (s_0 - s_2)
            second = (t - s) ** 2 + 2 * phi * i_1
            if self.corrected:
                second += first * (s - nodes[1]) ** 2
            a, b = (second / (s - nodes[2]) / gap for gap in (s - nodes[1], nodes[1] - nodes[2]))
            weights = [first + a, -first - a - b, b]
        return weights
