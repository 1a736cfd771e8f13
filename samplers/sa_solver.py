"""SA-Solver (2309.05019): stochastic Adams-Bashforth and Adams-Moulton on past denoised."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import numpy as np
from torch import Tensor

from ella_kd.samplers.multistep import DataMultistep, DataWeights, integrate, lagrange, padded, pushed, used, used_order
from ella_kd.samplers.registry import Args, Callback, Model, NoiseSampler, Seeds, cfg_pp_form, sampler, walk
from ella_kd.samplers.solver import (
    Evaluate,
    Noise,
    State,
    Step,
    linear,
    pairs,
    refuse_ascending,
    refuse_negative,
    refuse_order,
)

__all__ = [
    "SASolver", "SASolverPECE", "sample_sa_solver", "sample_sa_solver_cfg_pp", "sample_sa_solver_pece",
    "sample_sa_solver_pece_cfg_pp",
]


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

    tau: Callable[[float], float] = tau_of_the_middle
    s_noise: float = 1.0
    predictor_order: int = 3
    corrector_order: int = 4
    simple_order_2: bool = False
    order = 4

    def __post_init__(self) -> None:
        refuse_negative(s_noise=self.s_noise)
        refuse_order("predictor_order", self.predictor_order, 4)
        refuse_order("corrector_order", self.corrector_order, 4, lowest=0)

    def steps(self, sigmas: Sequence[float]) -> list[Step[DataWeights]]:
        steps: list[Step[DataWeights]] = []
        size = max(self.predictor_order + 1, self.corrector_order)
        correct: Sequence[float] = ()
        for i, (s, t) in enumerate(pairwise(sigmas)):
            weights = self._weights(i, sigmas)
            now = weights._replace(to_denoised=padded(weights.to_denoised, size), correct=padded(correct, size))
            steps.append(Step((s,), now, pairs(weights.up, s, t)))
            correct = weights.correct
        return steps

    def _weights(self, i: int, sigmas: Sequence[float]) -> DataWeights:
        """Of step i, the predictor's for (D_i, D_{i-1}, ..) and the corrector's, less the predictor's, for (D_{i+1},
        D_i, ..), which the evaluation at its end spends."""
        s, t = sigmas[i], sigmas[i + 1]
        if t == 0:
            return DataWeights(0.0, (1.0,))
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
        correct = [new - old for new, old in zip_longest(corrected, (0.0, *predict), fillvalue=0.0)]
        return DataWeights(t / s * math.exp(-(tau**2) * h), tuple(predict), up, tuple(correct))

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


@sampler(SASolver(), "SA-Solver")
def sample_sa_solver(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, tau_func: Callable[[float], float] | None = None, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, predictor_order: int = 3, corrector_order: int = 4,
    simple_order_2: bool = False, *, seeds: Seeds = None,
) -> Tensor:
    """SA-Solver (2309.05019); tau_func(sigma), by default 1 in the middle of SD1.5's range. Order 4 at tau 0, one
    evaluation per step."""
    return walk(
        SASolver(tau_func or tau_of_the_middle, s_noise, predictor_order, corrector_order, simple_order_2),
        model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler,
    )


sample_sa_solver_cfg_pp = cfg_pp_form(sample_sa_solver)


@dataclass(frozen=True)
class SASolverPECE(SASolver):
    """SA-Solver that evaluates again after it corrects. Order 4 where tau is 0, two evaluations per step; one where the
    step lands on sigma 0."""

    evals = 2

    def steps(self, sigmas: Sequence[float]) -> list[Step[DataWeights]]:
        steps = []
        size = max(self.predictor_order, self.corrector_order - 1, 1)
        for i, (s, t) in enumerate(pairwise(sigmas)):
            weights = self._weights(i, sigmas)
            weights = weights._replace(to_denoised=padded(weights.to_denoised, size))
            steps.append(Step((s, t) if t > 0 else (s,), weights, pairs(weights.up, s, t)))
        return steps

    def step(
        self, c: Step[DataWeights], x: Tensor, state: State, evaluate: Evaluate, noise: Noise
    ) -> tuple[Tensor, State]:
        w, memory = c.weights, len(c.weights.to_denoised)
        denoised = evaluate(x, c.evals[0])
        x = linear((w.to_x, x), *used(w.to_denoised, "denoised", denoised, state))
        if w.up:
            x = x + noise(0) * w.up
        history = pushed(state, "denoised", memory, denoised)
        if len(c.evals) == 2:
            x = linear((1.0, x), *used(w.correct, "denoised", evaluate(x, c.evals[1]), history))
        return x, pushed(state, "denoised", memory - 1, denoised)


@sampler(SASolverPECE(), "SA-Solver")
def sample_sa_solver_pece(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, tau_func: Callable[[float], float] | None = None, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, predictor_order: int = 3, corrector_order: int = 4,
    simple_order_2: bool = False, *, seeds: Seeds = None,
) -> Tensor:
    """SA-Solver (2309.05019) that evaluates the corrected x again. Order 4 at tau 0, two evaluations per step."""
    return walk(
        SASolverPECE(tau_func or tau_of_the_middle, s_noise, predictor_order, corrector_order, simple_order_2),
        model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler,
    )


sample_sa_solver_pece_cfg_pp = cfg_pp_form(sample_sa_solver_pece)
