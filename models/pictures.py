"""Pictures as the autoencoder takes them."""

from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Images: TypeAlias = "Tensor | np.ndarray | Image.Image"
LIMIT = 10.0  # in [-1, 1] nothing comes near it, in 0..255 hardly a picture stays below


def numbers(picture: Any, takes: str) -> Tensor:
    """A PIL image (its RGB in 0..255), an array or a tensor as a tensor of floats or uint8. TypeError for anything
    else, which says what it takes."""
    x = np.array(picture.convert("RGB")) if isinstance(picture, Image.Image) else picture
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(np.ascontiguousarray(x))
    if not isinstance(x, Tensor) or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise TypeError(f"{takes}, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    return x


def to_pixels(images: Images, channels: int, like: Tensor) -> Tensor:
    """Pictures -> [B, channels, H, W], about [-1, 1], in the dtype and on the device of like.

    A PIL image, and uint8 numbers [B, C, H, W], [B, H, W, C], [C, H, W] or [H, W, C], are pictures in 0..255; floats
    are taken as they are, in [-1, 1]. Another shape stays another shape: the caller refuses it.
    Raises TypeError for anything else, ValueError for floats that are far outside: NaN, or in 0..255.
    """
    x = numbers(images, "images are floats in [-1, 1], or uint8 or a PIL image in 0..255")
    if x.dtype == torch.uint8:
        x = x[None] if x.ndim == 3 else x
        if x.ndim == 4 and x.shape[1] != channels and x.shape[3] == channels:
            x = x.permute(0, 3, 1, 2)
        return x.to(like.device, torch.float32).div(127.5).sub(1).to(like.dtype)
    if x.numel() and not (peak := float(x.detach().abs().amax())) <= LIMIT:
        raise ValueError(f"images are floats in [-1, 1], got values up to {peak:g}: give those in 0..255 as uint8, or "
                         "as x / 127.5 - 1")
    return x.to(like.device, like.dtype)
