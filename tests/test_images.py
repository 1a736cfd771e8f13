import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ella_kd.images import Picture, _font, _wrap, contact_sheet, save_image, save_png
from ella_kd.request import Request

REQUEST = Request("a red circle", width=4, height=2, seed=42)


def drawing() -> Image.Image:
    image = Image.new("RGB", (4, 2), "red")
    image.putpixel((1, 0), (1, 2, 3))
    return image


def test_enlarging_repeats_pixels(tmp_path: Path) -> None:
    save_png(Picture(drawing(), REQUEST), tmp_path / "a.png", enlarge=3)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (12, 6)
        assert all(image.getpixel((x, y)) == drawing().getpixel((x // 3, y // 3)) for x in range(12) for y in range(6))


def test_nothing_is_overwritten_unless_told(tmp_path: Path) -> None:
    path, picture = tmp_path / "a.png", Picture(drawing(), REQUEST)
    old = os.umask(0o027)
    try:
        picture.save(path)
    finally:
        os.umask(old)
    before = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileExistsError, match=f"cannot write {path}"):
        picture.save(path, enlarge=2)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    picture.save(path, enlarge=2, overwrite=True)
    assert path.read_bytes() != before


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_image(drawing(), path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"cannot write {path}: .*; free some space or choose another folder"):
            save_image(Image.effect_noise((64, 64), 90), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, file: Any, *_: object, **__: object) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_image(drawing(), tmp_path / "a.png")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "missing"):
        with pytest.raises(OSError, match=f"cannot write .*{folder}/a.png"):
            save_image(drawing(), tmp_path / folder / "a.png")


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255), (0, 255, 255), (255, 255, 0)]


def box(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Where a colour stands on a sheet, which must be a full rectangle of it."""
    mask = Image.new("L", sheet.size)
    mask.putdata([255 * (pixel == colour) for pixel in sheet.get_flattened_data()])
    found = mask.getbbox()
    assert found
    assert mask.crop(found).getextrema() == (255, 255)
    return found


def test_a_contact_sheet_shows_each_picture_in_its_place_and_no_text_over_it() -> None:
    tiles = [Image.new("RGB", (32, 32), colour) for colour in COLOURS]
    long = "in the middle of the picture stands a large thing with a very long description, and " * 12
    sheet = contact_sheet([("short", tiles[:3]), (long, tiles[3:])], ["plain SD", "ELLA fixed", "ELLA flexible"])
    boxes = [box(sheet, colour) for colour in COLOURS]
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {(256, 256)}
    first, second = boxes[:3], boxes[3:]
    assert [b[0] for b in first] == [b[0] for b in second] == sorted({b[0] for b in boxes})
    assert len({b[1] for b in first}) == len({b[1] for b in second}) == 1
    assert first[0][3] < second[0][1]

    def ink(region: tuple[int, int, int, int]) -> bool:
        return sheet.crop(region).convert("L").getextrema()[0] < 120  # type: ignore[operator]

    for left, top, right, _ in first:
        assert ink((left, 0, right, top)), "a label stands over the column"
    assert ink((0, first[0][1], first[0][0], first[0][3])), "a text stands beside the first row"
    assert ink((0, second[0][1], second[0][0], second[0][3]))
    assert not ink((first[0][0] - 16, 0, first[0][0], sheet.height)), "the text keeps off the pictures"
    assert not ink((0, 0, 28, sheet.height))
    assert not ink((0, sheet.height - 20, sheet.width, sheet.height)), "the last line is not cut off"


def test_a_contact_sheet_keeps_large_pictures_as_they_are() -> None:
    sheet = contact_sheet([("a", [Image.new("RGB", (512, 300), COLOURS[0])])], ["one"])
    left, top, right, bottom = box(sheet, COLOURS[0])
    assert (right - left, bottom - top) == (512, 300)


@pytest.mark.parametrize(("rows", "columns", "message"), [
    ([], ["a"], "at least one row"),
    ([("text", [])], [], "at least one row and one column"),
    ([("text", [drawing()])], ["a", "b"], "2 columns, but 1 images came for 'text'"),
])
def test_a_sheet_of_the_wrong_shape_is_refused(rows: Any, columns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet(rows, columns)


def test_wrapping_loses_no_letter_and_keeps_to_the_width() -> None:
    font = _font(17)
    text = "a dense prompt " * 9 + "with-a-word-that-is-far-too-long-for-a-single-line\nand a second paragraph"
    lines = _wrap(text, font, 200)
    assert max(font.getlength(line) for line in lines) <= 200
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert "and a second paragraph" in lines
    assert _wrap("", font, 200) == [""]
