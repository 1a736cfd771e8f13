"""What a sampler needs of a model: `bind` it once before the loop, then `bound(x, levels) -> Prediction`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Model = Callable[..., Any]
"""model(x, sigma [B], **extra_args) -> denoised; for CFG++ `predict` too, or `bind` in place of both."""
Record = dict[str, Any]
"""x (as it was evaluated), i, sigma, sigma_hat, denoised, nfe (evaluations so far); with CFG++ also lam and w."""
Callback = Callable[[Record], object]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]
"""noise_sampler(sigma, sigma_next) -> [B, C, h, w] of unit variance; the sigmas are 0-dim tensors (k-diffusion)."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model answers, each [B, C, h, w]; uncond is None where it was not evaluated.

    Where it is needed for CFG++ and a rule does not guide (rows outside an `Interval`), uncond is cond: with D - U = 0
    the method walks on cond, which is sampling without guidance. D = C with the real U would be CFG++'s strongest.
    """

    denoised: Tensor
    cond: Tensor
    uncond: Tensor | None = None


class Bound(Protocol):
    """A model made ready for one run."""

    def __call__(self, x: Tensor, levels: float | tuple[float, ...], scale: float | None = None) -> Prediction:
        """x [B, C, h, w]; levels: the sigma of all rows, or one per row, as x's dtype rounds it. scale: this step's
        guidance scale, in place of the run's."""
        ...


def bind(model: Any, x: Tensor, sigmas: Sequence[float] | None, need_uncond: bool = False,
         extra_args: Mapping[str, Any] | None = None) -> Bound:
    """`model.bind(x, sigmas, need_uncond=..., **extra_args)`, or the same around a model without it.

    sigmas: every sigma that will be asked for, None where nobody knows. need_uncond: CFG++ walks on the unconditional
    denoised, so a model without `bind` needs `predict(x, sigma, need_uncond=True, **extra_args)` then.
    Raises TypeError for a model that has not what it takes.
    """
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, sigma, **extra_args), got {type(model).__name__}")
    args = dict(extra_args or {})
    if callable(getattr(model, "bind", None)):
        bound: Bound = model.bind(x, sigmas, need_uncond=need_uncond, **args)
        return bound
    if need_uncond and not callable(getattr(model, "predict", None)):
        raise TypeError(
            "CFG++ needs the unconditional denoised: a model with .predict(x, sigma, need_uncond=True, "
            f"**extra_args), such as CFGDenoiser; {type(model).__name__} has none"
        )

    def wrapped(x: Tensor, levels: float | tuple[float, ...], scale: float | None = None) -> Prediction:
        sigma = x.new_full((len(x),), levels) if isinstance(levels, float) else x.new_tensor(levels)
        own = args if scale is None else {**args, "cond_scale": scale}
        if need_uncond:
            found = model.predict(x, sigma, need_uncond=True, **own)
            return Prediction(found.denoised, getattr(found, "cond", found.denoised), found.uncond)
        denoised = model(x, sigma, **own)
        return Prediction(denoised, denoised)

    return wrapped


def memory(bound: Any) -> Any:
    """What a bound run keeps of its evaluations for later ones, a value that is replaced and never changed; None of one
    that keeps nothing. It is set as `bound.memory`, and `bound.saved()` has it as named tensors, from which
    `bound.resume(tensors)` begins anew."""
    return getattr(bound, "memory", None)


def digests(bound: Bound) -> dict[str, str]:
    """What a run is made with beside x, its method and its schedule, as the model says: name -> digest.

    A bound run may have it as `digests`; a run is resumed with the same only. Nothing is known of other models.
    """
    found: dict[str, str] = getattr(bound, "digests", {})
    return found


def rounded(sigma: float, dtype: torch.dtype) -> float:
    """A noise level as a tensor of this dtype holds it."""
    return sigma if dtype == torch.float64 else float(torch.tensor(sigma, dtype=dtype))


def check_answer(what: str, value: Any, x: Tensor) -> None:
    """Raises ValueError unless the model returned a tensor like x."""
    if not isinstance(value, Tensor) or value.shape != x.shape or value.dtype != x.dtype:
        got = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the model must return {what} like x, {list(x.shape)} {x.dtype}, got {got}")
