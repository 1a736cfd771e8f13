"""Pictures as people have them, from a file or from Pillow: upright, in eight bits and colour, and their alpha."""

from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

Source: TypeAlias = "str | Path | Image.Image"
GREY = (127, 127, 127)  # under what is transparent


def read_picture(source: Source) -> tuple[Image.Image, Image.Image | None]:
    """A picture in RGB, and its alpha (L, 255 opaque) where anything of it is transparent.

    PNG, JPEG, WebP and whatever else Pillow reads: turned as its EXIF says, palettes and CMYK in RGB, through the
    colour profile where it has one, 16-bit greys in 8. What is transparent lies on grey.
    Raises FileNotFoundError, ValueError for a file that is no whole picture, an animation, and numbers that are no
    grey levels (32-bit and floats), TypeError for anything that is no picture.
    """
    if isinstance(source, Image.Image):
        return _upright(source, "the picture")
    if not isinstance(source, (str, Path)):
        raise TypeError(f"a picture is a file or a PIL image, got {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) == 1:
                image.load()
            return _upright(image, str(path))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a whole picture: {error}") from error


def read_mask(source: Source) -> Image.Image:
    """A mask in grey levels (L): white is 255. What is transparent is black. Raises as `read_picture` does."""
    picture, alpha = read_picture(source)
    grey = picture.convert("L")
    return grey if alpha is None else Image.composite(grey, Image.new("L", grey.size), alpha)


def _upright(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"{name} is an animation of {image.n_frames} pictures: give one of them")  # type: ignore[attr-defined]
    if image.mode in ("I", "F"):
        what = "32-bit numbers" if image.mode == "I" else "floats"
        raise ValueError(f"{name} holds {what}, whose white nobody knows: save it in 8 or 16 bits")
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8))
    if profile and image.mode in ("RGB", "CMYK"):
        image = _in_srgb(image, profile)
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image.convert("RGB"), None
    return Image.alpha_composite(Image.new("RGBA", image.size, (*GREY, 255)), image).convert("RGB"), alpha


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Through its own profile; as Pillow converts it where that is broken."""
    try:
        found = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(BytesIO(profile)),
                                          ImageCms.createProfile("sRGB"), outputMode="RGB")
        return found if found is not None else image
    except (ImageCms.PyCMSError, OSError):
        return image
