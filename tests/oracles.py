"""What the samplers' tests share: noise by its sigmas, a model that is watched, reads that would wait, exact flows."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ella_kd.samplers import LMS, Solver, get_sigmas_karras, sample
from ella_kd.samplers.multistep import SlopeMultistep
from mixtures import Mixture, Pointwise, Prediction, randn

TO_ZERO = [14.6, 9.1, 4.2, 2.2, 1.1, 0.5, 0.2, 0.03, 0.0]
ABOVE_ZERO = TO_ZERO[:-1]
SLOPES_KEPT = SlopeMultistep
QUANTILES = np.linspace(0.03, 0.97, 12)
SIGMA_MIN, SIGMA_MAX = 0.05, 20.0


def zero(sigma: float) -> float:
    return 0.0


def one(sigma: float) -> float:
    return 1.0


def identity(sigma: float) -> float:
    return sigma


def given_noise(sigma: Any, sigma_next: Any) -> Tensor:
    """Noise that depends on its sigmas alone, to the digits that both sides share: they may ask in any order."""
    return randn(2, 3, 5, 3, seed=round(float(sigma) * 1e6) + round(float(sigma_next) * 1e3))


def latents(sigma: float = 14.6) -> Tensor:
    return randn(2, 3, 5, 3) * sigma


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def one_step_at_a_time(solver: Solver, model: Any, x: Tensor, sigmas: list[float]) -> Tensor:
    """Without history, so at first order."""
    for s, t in pairwise(sigmas):
        x, _ = sample(solver, model, x, torch.tensor([s, t]), disable=True, noise_sampler=given_noise)
    return x


class Watched(Pointwise):
    """Keeps the sigmas it is called with; answers with `both(x, sigma)` -> (denoised, U) if that is given."""

    def __init__(self, both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None) -> None:
        self.both, self.seen = both, list[float]()

    def predict(self, x: Tensor, sigma: Tensor, need_uncond: bool, cond_scale: float = 1.0) -> Prediction:
        assert sigma.shape == (len(x),) and bool((sigma == sigma[0]).all())
        self.seen.append(float(sigma[0]))
        if self.both is not None:
            return Prediction(*self.both(x, sigma))
        return super().predict(x, sigma, need_uncond, cond_scale)


READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "is_nonzero")
READ_OPS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_to_copy")


class Functions(TorchFunctionMode):
    """Notes the Python calls that would read a value of a tensor."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.events.append(name)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Notes the operations that read a value, or copy between devices, wherever they are called from."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in READ_OPS:
            self.events.append(name)
        return func(*args, **(kwargs or {}))


def events_of(run: Any, model: Any) -> list[str]:
    """What happened from the first evaluation on: "model" for an evaluation, or the name of a read."""
    events: list[str] = []

    class Spy:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            events.append("model")
            return model(*args, **kwargs)

        def predict(self, *args: Any, **kwargs: Any) -> Any:
            events.append("model")
            return model.predict(*args, **kwargs)

    with Functions(events), Operations(events):
        run(Spy())
    return events[events.index("model") :]


def flow(mixture: Mixture, sigma: float) -> Tensor:
    """The exact solution at sigma, [1, 1, 3, 4]: twelve quantiles."""
    return torch.tensor([mixture.quantile(u, sigma) for u in QUANTILES]).view(1, 1, 3, 4)


def errors(solver: Solver, mixture: Mixture, counts: tuple[int, ...], exact_start: int = 0) -> list[float]:
    """RMS error at sigma .05 from sigma 20 on a Karras grid without the jump to 0; so many first steps are exact."""
    found = []
    for n in counts:
        sigmas = get_sigmas_karras(n + 1, SIGMA_MIN, SIGMA_MAX)[:-1]
        state = {"sigmas": sigmas, "step": torch.tensor(exact_start)}
        for k in range(1, exact_start + 1):
            sigma = sigmas[exact_start - k]
            before = flow(mixture, float(sigma))
            denoised = mixture(before, sigma.view(1))
            past = ("slope", (before - denoised) / sigma) if isinstance(solver, LMS) else ("denoised", denoised)
            state[f"{past[0]}_{k}"] = past[1]
        x, _ = sample(solver, mixture, flow(mixture, float(sigmas[exact_start])), state=state, disable=True)
        found.append(float((x - flow(mixture, SIGMA_MIN)).pow(2).mean().sqrt()))
    return found


def slope(solver: Solver, mixture: Mixture, exact_start: int = 0, counts: tuple[int, ...] = (160, 320, 640)) -> float:
    """The order as measured: of log error against log n."""
    return float(-np.polyfit(np.log(counts), np.log(errors(solver, mixture, counts, exact_start)), 1)[0])
