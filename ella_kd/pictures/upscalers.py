"""Ways to make a picture larger: latents or pixels interpolated, a network that was trained for it, or any function."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ella_kd.images import to_images
from ella_kd.models import AutoencoderKL
from ella_kd.models.files.weights import Weights
from ella_kd.models.pictures import to_pixels
from ella_kd.pictures.hires_options import LATENTS, PIXELS, Size, Upscaler, check_upscaler, no_upscaler
from ella_kd.placement import carried

TILE, AROUND = 256, 16  # pixels that a network sees at once, and beyond them on every side


@torch.no_grad()
def enlarged_latents(vae: AutoencoderKL, latents: Tensor, size: Size, upscaler: Upscaler) -> Tensor:
    """latents [B, C, h, w] as those of a picture of this width and height, in their dtype.

    By a name of `LATENTS` they are interpolated themselves, as A1111's web UI does it; bilinear leaves them .87 of
    their deviation, hence blur, nearest-exact all of it. Any other way they are decoded, enlarged and encoded.
    """
    width, height = size
    if isinstance(upscaler, str) and upscaler in LATENTS:
        mode, antialias = LATENTS[upscaler]
        return F.interpolate(latents, (height // vae.factor, width // vae.factor), mode=mode, antialias=antialias)
    images = to_images(vae.decode(latents.to(vae.dtype)))
    return torch.cat([vae.encode(enlarged(image, size, upscaler, latents.device)) for image in images]).to(latents)


def enlarged(picture: Image.Image, size: Size, upscaler: Upscaler, device: str | torch.device = "cpu") -> Image.Image:
    """A picture at this size. A network, on this device, or a function is asked up to three times, until it is as
    large, and Lanczos does the rest, as in A1111's web UI. TypeError for a function that returns no picture."""
    if isinstance(upscaler, str) and upscaler in PIXELS:
        return picture.resize(size, PIXELS[upscaler])
    larger = network_of(upscaler) if isinstance(upscaler, str) else upscaler
    for _ in range(3):
        if picture.width >= size[0] and picture.height >= size[1]:
            break
        before = picture.size
        picture = larger(picture, device) if isinstance(larger, Network) else larger(picture)
        if not isinstance(picture, Image.Image):
            raise TypeError(f"an upscaler takes and gives a PIL image, got {type(picture).__name__}")
        if picture.size == before:
            break
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def upscaler_of(upscaler: object, of_pictures: bool = False) -> Upscaler:
    """A name of ours, a function, or the network of a file, which is read. Raises what `check_upscaler` and
    `network_of` do, and ValueError for a way to enlarge latents where there are pictures alone."""
    said = check_upscaler(upscaler)
    if of_pictures and isinstance(said, str) and said in LATENTS:
        raise ValueError(f"{said} enlarges what a first pass drew, in latents, and this is a picture: choose "
                         f"{', '.join(PIXELS)}, or the file of a network")
    return network_of(said) if isinstance(said, str) and said not in LATENTS and said not in PIXELS else said


def network_of(file: str | Path) -> "Network":
    """A network of spandrel's that makes pictures larger (ESRGAN, SwinIR, DAT and others), from its file.

    Read as every file here: safetensors, or a pickle of plain tensors. Needs the extra: `pip install ella-kd[upscale]`.
    Raises FileNotFoundError, and ValueError for a file of another kind or without spandrel.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(no_upscaler(str(file)))
    tensors, spandrel = dict(Weights(file)), _spandrel()
    for inside in ("params_ema.", "params-ema.", "params.", "model_state_dict.", "model.", "net."):
        part = {name.removeprefix(inside): x for name, x in tensors.items() if name.startswith(inside)}
        if part and (len(part) == len(tensors) or inside.startswith("params")):
            tensors = part
            break
    for prefix in ("module.", "netG."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    try:
        network = spandrel.ModelLoader().load_from_state_dict(tensors)
    except Exception as error:  # spandrel's own, and what a misshapen tensor leads to
        raise ValueError(f"{file} is no upscaler that spandrel knows: {type(error).__name__}: {error}") from error
    if not isinstance(network, spandrel.ImageModelDescriptor) or network.input_channels != 3:
        raise ValueError(f"{file} ({network.architecture.name}) does not make a colour picture of a colour picture")
    return Network(network.eval())


class Network:
    """A spandrel descriptor as a function of pictures, tile by tile. It waits in the CPU's memory, and is on the device
    where it works for as long as it does."""

    def __init__(self, network: Any) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(self, picture: Image.Image, device: str | torch.device = "cpu") -> Image.Image:
        with carried(self.network.model, torch.device(device)):
            return self._larger(picture)

    def _larger(self, picture: Image.Image) -> Image.Image:
        scale, like = self.network.scale, next(self.network.model.parameters())
        x = to_pixels(picture, 3, like) / 2 + 0.5
        whole = x.new_empty(1, 3, x.shape[2] * scale, x.shape[3] * scale)
        for top in range(0, x.shape[2], TILE):
            for left in range(0, x.shape[3], TILE):
                up, before = max(top - AROUND, 0), max(left - AROUND, 0)
                part = self.network(x[..., up:top + TILE + AROUND, before:left + TILE + AROUND])
                part = part[..., (top - up) * scale:, (left - before) * scale:][..., :TILE * scale, :TILE * scale]
                whole[..., top * scale:, left * scale:][..., :part.shape[2], :part.shape[3]] = part
        pixels = (whole[0].float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        return Image.fromarray(np.ascontiguousarray(pixels))


def _spandrel() -> Any:
    try:
        with _torchvision():
            import spandrel
    except ImportError as error:
        raise ValueError(f"a network that enlarges needs spandrel: pip install ella-kd[upscale] ({error})") from error
    return spandrel


@contextmanager
def _torchvision() -> Iterator[None]:
    """An empty torchvision while spandrel is imported, where there is none: two of its fifty architectures name
    functions of it, and the torchvision of PyPI beside a CPU's torch breaks transformers."""
    names = [f"torchvision{part}" for part in ("", ".transforms", ".transforms.functional")]
    missing = "spandrel" not in sys.modules and find_spec("torchvision") is None
    if missing:
        sys.modules.update({name: _Empty(name) for name in names})
    try:
        yield
    finally:
        for name in names if missing else ():
            del sys.modules[name]


class _Empty(ModuleType):
    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
