"""Two models in one run: the first draws down to a noise level, the second, a refiner, from there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ella_kd.bound import check_x
from ella_kd.conditioning import Levels, above
from ella_kd.denoiser import Condition, Denoiser
from ella_kd.models import AutoencoderKL
from ella_kd.models.noise_schedule import EDMSchedule, NoiseSchedule
from ella_kd.pipeline import Pipeline
from ella_kd.request import Request, refiner_share
from ella_kd.samplers.model import Bound, Prediction, bind, digests, memory


@dataclass(frozen=True, eq=False)
class Refiner:
    """A system that takes over when this share of the timesteps is done, with conditions of its own.

    at: as A1111's "switch at" (by noise, not by sampling steps) and diffusers' denoising_end: at .8 the timesteps up to
    199 are the refiner's, on every schedule. Raises ValueError for a share that leaves one of the two nothing.
    """

    pipeline: Pipeline
    cond: Condition
    uncond: Condition | None = None
    at: float = Request.refiner_at

    def __post_init__(self) -> None:
        refiner_share(self.at)

    def sigma(self, model: Denoiser) -> float:
        """The noise level of the hand-over, by the first model's schedule; 0 below its timesteps."""
        t = torch.tensor(len(model.sigmas) * (1 - self.at) - 0.5, dtype=torch.float64)  # by the nearest timestep
        return float(model.t_to_sigma(t)) if t >= 0 else 0.0

    def check_latents(self, vae: AutoencoderKL) -> None:
        """Raises ValueError unless the latents of both systems mean the same picture."""
        own, other = ((x.config.latent_channels, x.factor, x.config.scale, x.config.mean, x.config.std)
                      for x in (self.pipeline.vae, vae))
        if own != other:
            raise ValueError(f"the refiner {self.pipeline.name} has other latents than the model: {own[0]} channels of "
                             f"{own[1]} px, scale {own[2]:g}, against {other[0]} of {other[1]} px, scale {other[2]:g}: "
                             "take one of the same family, SDXL's for SDXL")


class HandOver(Denoiser):
    """A denoiser that is the first above a noise level and the second from there on: `HandOver(base, other, 0.9, {})`.

    Both are whole denoisers, or any models that a sampler takes, each with conditions of its own (the call's, and
    second_args) and planned for its own noise levels; their latents are the same space. A method with a memory begins
    the step at `changes` without it (`sample_in_segments`).
    """

    inner_model: Any

    def __init__(self, first: Any, second: Any, at: float, second_args: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner_model, self.second, self.at, self.second_args = first, second, at, second_args

    @property
    def schedule(self) -> NoiseSchedule | EDMSchedule:
        return self.inner_model.schedule

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        return self.inner_model.sigma_to_t(sigma, quantize)

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """x [B, C, h, w], sigma [B] -> denoised, of the model whose noise level it is."""
        return self.predict(x, sigma, **extra_args).denoised

    def bind(self, x: Tensor, sigmas: Sequence[float] | Tensor | None = None, *,  # type: ignore[override]
             need_uncond: bool = False, **extra_args: Any) -> "HandedOver":
        check_x(x)
        levels = None if sigmas is None else torch.as_tensor(sigmas).tolist()
        early, late = (levels and [level for level in levels if above(level, self.at) == first]
                       for first in (True, False))
        return HandedOver(bind(self.inner_model, x, early, need_uncond, extra_args),
                          bind(self.second, x, late, need_uncond, self.second_args), self.at)

    def changes(self, sigmas: Sequence[float]) -> list[int]:
        """The index of the sigma from which the second model steps, if both have one."""
        return [i for i in range(1, len(sigmas) - 1) if above(sigmas[i - 1], self.at) and not above(sigmas[i], self.at)]


class HandedOver:
    """A `HandOver` bound to one run."""

    def __init__(self, first: Bound, second: Bound, at: float) -> None:
        self.first, self.second, self.at = first, second, at

    @cached_property
    def digests(self) -> dict[str, str]:
        """As `samplers.model.digests`."""
        return {**digests(self.first), **{f"refiner_{name}": each for name, each in digests(self.second).items()}}

    @property
    def memory(self) -> Any:
        """As `samplers.model.memory`, with the next two: each model's own."""
        kept = memory(self.first), memory(self.second)
        return None if kept == (None, None) else kept

    @memory.setter
    def memory(self, kept: Any) -> None:
        for bound, own in zip((self.first, self.second), kept, strict=True):
            if own is not None:
                bound.memory = own  # type: ignore[attr-defined]

    def saved(self) -> dict[str, Tensor]:
        return {f"{i}.{key}": x for i, bound in enumerate((self.first, self.second)) if memory(bound) is not None
                for key, x in bound.saved().items()}  # type: ignore[attr-defined]

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        for i, bound in enumerate((self.first, self.second)):
            if memory(bound) is not None:
                bound.resume({key[2:]: x for key, x in tensors.items()  # type: ignore[attr-defined]
                              if key.startswith(f"{i}.")})

    def __call__(self, x: Tensor, levels: float | Levels, scale: float | None = None) -> Prediction:
        early = [above(level, self.at) for level in (levels if isinstance(levels, tuple) else (levels,))]
        if all(early) or not any(early):
            return (self.first if early[0] else self.second)(x, levels, scale)
        rows = torch.tensor(early, device=x.device).view(-1, 1, 1, 1)  # each at its own level
        first, second = self.first(x, levels, scale), self.second(x, levels, scale)

        def chosen(name: str) -> Tensor:
            one, other = (getattr(found, name, found.denoised) for found in (first, second))
            return torch.where(rows, one, other)

        return Prediction(chosen("denoised"), chosen("cond"),
                          None if first.uncond is None or second.uncond is None else chosen("uncond"))
