"""The solver contract: what a sampling method is, written once.

A method is a small frozen object. `steps(sigmas)` works out every coefficient of the run before the loop, in float64,
as Python floats; `step` spends them. It knows x, sigma and a function that evaluates the model, nothing of guidance,
noise sources, progress bars or callbacks: those are the driver's (`ella_kd.samplers.driver`).

Notation: s = sigma_i, t = sigma_{i+1}, D = denoised. A first-order step is x' = (t/s) x + (1 - t/s) D, which is Euler's
and, at the same time, DPM-Solver++'s exponential step: e^-h = t/s with h = log(s/t).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor

State = dict[str, Tensor]
"""A method's history: a flat dict of tensors shaped like x, so that a run can be saved and resumed."""
Evaluate = Callable[[Tensor, float], Tensor]
"""evaluate(x, sigma) -> denoised; sigma must be one of the step's `evals`."""
Noise = Callable[[int], Tensor]
"""noise(k) -> unit-variance noise like x for the k-th pair of the step's `noises`."""
Weights = TypeVar("Weights")
"""What a method's `steps` hands to its `step`: a NamedTuple of floats of its own."""


class Step(NamedTuple, Generic[Weights]):
    """One step's numbers: the sigmas it evaluates at, in order, the method's own weights, and the (sigma, sigma_next)
    pairs it wants noise for. A method that draws no noise at a step lists no pair there."""

    evals: tuple[float, ...]
    weights: Weights
    noises: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Solver(ABC, Generic[Weights]):
    """A sampling method; subclasses are frozen dataclasses whose fields are the method's options.

    order: order of convergence of its deterministic form (eta 0, no churn). evals: model evaluations per step, fewer
    where a step lands on sigma 0. noise: what kind it asks for when nobody supplies a noise sampler.
    """

    order: ClassVar[int]
    evals: ClassVar[int]
    noise: ClassVar[Literal["normal", "brownian"]] = "normal"

    def steps(self, sigmas: Sequence[float]) -> list[Step[Weights]]:
        """All steps of a schedule of n + 1 sigmas: n of them; ValueError if the method cannot walk it."""
        return [self.between(s, t, len(sigmas) - 1) for s, t in pairwise(sigmas)]

    def between(self, s: float, t: float, n: int) -> Step[Weights]:
        """The step from s to t of a run of n, where it depends on nothing else; a method whose steps do has `steps`."""
        raise NotImplementedError(f"{type(self).__name__} has neither `steps` nor `between`")

    @abstractmethod
    def step(
        self, c: Step[Weights], x: Tensor, state: State, evaluate: Evaluate, noise: Noise
    ) -> tuple[Tensor, State]:
        """Takes x [B, C, h, w] one step; returns the new x and history, and modifies neither of the old ones.

        A missing history (the first step, or a run begun by another method) means a first-order step."""

    def eval_sigmas(self, sigmas: Sequence[float] | Tensor) -> tuple[float, ...]:
        """Every sigma the method evaluates the model at on this schedule, in order."""
        values = sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas
        return tuple(sigma for step in self.steps(values) for sigma in step.evals)


def linear(*terms: tuple[float, Tensor]) -> Tensor:
    """Sum of weight * tensor without the weights that are 0; product and sum are rounded apart (no fused multiply-add,
    whose vector tails may differ), so that a batch equals its rows bitwise."""
    (weight, total), *rest = [term for term in terms if term[0]] or terms[:1]
    total = total * weight
    for weight, tensor in rest:
        total = total + tensor * weight
    return total


def ancestral_step(s: float, t: float, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up) of an ancestral step from s to t, sigma_down^2 + sigma_up^2 = t^2 (k-diffusion)."""
    if not eta:
        return t, 0.0
    refuse_ascending(s, t)
    up = min(t, eta * (t**2 * (s**2 - t**2) / s**2) ** 0.5)
    return (t**2 - up**2) ** 0.5, up


def refuse_ascending(s: float, t: float) -> None:
    """Raises ValueError where noise would have to be added on the way up."""
    if t > s:
        raise ValueError(
            f"an ascending schedule (inversion) cannot add noise: the step from {s:g} to {t:g} needs eta=0, s_churn=0"
        )


def refuse_negative(**options: float) -> None:
    """Raises ValueError for an option that must be a number >= 0."""
    for name, value in options.items():
        if not value >= 0 or math.isinf(value):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def refuse_other(name: str, value: object, *allowed: str) -> None:
    """Raises ValueError for an option that is none of these."""
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def refuse_order(name: str, order: int, highest: float, lowest: int = 1) -> None:
    """Raises ValueError for an order that is no whole number from `lowest` to `highest`."""
    if isinstance(order, bool) or not isinstance(order, int) or not lowest <= order <= highest:
        span = f"from {lowest} to {highest}" if highest < math.inf else f"of at least {lowest}"
        raise ValueError(f"{name} must be a whole number {span}, got {order!r}")


@dataclass(frozen=True)
class Churned(Solver[Weights]):
    """What Euler, Heun and DPM2 share: Karras et al. (2022, Algorithm 2) raise sigma to sigma_hat by added noise."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        refuse_negative(s_churn=self.s_churn, s_noise=self.s_noise)

    def churn(self, sigma: float, sigma_next: float, n: int) -> tuple[float, float]:
        """(sigma_hat, weight of the noise) for one step of a run of n."""
        gamma = min(self.s_churn / n, 2**0.5 - 1) if self.s_tmin <= sigma <= self.s_tmax else 0.0
        if not gamma:
            return sigma, 0.0
        refuse_ascending(sigma, sigma_next)
        sigma_hat = sigma * (gamma + 1)
        return sigma_hat, self.s_noise * (sigma_hat**2 - sigma**2) ** 0.5


@dataclass(frozen=True)
class Ancestral(Solver[Weights]):
    """What the ancestral methods share: eta scales the noise put back after each step, s_noise its amplitude."""

    eta: float = 1.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        refuse_negative(eta=self.eta, s_noise=self.s_noise)

    def down_up(self, s: float, t: float) -> tuple[float, float]:
        """(sigma_down, weight of the noise) of a step from s to t."""
        down, up = ancestral_step(s, t, self.eta)
        return down, up * self.s_noise

    def sde(self, s: float, t: float) -> tuple[float, float, float]:
        """(h, H, weight of the noise) of the SDE in log sigma: h = log(s/t), x decays by e^-H, H = (1 + eta) h, and the
        noise is t sqrt(1 - e^{-2 eta h}); h is infinite to sigma 0, where there is no noise."""
        if self.eta:
            refuse_ascending(s, t)
        h = math.log(s / t) if t > 0 else math.inf
        return h, h * (1 + self.eta), t * math.sqrt(-math.expm1(-2 * self.eta * h)) * self.s_noise if t > 0 else 0.0


def pairs(weight: float, s: float, t: float) -> tuple[tuple[float, float], ...]:
    """The `noises` of a step that adds noise for (s, t) with this weight: none if it is 0."""
    return ((s, t),) if weight else ()
