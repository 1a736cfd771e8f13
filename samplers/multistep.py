"""What multistep methods share: weights from integrals of interpolating polynomials, and two forms of history.

A method that keeps past D walks x' = a x + sum_k b_k D_{i-k}; one that keeps past slopes d = (x - D) / sigma walks
x' = x + sum_k c_k d_{i-k}. The weights are integrals of Lagrange polynomials through the past sigmas, worked out by
Gauss-Legendre quadrature, which has none of the cancellation that closed forms suffer from on small steps. The history
kept is as long as the weights.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ella_kd.samplers.solver import Evaluate, Noise, Solver, State, Step, linear

Array = NDArray[np.float64]
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)  # exact to 1e-15 for a step of 14.6 to 0.03 in log sigma


def integrate(function: Callable[[Array], Array], a: float, b: float) -> Array:
    """The integral of `function` (points [32] -> values [..., 32]) from a to b, either way round."""
    half = (b - a) / 2
    result: Array = np.asarray(function(a + half * (1 + _NODES)) @ _WEIGHTS * half)
    return result


def lagrange(nodes: Sequence[float], points: Array) -> Array:
    """The Lagrange polynomials through `nodes`, [len(nodes), len(points)]."""
    rows = []
    for k, node in enumerate(nodes):
        others = [other for j, other in enumerate(nodes) if j != k]
        rows.append(np.prod([(points - other) / (node - other) for other in others], axis=0) * np.ones_like(points))
    return np.stack(rows)


def used_order(i: int, sigmas: Sequence[float], max_order: int, lower_order_final: bool = False) -> int:
    """The order step i can have: as far as the history reaches, 1 to sigma 0, and with lower_order_final falling to
    it by one a step where the schedule ends in 0."""
    order = min(max_order, i + 1)
    if sigmas[-1] == 0:
        left = len(sigmas) - 1 - i
        order = min(order, left) if lower_order_final or left == 1 else order
    return order


def padded(weights: Sequence[float], length: int) -> tuple[float, ...]:
    """`weights` as floats, with zeros up to `length`."""
    return (*(float(weight) for weight in weights), *[0.0] * (length - len(weights)))


def used(weights: Sequence[float], name: str, current: Tensor, state: State) -> list[tuple[float, Tensor]]:
    """(weight, tensor) for `current` and the history name_1, name_2, ...; `current` in place of all of it where some
    that has a weight is missing, which makes a consistent method's step first order."""
    past = [state.get(f"{name}_{k}") for k in range(1, len(weights))]
    whole = all(tensor is not None for weight, tensor in zip(weights[1:], past) if weight)
    found = [tensor if whole and tensor is not None else current for tensor in past]
    return list(zip(weights, [current, *found]))


def pushed(state: State, name: str, memory: int, current: Tensor) -> State:
    """The history after this step: `current` becomes name_1, name_1 becomes name_2, up to `memory`."""
    new = {f"{name}_{k + 1}": state[f"{name}_{k}"] for k in range(1, memory) if f"{name}_{k}" in state}
    return {f"{name}_1": current, **new} if memory else {}


class DataWeights(NamedTuple):
    """Of a step on denoised: x's, those of D_i, D_{i-1}, ..., the noise's, and what corrects the last step."""

    to_x: float
    to_denoised: tuple[float, ...]
    up: float = 0.0
    correct: tuple[float, ...] = ()


@dataclass(frozen=True)
class DataMultistep(Solver[DataWeights]):
    """Walks on denoised: x' = a (x + sum_k c_k D_{i-k}) + sum_k b_k D_{i-k} + up noise, one evaluation per step.

    The c_k, where there are any, correct the last step with this step's evaluation: corrected and predicted x differ
    by a combination of D alone, so the x before the last step need not be kept, and whatever else was added to x
    (noise, CFG++'s guidance) stays."""

    evals = 1

    def step(
        self, c: Step[DataWeights], x: Tensor, state: State, evaluate: Evaluate, noise: Noise
    ) -> tuple[Tensor, State]:
        w = c.weights
        denoised = evaluate(x, c.evals[0])
        if any(w.correct):
            x = linear((1.0, x), *used(w.correct, "denoised", denoised, state))
        x = linear((w.to_x, x), *used(w.to_denoised, "denoised", denoised, state))
        history = pushed(state, "denoised", max(len(w.to_denoised), len(w.correct)) - 1, denoised)
        return (x + noise(0) * w.up if w.up else x), history


class SlopeWeights(NamedTuple):
    """Of a step on slopes: 1 / s, x's and D's with this step's slope in them, and those of the past slopes."""

    inverse: float
    to_x: float
    to_denoised: float
    past: tuple[float, ...]


@dataclass(frozen=True)
class SlopeMultistep(Solver[SlopeWeights]):
    """Walks on past slopes: x' = x + sum_k c_k d_{i-k}, d = (x - D) / sigma, one evaluation per step."""

    evals = 1

    @abstractmethod
    def slope_weights(self, i: int, sigmas: Sequence[float]) -> Sequence[float]:
        """c_0, c_1, ... of step i, which sum to sigma_{i+1} - sigma_i."""

    def steps(self, sigmas: Sequence[float]) -> list[Step[SlopeWeights]]:
        rows = [self.slope_weights(i, sigmas) for i in range(len(sigmas) - 1)]
        memory = max(map(len, rows)) - 1
        return [
            Step((s,), SlopeWeights(1 / s, 1 + c[0] / s, -c[0] / s, padded(c[1:], memory)))
            for s, c in zip(sigmas, rows)
        ]

    def step(
        self, c: Step[SlopeWeights], x: Tensor, state: State, evaluate: Evaluate, noise: Noise
    ) -> tuple[Tensor, State]:
        w = c.weights
        denoised = evaluate(x, c.evals[0])
        slope = (x - denoised) * w.inverse
        x = linear((w.to_x, x), (w.to_denoised, denoised), *used((0.0, *w.past), "slope", slope, state))
        return x, pushed(state, "slope", len(w.past), slope)
