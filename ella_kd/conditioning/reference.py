"""Conditionings that look at another picture, reference-only: `cond.with_reference(latents)`."""

from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ella_kd.conditioning.base import Conditioning
from ella_kd.conditioning.control import ALWAYS, Steering, Window, steered
from ella_kd.models.context import Context
from ella_kd.models.devices import upload
from ella_kd.models.network import Levels
from ella_kd.models.reference import Reference
from ella_kd.samplers.noise import randn
from ella_kd.scale import Scale, check_scale


class Noised(NamedTuple):
    """A picture [1, C, h, w] as latents, and the noise that hides it."""

    latents: Tensor
    noise: Tensor

    def at(self, sigma: float, sigma_data: float) -> Tensor:
        """What a network sees of it at a noise level: c_in * (latents + sigma * noise)."""
        return (self.latents + sigma * self.noise) / (sigma**2 + sigma_data**2) ** 0.5


class Looks(Steering):
    """Pictures that the self-attention looks at; levels: the noise levels that it was decided for."""

    sigma_data: float
    levels: Levels

    @property
    def varies(self) -> bool:
        return True

    def at(self, levels: Levels) -> Conditioning:
        decided = super().at(levels)
        assert isinstance(decided, Looks)
        return type(self)(decided.things, decided.strength, sigma_data=self.sigma_data, levels=levels)

    def like(self, things: tuple[Any, ...], strength: Scale, own: tuple[Any, ...]) -> Self:
        return type(self)(things, strength, sigma_data=self.sigma_data, levels=self.levels)

    def shown(self, things: tuple[Any, ...], own: tuple[Context, ...], **rows: Any) -> dict[str, Any]:
        if not self.levels:
            raise ValueError("a reference is noised by sigma, and t does not tell it: call "
                             "conditioning.at((sigma,))(t), as a denoiser does")
        levels = [self.levels[row % len(self.levels)] for row in rows["rows"]]
        latents = torch.cat([thing.at(level, self.sigma_data) for thing, level in zip(things, levels, strict=True)])
        return {"references": (Reference(rows["rows"], rows["strengths"], latents),)}

    def __call__(self, t: Tensor) -> Context:
        things = tuple(Noised(*(upload(x, t.device) for x in thing)) for thing in self.things)
        return super(Looks, type(self)(things, self.strength, sigma_data=self.sigma_data,
                                       levels=self.levels)).__call__(t)


def with_reference(cond: Conditioning, latents: Tensor, weight: Scale = 1.0, *, window: Window = ALWAYS, seed: int = 0,
                   sigma_data: float = 1.0) -> Conditioning:
    """See `Conditioning.with_reference`."""
    if not isinstance(latents, Tensor) or latents.ndim != 4 or not latents.is_floating_point():
        raise ValueError("a reference is given as its latents [B, C, h, w], pipeline.vae.encode(pixels), got "
                         f"{list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__}")
    # A stream of its own: the noise that a picture of this seed begins with would be recognised in the reference.
    drawn = np.random.SeedSequence([seed, 3]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    noise = randn((1, *latents.shape[1:]), [int(drawn)])
    precise = latents.to(torch.promote_types(latents.dtype, torch.float32))
    things = [Noised(row, noise.to(row)) for row in precise.split(1)]
    how = {"sigma_data": sigma_data, "levels": ()}
    return steered(cond, Looks(things, check_scale("the weight of a reference", weight), **how), window)
