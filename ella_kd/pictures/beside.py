"""What a network sees beside x: channels that its conditions bring."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ella_kd.conditioning import Channels, Conditioning
from ella_kd.denoiser import Condition
from ella_kd.models import AutoencoderKL
from ella_kd.models.pictures import to_pixels
from ella_kd.pictures.masks import share
from ella_kd.pictures.reading import Source, read_picture

if TYPE_CHECKING:
    from ella_kd.pictures.starts import Start


@torch.no_grad()
def seen_beside(channels: int, start: "Start", vae: AutoencoderKL, lift: Callable[[Condition], Conditioning],
                conditions: Mapping[str, Condition | None],
                shown: Sequence[Source] = ()) -> dict[str, Condition | None]:
    """The conditions with what a network of so many channels beside x was trained to see there.

    Inpainting (1 + C): where to repaint, and the latents of the picture with grey holes. Depth (1): the depth picture,
    from -1 to 1. An image to edit (C; the network of InstructPix2Pix): the picture's latents, unscaled, for `cond` and
    `image`, which is the uncond with it, zeros for `uncond`. Pictures that are shown (C each; IC-Light's foreground and
    background): their latents, for all conditions. Raises ValueError for another number, and for an image to edit that
    is not there.
    """
    like, canvas, (own, *size) = vae.quant_conv.weight, start.canvas, start.shape
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
        if canvas is not None and start.repaint is not None:
            hard, image = canvas.hard, to_pixels(canvas.image, 3, like)
            pixels = pixels if hard is None else image * torch.from_numpy(share(hard) < 0.5).to(like)
            open_ = start.repaint.to(like)[None, None]
        beside = torch.cat([open_, vae.encode(pixels)], 1).float()
        return {name: with_channels(condition, beside) for name, condition in given.items()}
    if channels == 1:
        if canvas is None or canvas.depth is None:
            raise ValueError("this network sees how far things are: give start and depth, a picture that is white near")
        far = torch.from_numpy(share(canvas.depth))[None, None].to(like)
        far = F.interpolate(far, size, mode="bicubic", align_corners=False)
        far = 2 * (far - far.amin()) / (far.amax() - far.amin()).clamp(min=1e-6) - 1
        return {name: with_channels(condition, far.float()) for name, condition in given.items()}
    if channels != own:
        raise ValueError(f"this network sees {channels} channels beside x: give each condition its own, "
                         "Channels(cond, channels)")
    if start.picture is None:
        raise ValueError("this network edits a picture: give it as start (or as foreground to one that relights)")
    image, nothing = start.picture / vae.config.scale, torch.zeros_like(start.picture)
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
