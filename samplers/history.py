"""What multistep methods share: weights from integrals of interpolating polynomials, and two forms of history.

A method that keeps past D walks x' = a x + sum_k b_k D_{i-k}; one that keeps past slopes d = (x - D) / sigma walks
x' = x + sum_k c_k d_{i-k}. The weights are integrals of Lagrange polynomials through the past sigmas, worked out by
Gauss-Legendre quadrature, which has none of the cancellation that closed forms suffer from on small steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def refuse_order(name: str, order: int, highest: int, lowest: int = 1) -> None:
    """Raises ValueError for an order that is no whole number from `lowest` to `highest`."""
    if isinstance(order, bool) or not isinstance(order, int) or not lowest <= order <= highest:
        raise ValueError(f"{name} must be a whole number from {lowest} to {highest}, got {order!r}")


def padded(weights: Sequence[float], length: int) -> tuple[float, ...]:
    """`weights` as floats, with zeros up to `length`."""
    return (*(float(weight) for weight in weights), *[0.0] * (length - len(weights)))


def older(state: State, name: str, weights: Sequence[float], current: Tensor) -> list[Tensor]:
    """The history name_1, name_2, ... to which `weights` apply; `current` in place of all of it where some that has a
    weight is missing, which makes a consistent method's step first order."""
    found = [state.get(f"{name}_{k}") for k in range(1, len(weights) + 1)]
    if any(weight and tensor is None for weight, tensor in zip(weights, found)):
        return [current for _ in found]
    return [current if tensor is None else tensor for tensor in found]


def pushed(state: State, name: str, memory: int, current: Tensor) -> State:
    """The history after this step: `current` becomes name_1, name_1 becomes name_2, up to `memory`."""
    new = {f"{name}_{k + 1}": state[f"{name}_{k}"] for k in range(1, memory) if f"{name}_{k}" in state}
    return {f"{name}_1": current, **new} if memory else {}


@dataclass(frozen=True)
class DataMultistep(Solver):
    """Walks on past denoised: x' = a (x + sum_k c_k D_{i-k}) + sum_k b_k D_{i-k} + up noise.

    The c_k, where there are any, correct the last step with this step's evaluation: corrected and predicted x differ
    by a combination of D alone, so the x before the last step need not be kept, and whatever else was added to x
    (noise, CFG++'s guidance) stays. weights: (up, a, b_0 .. b_memory, c_0 .. c_memory)."""

    @property
    @abstractmethod
    def memory(self) -> int:
        """How many past D are kept."""

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        up, to_x, *weights = c.weights
        size = self.memory + 1
        predict, correct = weights[:size], weights[size:]
        denoised = evaluate(x, c.evals[0])
        if any(correct):
            x = linear((1.0, x), *used(correct, denoised, state))
        x = linear((to_x, x), *used(predict, denoised, state))
        return (x + noise(0) * up if up else x), pushed(state, "denoised", self.memory, denoised)


def used(weights: Sequence[float], denoised: Tensor, state: State) -> list[tuple[float, Tensor]]:
    """(weight, D) for this step's denoised and those of the past, without the zeros."""
    history = [denoised, *older(state, "denoised", weights[1:], denoised)]
    return [(weight, tensor) for weight, tensor in zip(weights, history) if weight]


@dataclass(frozen=True)
class SlopeMultistep(Solver):
    """Walks on past slopes: x' = x + sum_k c_k d_{i-k}, d = (x - D) / sigma, one evaluation per step.

    weights: (1 / s, 1 + c_0 / s, -c_0 / s, c_1 .. c_memory)."""

    evals = 1

    @property
    @abstractmethod
    def memory(self) -> int:
        """How many past slopes are kept."""

    @abstractmethod
    def slope_weights(self, i: int, sigmas: Sequence[float]) -> Sequence[float]:
        """c_0, c_1, ... of step i, which sum to sigma_{i+1} - sigma_i."""

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        return [
            Step((s,), (1 / s, 1 + c[0] / s, -c[0] / s, *padded(c[1:], self.memory)))
            for i, s in enumerate(sigmas[:-1])
            for c in [self.slope_weights(i, sigmas)]
        ]

    def step(self, c: Step, x: Tensor, state: State, evaluate: Evaluate, noise: Noise) -> tuple[Tensor, State]:
        inverse, to_x, to_denoised, *weights = c.weights
        denoised = evaluate(x, c.evals[0])
        slope = (x - denoised) * inverse
        history = older(state, "slope", weights, slope)
        past = [(weight, tensor) for weight, tensor in zip(weights, history) if weight]
        x = linear((to_x, x), (to_denoised, denoised), *past)
        return x, pushed(state, "slope", self.memory, slope)
