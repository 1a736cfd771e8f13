"""Texts in pictures: beside the pixels of a PNG, in the EXIF of a JPEG or a WebP, as A1111's web UI puts them."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", "": "PNG"}  # by the name's ending
QUALITY = 95  # of JPEG and WebP
_EXIF, _COMMENT, _MAKER = 0x8769, 0x9286, 0x927C  # the EXIF block, UserComment and MakerNote in it
_EXIF_BYTES = 65533  # that a JPEG has room for; a WebP has no such end
_UNICODE, _ASCII, _OURS = b"UNICODE\0", b"ASCII\0\0\0", b"ella_kd\0"


def format_of(path: str | Path) -> str:
    """What a file of this name is, in Pillow's words. Raises ValueError for another ending."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"a picture is written as .png, .jpg or .webp, got {path}")
    return FORMATS[suffix]


def written(kind: str, texts: Mapping[str, str], quality: int = QUALITY) -> dict[str, Any]:
    """What Pillow's `image.save` takes to write a picture of a kind with these texts.

    In EXIF `parameters` is the UserComment, where the web UI reads it, and `ella_kd` the MakerNote. quality: 1 to 100,
    of JPEG and WebP; at 100 a WebP is lossless. Raises ValueError for another. What a JPEG has no room for is left
    out with a warning, `parameters` first, which `ella_kd` says too.
    """
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise ValueError(f"quality is a whole number from 1 to 100, got {quality!r}")
    if kind == "PNG":
        info = PngInfo()
        for name, text in texts.items():
            info.add_text(name, text)
        return {"pnginfo": info}
    kept = dict(texts)
    exif = _exif_of(kept)
    for name in ("parameters", "ella_kd"):
        if kind == "JPEG" and name in kept and len(exif.tobytes()) > _EXIF_BYTES:
            del kept[name]
            exif = _exif_of(kept)
    if left := [name for name in texts if name not in kept]:
        warnings.warn(f"the text {' and '.join(left)} of {max(map(len, texts.values()))} letters is left out, for "
                      "which a JPEG has no room: save a PNG to keep it", stacklevel=4)
    own = {"subsampling": 0} if kind == "JPEG" else {"lossless": quality == 100}  # 0: colours at the full size
    return {"quality": quality, **own, **({"exif": exif} if kept else {})}


def _exif_of(texts: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    block = exif.get_ifd(_EXIF)
    if "parameters" in texts:
        block[_COMMENT] = _UNICODE + texts["parameters"].encode("utf-16-be")
    if "ella_kd" in texts:
        block[_MAKER] = _OURS + texts["ella_kd"].encode()
    return exif


def texts_of(image: Image.Image) -> dict[str, str]:
    """The texts of a loaded picture, by the names that a PNG's have."""
    found = {name: text for name, text in {**image.info, **getattr(image, "text", {})}.items() if isinstance(text, str)}
    block = image.getexif().get_ifd(_EXIF)
    comment, maker = block.get(_COMMENT), block.get(_MAKER)
    if comment and "parameters" not in found:
        found["parameters"] = comment if isinstance(comment, str) else _decoded(comment)
    if isinstance(maker, bytes) and maker.startswith(_OURS):
        found["ella_kd"] = maker.removeprefix(_OURS).decode()
    return found


def _decoded(comment: bytes) -> str:
    """A UserComment: eight bytes that say how the rest is written. UTF-16 is of either byte order there."""
    start, rest = comment[:8], comment[8:]
    if start == _UNICODE:
        either = [rest.decode(order, "replace") for order in ("utf-16-be", "utf-16-le")]
        return max(either, key=lambda text: sum(letter.isascii() for letter in text)).strip("\ufeff\0")
    return (rest if start in (_ASCII, bytes(8)) else comment).decode("utf-8", "replace").strip("\0")
