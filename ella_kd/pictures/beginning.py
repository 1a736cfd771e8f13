"""Where a run from a picture begins: the picture's latents, what of them is repainted, and the noise levels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from ella_kd.denoiser import Denoiser
from ella_kd.models import AutoencoderKL
from ella_kd.pictures.canvas import Canvas
from ella_kd.pictures.keep import Keep, Repaint, Unlock
from ella_kd.pictures.masks import share, to_cells
from ella_kd.pictures.segments import other_seeds
from ella_kd.pictures.start import sigmas_by_strength
from ella_kd.pictures.starts import Size, Start
from ella_kd.samplers import randn

STRENGTH = 0.6  # where nobody says, and nothing says what is repainted


@dataclass(frozen=True, eq=False)
class Beginning(Start):
    """A picture that is drawn over. picture [1, C, h, w] fp32: what is kept and started from. repaint [h, w] float64: 1
    where it is repainted.

    mask: what `Keep` is given, None where nothing is kept. sigmas [n + 1]. alone: from noise alone where it is
    repainted.
    """

    canvas: Canvas = field()  # field(): else what the class above has would be a default
    picture: Tensor = field()
    repaint: Tensor = field()
    mask: Repaint | Unlock | None
    sigmas: Tensor
    alone: bool

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        channels, h, w = self.picture.shape[1:]
        return channels, h, w

    @property
    def size(self) -> Size:  # type: ignore[override]
        return self.canvas.size

    @classmethod
    @torch.no_grad()
    def of(cls, canvas: Canvas, vae: AutoencoderKL, model: Denoiser, schedule: str, steps: int,
           sigmas: Tensor | None = None) -> "Beginning":
        """sigmas: in place of those that schedule, steps and the strength give. Raises ValueError for no step."""
        asked, picture = canvas.asked, vae.encode(canvas.image).float().contiguous()
        mask: Repaint | Unlock | None = None
        everywhere = canvas.hard is None and canvas.strengths is None
        strength = asked.strength if asked.strength is not None else STRENGTH if everywhere else 1.0
        repaint = torch.ones(picture.shape[2:], dtype=torch.float64)
        if canvas.hard is not None:
            repaint = to_cells(share(canvas.hard), vae.factor)
            mask = Repaint(repaint)
        cells = None
        if canvas.strengths is not None:
            cells = to_cells(canvas.strengths, vae.factor, soft=True)
            top = float(cells.max())
            if not top:
                raise ValueError("the strength map is black: there is nothing to change")
            if sigmas is None:  # steps that would change nothing are not taken
                strength, cells = strength * top, cells / top
        if sigmas is None:
            sigmas = sigmas_by_strength(schedule, steps, model, strength, asked.convention)
        if cells is not None:
            first = float(model.sigma_to_t(torch.tensor([float(sigmas[0])])))
            levels = model.t_to_sigma(cells * first)
            levels = torch.where(cells >= 1 - 1e-6, torch.inf, levels).where(cells * first >= 1, 0.0)
            mask, repaint = Unlock(levels), (levels > 0).double()
        return cls(canvas, picture, repaint, mask, sigmas, strength == 1 and asked.convention == "level")

    def x(self, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        """The run's first x, of noise [B, C, h, w] of unit variance, in its dtype: the picture at sigmas[0].

        Alone, it is noise and nothing else where it is repainted from the first step on; elsewhere that is what the
        fill says. "noise" is the seeds' own, another than `noise`.
        """
        picture, repaint, fill = self.picture.to(noise), self.repaint.to(noise), self.canvas.asked.fill
        if fill in ("noise", "nothing"):
            other = randn(noise.shape, other_seeds(seeds, 1, 0)).to(noise)
            picture = torch.lerp(picture.expand_as(noise), other * (fill == "noise"), repaint)
        if self.alone:
            from_noise = repaint if self.mask is None else self.mask.at(float(self.sigmas[0])).to(noise)
            picture = picture * (1 - from_noise)
        return picture + noise * self.sigmas[0].to(noise)

    def unkept(self) -> "Beginning":
        """The same for a network that sees what is to be kept: all of it is drawn."""
        return replace(self, mask=None, repaint=torch.ones_like(self.repaint))

    def part(self, picture: Image.Image) -> Image.Image:
        return self.canvas.part(picture)

    def back(self, drawn: Image.Image) -> Image.Image:
        return self.canvas.back(drawn)

    def kept(self, model: Denoiser, device: torch.device) -> Denoiser:
        return model if self.mask is None else Keep(model, self.picture.to(device), self.mask)

    def method(self, sampler: str, sigmas: Tensor, fresh: Sequence[int] = (),
               repeats: int = 1) -> Callable[..., Tensor]:
        """In segments too where what is repainted grows on the way."""
        grows = () if self.mask is None else self.mask.changes(sigmas.tolist())
        return super().method(sampler, sigmas, (*fresh, *grows), self.canvas.asked.repeats * repeats)
