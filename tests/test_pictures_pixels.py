"""Pictures as people have them, masks in pixels and in latents, canvases, and what is put back into a picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from ella_kd.pictures import masks
from ella_kd.pictures.canvas import Canvas
from ella_kd.pictures.options import FromPicture
from ella_kd.pictures.reading import GREY, read_mask, read_picture

RED, BLUE = (200, 30, 40), (20, 60, 220)


def two_colours(width: int = 6, height: int = 4) -> Image.Image:
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def speckled(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def white(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Image.Image:
    """A mask with white boxes, their last pixels not included."""
    mask = Image.new("L", size)
    for left, top, right, bottom in boxes:
        ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), 255)
    return mask


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "bmp"])
def test_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    two_colours(32, 16).save(path, **{"lossless": True} if suffix == "webp" else {"quality": 95, "subsampling": 0})
    image, alpha = read_picture(path)
    assert image.mode == "RGB" and image.size == (32, 16) and alpha is None
    assert np.abs(np.asarray(image)[8, [3, 28]].astype(int) - [RED, BLUE]).max() <= (3 if suffix == "jpg" else 0)


def test_what_pictures_hold(tmp_path: Path) -> None:
    """Turned as EXIF says; palettes, grey, 16 bits, CMYK, transparency and profiles in RGB, to what one sees."""
    image = two_colours()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    turned, _ = read_picture(tmp_path / "turned.png")
    assert turned.size == (4, 6) and turned.getpixel((0, 0)) == RED and turned.getpixel((0, 5)) == BLUE

    assert read_picture(image.quantize(8))[0].getpixel((5, 0)) == BLUE
    assert read_picture(image.convert("CMYK"))[0].getpixel((5, 0)) == BLUE
    deep = Image.fromarray(np.full((2, 2), 40 * 257, np.uint16))
    deep.save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png")[0].getpixel((0, 0)) == (40, 40, 40)
    assert read_picture(Image.new("1", (2, 2), 1))[0].getpixel((0, 0)) == (255, 255, 255)

    clear = image.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 3, 4))
    for seen in (clear, clear.quantize(8)):
        picture, alpha = read_picture(seen)
        assert alpha is not None and (alpha.getpixel((0, 0)), alpha.getpixel((5, 0))) == (0, 255)
        assert picture.getpixel((0, 0)) == GREY and picture.getpixel((5, 0)) == BLUE
    assert read_picture(image.convert("RGBA"))[1] is None  # opaque all over
    assert read_mask(clear).getpixel((0, 0)) == 0

    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.info["icc_profile"] = lab
    assert read_picture(image)[0].getpixel((5, 0)) == BLUE
    image.info["icc_profile"] = b"broken"
    assert read_picture(image)[0].getpixel((5, 0)) == BLUE


def test_what_is_refused_by_name(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"moving.webp is an animation of 2"):
        read_picture(tmp_path / "moving.webp")
    (tmp_path / "note.png").write_text("no picture")
    half = tmp_path / "half.png"
    speckled(64, 64).save(half)
    half.write_bytes(half.read_bytes()[:2000])
    for name in ("note.png", "half.png"):
        with pytest.raises(ValueError, match=f"{name} is not a whole picture"):
            read_picture(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no picture at"):
        read_picture(tmp_path / "nowhere.png")
    for mode, what in (("F", "floats"), ("I", "32-bit")):
        with pytest.raises(ValueError, match=what):
            read_picture(Image.new(mode, (2, 2)))
    with pytest.raises(TypeError, match="PIL image"):
        read_picture(3)  # type: ignore[arg-type]


def test_masks() -> None:
    mask = white((16, 8), (4, 2, 5, 3))  # one pixel
    assert masks.to_cells(masks.share(mask), 4).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert masks.to_cells(masks.share(mask), 4, soft=True)[0, 1] == 1 / 16
    assert masks.grown(mask, 2).getbbox() == (2, 0, 7, 5)
    assert masks.grown(masks.grown(mask, 2), -2).getbbox() == (4, 0, 5, 3)  # it had grown beyond the top
    soft = masks.share(masks.softened(white((32, 32), (0, 0, 16, 32)), 2.0))
    assert soft[16, 2] == 1 and soft[16, 29] == 0 and 0.4 < soft[16, 15] < 0.6


@pytest.mark.parametrize(("box", "padding", "size", "wanted"), [
    ((40, 40, 60, 60), 10, (64, 64), (30, 30, 70, 70)),
    ((40, 40, 60, 60), 10, (64, 32), (10, 30, 90, 70)),
    ((0, 90, 10, 100), 5, (64, 64), (0, 85, 15, 100)),
    ((0, 40, 100, 60), 0, (64, 64), (0, 0, 100, 100)),
])
def test_the_box_of_a_mask(box: Any, padding: int, size: Any, wanted: Any) -> None:
    assert masks.box_of(white((100, 100), box), padding, size) == wanted
    with pytest.raises(ValueError, match="nothing to repaint"):
        masks.box_of(white((100, 100)), padding, size)


def canvas(start: Image.Image, given: Any = None, own: Any = (32, 32), **asked: Any) -> Canvas:
    return Canvas.of(FromPicture(start=start, **asked), given, own, 4)


def test_back_into_the_picture_pixel_for_pixel() -> None:
    """Outside a hard mask the original's pixels, whether the whole was drawn or a part of it, larger."""
    picture, box = speckled(96, 64), (40, 20, 52, 32)
    mask = white((96, 64), box)
    inside = np.asarray(mask) == 255
    whole = canvas(picture, mask=mask, mask_blur=0)
    part = canvas(picture, mask=mask, mask_blur=0, crop_to_mask=True, padding=4)
    assert whole.image.size == (96, 64) and part.image.size == (32, 32) and part.box == (36, 16, 56, 36)
    for each in (whole, part):
        back = np.asarray(each.back(Image.new("RGB", each.image.size, BLUE)))
        assert (back[~inside] == np.asarray(picture)[~inside]).all()
        assert (back[inside] == BLUE).all()
    inverted = np.asarray(canvas(picture, mask=mask, mask_blur=0, invert_mask=True).back(Image.new("RGB", (96, 64))))
    assert (inverted[inside] == np.asarray(picture)[inside]).all() and not inverted[~inside].any()
    soft = np.asarray(canvas(picture, mask=mask).back(Image.new("RGB", (96, 64))))
    far = np.asarray(masks.grown(mask, 9)) == 0
    assert (soft[far] == np.asarray(picture)[far]).all()
    clear = picture.convert("RGBA")
    clear.putalpha(Image.eval(mask, lambda value: 255 - value))
    assert canvas(clear, mask_blur=0).hard.tobytes() == mask.tobytes()  # type: ignore[union-attr]


def test_canvases() -> None:
    with pytest.warns(UserWarning, match="30x21.*32x20"):
        assert canvas(speckled(30, 21)).image.size == (32, 20)
    assert canvas(speckled(30, 21), (16, 32)).image.size == (16, 32)
    picture = speckled(32, 32)
    wide = canvas(picture, extend="left=16,bottom=8")
    assert wide.image.size == wide.original.size == (48, 40)
    assert wide.strengths is not None and wide.soft is not None
    assert (wide.strengths[:, :16] == 1).all() and (wide.strengths[32:] == 1).all()
    assert (np.diff(wide.strengths[0, 16:]) <= 0).all() and wide.strengths[0, -1] == 0  # ever less into the picture
    assert wide.strengths[0, 16 + 7] == pytest.approx(np.exp(-1))  # k = 1/2 of the 16 that are new
    back = np.asarray(wide.back(Image.new("RGB", (48, 40))))
    old = np.asarray(picture)
    assert (back[0, -1] == old[0, -1]).all() and not back[:, :16].any()
    assert (np.asarray(wide.image)[:32, :16] == old[:, :1]).all()  # the edge goes on
    both = canvas(picture, extend="left=16", mask=white((32, 32), (28, 28, 32, 32)))
    assert both.strengths is not None and (both.strengths[28:, 44:] == 1).all()
    half = canvas(picture, strength_map=Image.new("L", (64, 64), 128))
    assert half.strengths is not None and half.strengths.max() == pytest.approx(128 / 255)
    flat = canvas(two_colours(32, 32), mask=white((32, 32), (16, 0, 32, 32)), fill="blur")
    assert np.abs(np.asarray(flat.image).astype(int) - RED).max() <= 8


def test_colours_brought_back() -> None:
    picture = speckled(32, 32)
    tinted = Image.fromarray((np.asarray(picture) * 0.5 + [60, 20, 0]).astype(np.uint8))
    mask = white((32, 32), (0, 0, 8, 8))
    back = canvas(picture, mask=mask, match_colours=True).back(tinted)
    near = np.abs(np.asarray(back)[:8, :8].astype(float) - np.asarray(picture)[:8, :8]).mean()
    far = np.abs(np.asarray(tinted)[:8, :8].astype(float) - np.asarray(picture)[:8, :8]).mean()
    assert near < 0.35 * far


@pytest.mark.parametrize(("asked", "what"), [
    ({"mask": Image.new("L", (64, 32), 255)}, "same proportions"),
    ({"strength_map": Image.new("L", (64, 32), 255)}, "same proportions"),
    ({"crop_to_mask": True}, "needs a mask"),
    ({"invert_mask": True}, "about a mask"),
    ({"extend": "left=3"}, "multiples of 4, such as 36x32"),
])
def test_canvases_refused(asked: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        canvas(speckled(32, 32), **asked)


@pytest.mark.parametrize(("asked", "what"), [
    ({"mask": "a.png"}, "mask is about a start picture"), ({"start": "a.png", "strength": 2.0}, "at most 1"),
    ({"start": "a.png", "fill": "grey"}, "choose original, noise"), ({"start": "a.png", "extend": "up=3"}, "left=64"),
    ({"start": "a.png", "extend": "left=0"}, "at least one side"), ({"start": "a.png", "mask_blur": -1}, "0 or more"),
    ({"start": "a.png", "convention": "webui"}, "choose level"),
    ({"start": "a.png", "extend": "left=8", "crop_to_mask": True}, "without extend"),
])
def test_options_refused(asked: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        FromPicture(**asked)
