"""Pictures for controls: read as numbers, their edges found, depth read; what else a control may want is elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from ella_kd.models.pictures import numbers

Picture: TypeAlias = Image.Image | np.ndarray | Tensor | str | Path
AUX = "controlnet_aux"  # pip install controlnet-aux
ELSEWHERE = {"hed": (AUX, "HEDdetector"), "softedge": (AUX, "PidiNetDetector"), "scribble": (AUX, "HEDdetector"),
             "openpose": (AUX, "OpenposeDetector"), "mlsd": (AUX, "MLSDdetector"), "normal": (AUX, "NormalBaeDetector"),
             "lineart": (AUX, "LineartDetector"), "lineart_anime": (AUX, "LineartAnimeDetector"),
             "midas": (AUX, "MidasDetector"), "zoe": (AUX, "ZoeDetector"), "shuffle": (AUX, "ContentShuffleDetector"),
             "segmentation": (AUX, "SamDetector"), "mediapipe_face": (AUX, "MediapipeFaceDetector"),
             "depth_anything": ("transformers", 'pipeline("depth-estimation")'),
             "background": ("rembg", "remove")}


def pixels(picture: Picture) -> Tensor:
    """A picture as float32 [1, 3, H, W] in [0, 1], or several [B, 3, H, W].

    A file, a PIL image, uint8 numbers [H, W, 3], [3, H, W] or [H, W] in 0..255, or floats [B, 3, H, W], [3, H, W] or
    [H, W] in [0, 1]; one channel counts for three. Raises TypeError for anything else, FileNotFoundError, and
    ValueError for other shapes and for floats outside [0, 1].
    """
    x: Any = picture
    if isinstance(x, (str, Path)):
        if not Path(x).is_file():
            raise FileNotFoundError(f"no picture at {x}")
        x = Image.open(x)
    x = numbers(x, "a picture is a file, a PIL image, uint8 numbers, or floats in [0, 1]")
    shape = list(x.shape)
    x = x[None] if x.ndim == 2 else x
    x = x[None] if x.ndim == 3 else x
    if x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.permute(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape:
        raise ValueError(f"a picture is [3, H, W], several are [B, 3, H, W], got {shape}")
    if x.is_floating_point() and not bool(((x >= -1e-3) & (x <= 1.001)).all()):
        raise ValueError(f"a control's picture has floats in [0, 1], got {x.min().item():g} to {x.max().item():g}: "
                         "give those in 0..255 as uint8, and those in [-1, 1] as (x + 1) / 2")
    x = (x.float() if x.is_floating_point() else x.float() / 255).contiguous()  # the kernels' rounding follows layout
    return x.expand(-1, 3, -1, -1)


def canny(picture: Picture, low: float = 100, high: float = 200) -> Image.Image:
    """Edges, white on black (Canny 1986): what `cv2.Canny(picture, low, high)` finds.

    low, high: thresholds of |dx| + |dy|, Sobel's 3x3 derivatives of 0..255, in the channel where that is largest; an
    edge starts above high and goes on above low. Nothing is blurred beforehand.
    """
    from scipy import ndimage

    if not 0 <= low <= high:
        raise ValueError(f"canny needs thresholds 0 <= low <= high, got {low} and {high}")
    levels = (pixels(picture)[0] * 255).round().numpy().astype(np.int32)
    dx, dy = _sobel(levels, 1, 2), _sobel(levels, 2, 1)
    size = np.abs(dx) + np.abs(dy)
    strongest = size.argmax(0)[None]
    dx, dy, size = (np.take_along_axis(x, strongest, 0)[0] for x in (dx, dy, size))
    around = np.pad(size, 1)
    height, width = size.shape

    def at(down: int, right: int) -> Any:
        return around[1 + down:1 + down + height, 1 + right:1 + right + width]

    across, along = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << 15
    gentle = across * 13573  # tan(22.5 degrees) * 2^15
    steep = gentle + (across << 16)
    one = np.where((dx ^ dy) < 0, -1, 1)
    diagonal = np.where(one > 0, (size > at(-1, -1)) & (size > at(1, 1)), (size > at(-1, 1)) & (size > at(1, -1)))
    level = (size > at(0, -1)) & (size >= at(0, 1))
    upright = (size > at(-1, 0)) & (size >= at(1, 0))
    ridge = (size > low) & np.where(along < gentle, level, np.where(along > steep, upright, diagonal))
    parts, _ = ndimage.label(ridge, np.ones((3, 3)))
    kept = np.unique(parts[ridge & (size > high)])
    return Image.fromarray(np.where(np.isin(parts, kept[kept > 0]), 255, 0).astype(np.uint8)).convert("RGB")


def depth(picture: Picture, near: str = "bright") -> Image.Image:
    """A depth map of another program, as ControlNets take it: stretched to 0..255, near is bright.

    picture: a file of 8 or 16 bits or .npy, or numbers [H, W]; near: "bright" (MiDaS, disparity) or "dark" (metres).
    """
    if near not in ("bright", "dark"):
        raise ValueError(f'near is "bright" or "dark", got {near!r}')
    if isinstance(picture, (str, Path)):
        if not Path(picture).is_file():
            raise FileNotFoundError(f"no depth map at {picture}")
        picture = np.load(picture) if str(picture).endswith(".npy") else Image.open(picture)
    x = np.asarray(picture.cpu() if isinstance(picture, Tensor) else picture).astype(np.float64)
    x = x.mean(-1) if x.ndim == 3 else x
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"a depth map is [H, W] of finite numbers, got {list(x.shape)}")
    spread = x.max() - x.min()
    x = (x - x.min()) / spread if spread > 0 else np.zeros_like(x)
    return Image.fromarray(np.rint(255 * (x if near == "bright" else 1 - x)).astype(np.uint8)).convert("RGB")


HERE: dict[str, Callable[[Any], Any]] = {"canny": canny, "depth": depth}


def preprocessor(named: str | Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A callable as it is; "canny" and "depth" by name. Raises ValueError naming the package that has another."""
    if callable(named):
        return named
    if named in HERE:
        return HERE[named]
    if named in ELSEWHERE:
        package, call = ELSEWHERE[named]
        raise ValueError(f"{named!r} is not done here: the package {package} does it ({call}); give it as "
                         "preprocess=callable, or the picture that it made")
    raise ValueError(f"no preprocessing {named!r}: {', '.join(HERE)} are here; others are callables, and of "
                     f"{', '.join(ELSEWHERE)} the packages are known")


def _sobel(x: Any, smooth: int, derive: int) -> Any:
    """Sobel's derivative along one axis, in whole numbers; the edge pixels are repeated."""
    from scipy import ndimage

    return ndimage.correlate1d(ndimage.correlate1d(x, [1, 2, 1], smooth, mode="nearest"), [-1, 0, 1], derive,
                               mode="nearest")
