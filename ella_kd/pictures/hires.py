"""Hires fix: what was drawn is enlarged, gets noise again, and is drawn over by a run of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ella_kd.denoiser import Condition
from ella_kd.guidance import Guidance
from ella_kd.pictures.hires_options import STRENGTH, Size, Upscaler
from ella_kd.pictures.segments import other_seeds
from ella_kd.pictures.start import check_strength, sigmas_by_strength
from ella_kd.pictures.upscalers import enlarged_latents, upscaler_of
from ella_kd.pipeline import Pipeline
from ella_kd.refining import Refiner
from ella_kd.samplers import randn

STREAM = 2**20  # of the seeds of a second pass: noise that made a picture burns it when it is added again


@dataclass(frozen=True, eq=False)
class Hires:
    """A second pass for `draw`: `draw(sd, cond, uncond=..., hires=Hires((1024, 1024), 0.5, "latent"))`.

    size: width and height of the picture. strength: as in A1111 and ComfyUI, see `sigmas_by_strength`. upscaler: see
    `enlarged_latents`. The rest is of the second pass alone, None for what the first one has; its conditions are read
    at its own timesteps. refiner: takes over on the way of the second pass, with conditions for it. network: what its
    UNet is made of the first one's, `partial(Tiled, size=64)` or `lambda unet: Inside(unet, ...)`. Raises ValueError,
    TypeError or FileNotFoundError for a strength or an upscaler that there cannot be.
    """

    size: Size
    strength: float = STRENGTH
    upscaler: Upscaler = "lanczos"
    sampler: str | None = None
    schedule: str | None = None
    steps: int | None = None
    guidance: Guidance | float | None = None
    cond: Condition | None = None
    uncond: Condition | None = None
    refiner: Refiner | None = None
    network: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength)
        object.__setattr__(self, "upscaler", upscaler_of(self.upscaler))

    def sigmas(self, pipeline: Pipeline, schedule: str, steps: int) -> Tensor:
        """The noise levels of the second pass, [steps + 1]; schedule, steps: of the first."""
        return sigmas_by_strength(self.schedule or schedule, self.steps or steps, pipeline.denoiser(), self.strength,
                                  "comfyui")

    def start(self, pipeline: Pipeline, latents: Tensor, sigma: Tensor,
              seeds: Sequence[int]) -> tuple[Tensor, list[int]]:
        """x at sigma, [B, C, h, w] of the second pass, and its seeds."""
        with pipeline.at_work("vae"):
            picture = enlarged_latents(pipeline.vae, latents, self.size, self.upscaler)
        others = other_seeds(seeds, STREAM, 0)
        return picture + randn(tuple(picture.shape), others).to(picture) * sigma.to(picture), others

    def pipeline(self, pipeline: Pipeline) -> Pipeline:
        """The system of the second pass."""
        return pipeline if self.network is None else replace(pipeline, unet=self.network(pipeline.unet))

    def said(self) -> dict[str, Any]:
        """The arguments of `draw` that the second pass has of its own."""
        own = {name: getattr(self, name) for name in ("sampler", "guidance", "cond", "uncond", "refiner")}
        return {name: value for name, value in own.items() if value is not None}
