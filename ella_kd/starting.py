"""What a call asks for, as the start of its run: `ella_kd.pictures.starts`."""

import shutil
import tempfile
from dataclasses import fields, replace

from PIL import Image
from torch import Tensor

from ella_kd.models.files.kinds import RELIT
from ella_kd.models.network import as_network
from ella_kd.pictures.beginning import Beginning
from ella_kd.pictures.canvas import Canvas
from ella_kd.pictures.inversion import load_latents
from ella_kd.pictures.options import FromNoise, FromPicture
from ella_kd.pictures.reading import read_picture
from ella_kd.pictures.starts import Blank, Size, Start
from ella_kd.pictures.x4 import LEVELS, X4, Small
from ella_kd.pipeline import Pipeline
from ella_kd.request import whole
from ella_kd.samplers import get_schedule


def begin(pipeline: Pipeline, asked: FromPicture, schedule: str, steps: int, width: int | None = None,
          height: int | None = None, sigmas: Tensor | None = None, *, noise: Tensor | None = None,
          latents: Tensor | None = None) -> Start:
    """Where a run starts. width, height: None for a start picture's own, or that of noise or latents that are given
    [B, C, h, w], or the model's. sigmas: in place of schedule and steps. ValueError for what cannot be met."""
    if asked.start is not None and latents is not None:
        raise ValueError("give a start picture or latents, not both: latents are x at sigmas[0]")
    if asked.noise_level != FromPicture.noise_level and (pipeline.purpose != X4 or asked.start is None):
        raise ValueError("noise_level is told to the x4 upscaler, and this is no such network")
    if asked.start is not None and pipeline.purpose != X4:
        return over(pipeline, asked, schedule, steps, width, height, sigmas)
    if sigmas is None:
        sigmas = get_schedule(schedule).sigmas(whole("steps", steps), pipeline.denoiser())
    if asked.start is not None:
        return _enlarging(pipeline, asked, width, height, sigmas)
    if asked.latents is not None:
        latents = load_latents(asked.latents, float(sigmas[0]))
    (w, h), channels = size_of(pipeline, width, height, noise if latents is None else latents), channels_of(pipeline)
    return Blank((channels, h // pipeline.vae.factor, w // pipeline.vae.factor), (w, h), sigmas, latents)


def over(pipeline: Pipeline, asked: FromPicture, schedule: str, steps: int, width: int | None = None,
         height: int | None = None, sigmas: Tensor | None = None) -> Beginning:
    """Over the start picture, as `begin`."""
    given = None if (width, height) == (None, None) else picture_size(pipeline, width, height)
    if asked.strength is None and edits(pipeline) and not asked.shown:
        asked = replace(asked, strength=1.0)
    canvas = Canvas.of(asked, given, picture_size(pipeline, None, None), pipeline.vae.factor)
    with pipeline.at_work("vae"):
        return Beginning.of(canvas, pipeline.vae, pipeline.denoiser(), schedule, whole("steps", steps), sigmas)


def _enlarging(pipeline: Pipeline, asked: FromPicture, width: int | None, height: int | None, sigmas: Tensor) -> Small:
    """The start picture four times as large. ValueError for what the x4 upscaler cannot be told."""
    own = [each for each in fields(FromPicture) if each.name not in (*FromNoise.names(), "start", "noise_level")]
    if said := [each.name for each in own if getattr(asked, each.name) != each.default]:
        raise ValueError(f"the x4 upscaler draws the whole start picture four times as large, without {said[0]}")
    known = getattr(pipeline.unet.config, "classes", None) or LEVELS + 1
    if not 0 <= asked.noise_level < known:
        raise ValueError(f"noise_level is a whole number from 0 to {known - 1}, got {asked.noise_level}")
    assert asked.start is not None
    small: Image.Image = read_picture(asked.start)[0]
    size = small.width * pipeline.vae.factor, small.height * pipeline.vae.factor
    if (width or size[0], height or size[1]) != size:
        raise ValueError(f"the x4 upscaler draws {size[0]}x{size[1]} of a picture of {small.width}x{small.height}: "
                         "leave out width and height")
    return Small(small, asked.noise_level, size, (channels_of(pipeline), small.height, small.width), sigmas)


def edits(pipeline: Pipeline) -> bool:
    """Whether the network sees a whole picture beside x, to edit it (InstructPix2Pix)."""
    return pipeline.purpose != RELIT and as_network(pipeline.unet).in_channels == 2 * channels_of(pipeline)


def repaints(pipeline: Pipeline) -> bool:
    """Whether the network sees where it repaints and what is around (inpainting)."""
    return as_network(pipeline.unet).in_channels == 2 * channels_of(pipeline) + 1


def channels_of(pipeline: Pipeline) -> int:
    """How many channels latents have."""
    return pipeline.vae.config.latent_channels


def size_of(pipeline: Pipeline, width: int | None, height: int | None, given: Tensor | None) -> Size:
    """Width and height of a picture from nothing. ValueError for a size that the decoder cannot do, or that is not
    that of the noise or latents given."""
    if given is None:
        return picture_size(pipeline, width, height)
    if given.shape[1] != channels_of(pipeline):
        raise ValueError(f"this model's latents have {channels_of(pipeline)} channels, got {list(given.shape)}")
    h, w = given.shape[2:]
    size = w * pipeline.vae.factor, h * pipeline.vae.factor
    if (width, height) not in ((None, None), size):
        raise ValueError(f"latents of {h}x{w} are a picture of {size[0]}x{size[1]}, not {width}x{height}: leave out "
                         "width and height")
    return size


def picture_size(pipeline: Pipeline, width: int | None, height: int | None) -> tuple[int, int]:
    """Width and height in pixels, the model's own where they are None. ValueError for what the decoder cannot do."""
    width = whole("width", pipeline.size if width is None else width)
    height = whole("height", pipeline.size if height is None else height)
    check_multiples(width, height, pipeline.vae.factor)
    return width, height


def check_room(pipeline: Pipeline, width: int, height: int) -> None:
    """OSError where the temporary folder has no room to decode a large picture in, before it is drawn."""
    folder = tempfile.gettempdir()
    needed, free = pipeline.vae.scratch(width, height) / 1e9, shutil.disk_usage(folder).free / 1e9
    if needed > free:
        raise OSError(f"decoding {width}x{height} px keeps {needed:.1f} GB in a temporary file, and {folder} has "
                      f"{free:.1f} GB free: set TMPDIR to a folder with more, or draw it smaller")


def check_multiples(width: int, height: int, multiple: int) -> None:
    """ValueError unless both sides are multiples of a latent's pixels."""
    if width % multiple or height % multiple:
        near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (width, height))
        raise ValueError(f"width and height must be multiples of {multiple} for this model, got {width}x{height}: "
                         f"try {near}")