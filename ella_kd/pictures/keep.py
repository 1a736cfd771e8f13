"""Inpainting with any checkpoint: a guided denoiser that gives back the original where a mask says so."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ella_kd.bound import check_x
from ella_kd.conditioning import Levels, above
from ella_kd.denoiser import Denoiser
from ella_kd.digests import digest
from ella_kd.models.devices import upload
from ella_kd.models.noise_schedule import EDMSchedule, NoiseSchedule
from ella_kd.samplers.model import Bound, Prediction, bind, digests, memory


@dataclass(frozen=True, eq=False)
class Repaint:
    """Where to repaint, the same at every noise level: values [h, w] or [B, 1, h, w], 1 to repaint, 0 to keep.

    Best of 0 and 1 alone: what a value between them keeps depends on the noise level, and in the end on where the
    schedule ends (of .5, 17 % of the difference to the original from sigma 1 down to .03).
    Raises ValueError for another shape and for numbers outside [0, 1].
    """

    values: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _checked("a mask", self.values, 1.0))

    def at(self, level: float | Tensor) -> Tensor:
        """What is repainted at this sigma, or at one sigma per row [B, 1, 1, 1]: shaped as values."""
        return self.values

    def changes(self, sigmas: Sequence[float]) -> list[int]:
        """The indices of the sigmas at which it is another one than at the sigma before."""
        return []


@dataclass(frozen=True, eq=False)
class Unlock:
    """Differential img2img (Levin and Fried 2023, arXiv 2306.00950): each place is repainted from a noise level of its
    own on, as if its own img2img began there.

    diffusers' community pipeline opens a place of change 1 - k at its step ceil(k N) - 1 of N, the last at the latest.
    values [h, w] or [B, 1, h, w]: that sigma; 0 for never, inf for always.
    Raises ValueError for another shape and for numbers below 0.
    """

    values: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _checked("a map of noise levels", self.values, math.inf))

    def at(self, level: float | Tensor) -> Tensor:
        """As of `Repaint`: 1 where this sigma has been reached."""
        level = float(np.float32(level)) if isinstance(level, float) else level.float()  # as an fp32 run has it
        return (self.values.float() >= level).to(self.values.dtype)

    def changes(self, sigmas: Sequence[float]) -> list[int]:
        """As of `Repaint`."""
        starts = self.values.unique().tolist()
        return [i for i in range(1, len(sigmas))
                if any(above(sigmas[i - 1], start) and not above(sigmas[i], start) for start in starts)]


class Keep(Denoiser):
    """A denoiser that repaints a part of a picture and keeps the rest: `Keep(guided, latents, Repaint(mask))`.

    inner_model: the *guided* denoiser, or any model that a sampler takes. latents: the picture, [1 or B, C, h, w].
    Where the mask is 0, every answer (denoised, cond and uncond) is the picture: each sampler's x is then picture +
    sigma * noise all the way, and the picture at its end. CFG++ walks on uncond, hence all three: to replace denoised
    alone leaves errors of .8 on its way. A mask of ones is the inner model, bit for bit.
    What is repainted knows the rest only from what the network sees beside it: of the true conditional mean of a
    Gaussian field six tenths are missing after 20 steps; with `sample_in_segments` (RePaint) and 5 repeats three, spent
    within sigma .2 to 2 two.
    A saved run holds neither the picture nor the mask, and goes on with the same ones only.
    Raises ValueError for latents or a mask that fit neither each other nor x.
    """

    inner_model: Any

    def __init__(self, inner_model: Any, latents: Tensor, mask: Repaint | Unlock) -> None:
        super().__init__()
        if latents.ndim != 4 or not latents.is_floating_point():
            raise ValueError(f"the picture to keep must be latents [B, C, h, w], got {latents.dtype} "
                             f"{list(latents.shape)}")
        if mask.values.shape[-2:] != latents.shape[-2:]:
            raise ValueError(f"the mask is {list(mask.values.shape[-2:])} and the latents {list(latents.shape[-2:])}: "
                             "bring it to their size with to_cells")
        self.inner_model, self.latents, self.mask = inner_model, latents, mask

    @property
    def schedule(self) -> NoiseSchedule | EDMSchedule:
        return self.inner_model.schedule

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        return self.inner_model.sigma_to_t(sigma, quantize)

    def compile(self, **options: Any) -> None:
        """Compile the network in place, see `LDMDenoiser.compile`."""
        self.inner_model.compile(**options)

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """x [B, C, h, w], sigma [B] -> denoised, the picture itself where it is kept."""
        return self.predict(x, sigma, **extra_args).denoised

    def bind(self, x: Tensor, sigmas: Sequence[float] | Tensor | None = None, *,  # type: ignore[override]
             need_uncond: bool = False, **extra_args: Any) -> "KeepRun":
        check_x(x)
        for what, held in (("picture to keep", self.latents), ("mask", self.mask.values)):
            if held.shape[-2:] != x.shape[2:] or (held.ndim == 4 and len(held) not in (1, len(x))):
                raise ValueError(f"the {what} is {list(held.shape)} and x {list(x.shape)}: give one row or one per "
                                 "sample, of the same size")
        if self.latents.shape[1] != x.shape[1]:
            raise ValueError(f"the picture to keep has {self.latents.shape[1]} channels and x {x.shape[1]}")
        inner = bind(self.inner_model, x, sigmas, need_uncond, extra_args)  # type: ignore[arg-type]
        mask = replace(self.mask, values=upload(self.mask.values, x.device))
        return KeepRun(inner, self.latents.to(x).expand_as(x), mask)


class KeepRun:
    """A `Keep` bound to one run; picture [B, C, h, w] and mask on the run's device."""

    def __init__(self, inner: Bound, picture: Tensor, mask: Repaint | Unlock) -> None:
        self.inner, self.picture, self.mask = inner, picture, mask

    @cached_property
    def digests(self) -> dict[str, str]:
        """As `samplers.model.digests`: the picture and the mask beside what the inner run is made with."""
        return {**digests(self.inner), "picture": digest(self.picture), "mask": digest(self.mask)}

    @property
    def memory(self) -> Any:
        """As `samplers.model.memory`, with the next two."""
        return memory(self.inner)

    @memory.setter
    def memory(self, kept: Any) -> None:
        self.inner.memory = kept  # type: ignore[attr-defined]

    def saved(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.inner.saved()  # type: ignore[attr-defined]
        return found

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        self.inner.resume(tensors)  # type: ignore[attr-defined]

    def __call__(self, x: Tensor, levels: float | Levels, scale: float | None = None) -> Prediction:
        found = self.inner(x, levels, scale)
        if isinstance(levels, tuple) and len(levels) > 1:
            level: float | Tensor = upload(torch.tensor(levels), x.device).view(-1, 1, 1, 1)
        else:
            level = levels[0] if isinstance(levels, tuple) else levels
        mask = self.mask.at(level).to(x.dtype).expand_as(x)

        def blended(answer: Tensor) -> Tensor:
            return torch.lerp(self.picture, answer, mask)

        return Prediction(blended(found.denoised), blended(getattr(found, "cond", found.denoised)),
                          None if found.uncond is None else blended(found.uncond))


def _checked(what: str, values: Tensor, most: float) -> Tensor:
    """As floats. ValueError for another shape or number; reads the values."""
    if values.ndim not in (2, 4) or (values.ndim == 4 and values.shape[1] != 1) or 0 in values.shape:
        raise ValueError(f"{what} must be [h, w] or [B, 1, h, w], got {list(values.shape)}")
    values = values if values.is_floating_point() else values.double()
    if not bool(((values >= 0) & (values <= most)).all()):
        raise ValueError(f"{what} holds numbers from 0 to {most:g}, got {values.min():g} to {values.max():g}")
    return values
