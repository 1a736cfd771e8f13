"""Where a run from a picture begins: the picture's latents, what of them is repainted, and the noise levels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ella_kd.conditioning import Channels, Conditioning
from ella_kd.denoiser import Condition, Denoiser
from ella_kd.models import AutoencoderKL
from ella_kd.models.pictures import to_pixels
from ella_kd.pictures.canvas import Canvas
from ella_kd.pictures.keep import Keep, Repaint, Unlock
from ella_kd.pictures.masks import share, to_cells
from ella_kd.pictures.reading import Source, read_picture
from ella_kd.pictures.segments import other_seeds, sample_in_segments
from ella_kd.pictures.start import sigmas_by_strength
from ella_kd.samplers import get_sampler, randn
from ella_kd.samplers.registry import RANGE_SAMPLERS

STRENGTH = 0.6  # where nobody says, and nothing says what is repainted


@dataclass(frozen=True, eq=False)
class Beginning:
    """picture [1, C, h, w] fp32: what is kept and started from. repaint [h, w] float64: 1 where it is repainted.

    mask: what `Keep` is given, None where nothing is kept. sigmas [n + 1]. alone: from noise alone where it is
    repainted.
    """

    canvas: Canvas
    picture: Tensor
    repaint: Tensor
    mask: Repaint | Unlock | None
    sigmas: Tensor
    alone: bool

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

    def sample(self, sampler: str, model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Mapping[str, Any],
               callback: Callable[[dict[str, Any]], object] | None = None, disable: bool | None = None, *,
               seeds: Sequence[int], fresh: Sequence[int] = (), **options: Any) -> Tensor:
        """The run: the sampler itself, in segments where steps are repeated or what is repainted grows on the way.

        fresh: other steps that begin without what the method remembers."""
        repeats = self.canvas.asked.repeats
        fresh = [*fresh, *(() if self.mask is None else self.mask.changes(sigmas.tolist()))]
        kept: Denoiser = model if self.mask is None else Keep(model, self.picture.to(x.device), self.mask)
        row = get_sampler(sampler)
        if repeats == 1 and (not fresh or row.name in RANGE_SAMPLERS):
            return row.function(kept, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, seeds=seeds,
                                **options)
        return sample_in_segments(sampler, kept, x, sigmas, extra_args, callback, disable, seeds=seeds, repeats=repeats,
                                  fresh=fresh, **options)


@torch.no_grad()
def seen_beside(channels: int, begun: Beginning | None, vae: AutoencoderKL, size: tuple[int, int],
                lift: Callable[[Condition], Conditioning], conditions: Mapping[str, Condition | None],
                shown: Sequence[Source] = ()) -> dict[str, Condition | None]:
    """The conditions with what a network of so many channels beside x was trained to see there.

    Inpainting (1 + C): where to repaint, and the latents of the picture with grey holes. Depth (1): the depth picture,
    from -1 to 1. An image to edit (C; the network of InstructPix2Pix): the picture's latents, unscaled, for `cond` and
    `image`, which is the uncond with it, zeros for `uncond`. Pictures that are shown (C each; IC-Light's foreground and
    background): their latents, for all conditions. Raises ValueError for another number, and for an image to edit that
    is not there.
    """
    own, like = vae.config.latent_channels, vae.quant_conv.weight
    given = {name: lift(condition) for name, condition in conditions.items() if condition is not None}
    if shown:
        if channels != own * len(shown):
            takes = {own: "a foreground", 2 * own: "a foreground and a background"}.get(channels, "no such pictures")
            raise ValueError(f"this network sees {takes} beside x, got {len(shown)} picture{'s' * (len(shown) > 1)}")
        fitted = [ImageOps.fit(read_picture(each)[0], (size[1] * vae.factor, size[0] * vae.factor),
                               Image.Resampling.LANCZOS) for each in shown]
        grey = 127.5 / 127  # IC-Light was trained with 127 as 0
        beside = torch.cat([vae.encode((to_pixels(each, 3, like) + 1) * grey - 1) for each in fitted], 1).float()
        return {name: with_channels(condition, beside) for name, condition in given.items()}
    if channels == own + 1:
        height, width = (side * vae.factor for side in size)
        pixels, open_ = torch.zeros(1, 3, height, width).to(like), torch.ones(1, 1, *size).to(like)
        if begun is not None:
            hard, image = begun.canvas.hard, to_pixels(begun.canvas.image, 3, like)
            pixels = pixels if hard is None else image * torch.from_numpy(share(hard) < 0.5).to(like)
            open_ = begun.repaint.to(like)[None, None]
        beside = torch.cat([open_, vae.encode(pixels)], 1).float()
        return {name: with_channels(condition, beside) for name, condition in given.items()}
    if channels == 1:
        if begun is None or begun.canvas.depth is None:
            raise ValueError("this network sees how far things are: give start and depth, a picture that is white near")
        far = torch.from_numpy(share(begun.canvas.depth))[None, None].to(like)
        far = F.interpolate(far, size, mode="bicubic", align_corners=False)
        far = 2 * (far - far.amin()) / (far.amax() - far.amin()).clamp(min=1e-6) - 1
        return {name: with_channels(condition, far.float()) for name, condition in given.items()}
    if channels != own:
        raise ValueError(f"this network sees {channels} channels beside x: give each condition its own, "
                         "Channels(cond, channels)")
    if begun is None:
        raise ValueError("this network edits a picture: give it as start (or as foreground to one that relights)")
    image, nothing = begun.picture / vae.config.scale, torch.zeros_like(begun.picture)
    if "uncond" in given:
        given["image"] = given.get("image", given["uncond"])
    return {name: with_channels(condition, nothing if name == "uncond" else image)
            for name, condition in given.items()}


def with_channels(condition: Conditioning, channels: Tensor) -> Conditioning:
    """The condition with these channels beside x; each part of one that combines answers."""
    if condition.of_answers:
        return condition.of(tuple(with_channels(part, channels) for part in condition.parts))
    return Channels(condition, channels)


def has_channels(condition: object) -> bool:
    """Whether a condition, or a part of it, has channels of its own."""
    return isinstance(condition, Channels) or any(map(has_channels, getattr(condition, "parts", ())))
