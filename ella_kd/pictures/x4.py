"""Stable Diffusion's x4 upscaler: a network that sees a small picture beside latents as large, and how noisy it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ella_kd.conditioning import Conditioning, With
from ella_kd.denoiser import Condition
from ella_kd.models.pictures import to_pixels
from ella_kd.pictures.beside import with_channels
from ella_kd.pictures.reading import Source
from ella_kd.pictures.segments import other_seeds
from ella_kd.pictures.starts import Size, Start
from ella_kd.pipeline import Pipeline
from ella_kd.samplers import randn

X4 = "x4 upscaler"  # as `models.files.kinds` has it
LEVELS = 350  # of the noise that the published one was trained on
STREAM = 2**20 + 2  # of the seeds


def noised(picture: Tensor, level: int, seeds: Sequence[int]) -> Tensor:
    """A picture [1, 3, h, w] in [-1, 1] with the noise of a timestep of its own schedule, [seeds, 3, h, w]: betas .0001
    to .02, linear in their roots (`low_res_scheduler` of the published files)."""
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    kept = float((1 - betas).cumprod(0)[level])
    noise = randn((len(seeds), *picture.shape[1:]), other_seeds(seeds, STREAM, 0)).to(picture)
    return kept**0.5 * picture + (1 - kept) ** 0.5 * noise


@dataclass(frozen=True, eq=False)
class Small(Start):
    """A picture that the x4 upscaler enlarges, and the level of noise it is shown with. size: of the large picture."""

    small: Image.Image
    level: int
    size: Size
    shape: tuple[int, int, int]
    sigmas: Tensor

    def seen(self, pipeline: Pipeline, lift: Callable[[Condition], Conditioning],
             conditions: Mapping[str, Condition | None], shown: Sequence[Source],
             seeds: Sequence[int]) -> Mapping[str, Condition | None]:
        """The conditions with the small picture, the same for all of them, and its level of noise as their label."""
        like = next(pipeline.unet.parameters())
        picture = noised(to_pixels(self.small, 3, like).float(), self.level, seeds)
        label = torch.tensor([self.level], device=like.device)
        return {name: With(with_channels(lift(condition), picture), label=label)
                for name, condition in conditions.items() if condition is not None}
