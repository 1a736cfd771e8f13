"""Pictures on disk, which say how they were made, and contact sheets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ella_kd.files import writing
from ella_kd.request import Request
from ella_kd.texts import QUALITY, format_of, written

Settings = Request  # its older name

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, eq=False)
class Picture:
    """An image and how it was made."""

    image: Image.Image
    settings: Request

    def save(self, path: str | Path, *, enlarge: int = 1, quality: int = QUALITY, overwrite: bool = False) -> None:
        """Write the picture, a PNG, JPEG or WebP by the name's ending, whole or not at all, and not over another file
        unless told to.

        It carries two texts: `parameters`, as the AUTOMATIC1111 web UI writes and reads it, and `ella_kd`, the request
        itself as JSON, which `ella_kd.read_settings` gives back to `generate`. enlarge: every pixel becomes enlarge x
        enlarge equal ones. quality: of JPEG and WebP, 1 to 100, which is lossless for WebP.
        Raises OSError naming the file if it cannot be written, FileExistsError if there is one, ValueError for another
        ending or quality.
        """
        texts = {"parameters": self.settings.parameters(), "ella_kd": self.settings.json()}
        image = self.image
        if enlarge != 1:
            image = image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)
        save_image(image, path, texts, quality=quality, overwrite=overwrite)


def save_png(picture: Picture, path: str | Path, enlarge: int = 1) -> None:
    """`picture.save(path, enlarge=enlarge)`, in place of a file that is there."""
    picture.save(path, enlarge=enlarge, overwrite=True)


def save_image(image: Image.Image, path: str | Path, texts: Mapping[str, str] | None = None, *,
               quality: int = QUALITY, overwrite: bool = True) -> None:
    """Write an image as its name's ending says, PNG without one, whole or not at all. Raises OSError naming the file,
    ValueError for another ending."""
    kind = format_of(path)
    options = written(kind, texts or {}, quality)
    with writing(path, exclusive=not overwrite) as temporary, open(temporary, "wb") as file:
        image.save(file, kind, **options)


def to_images(decoded: Tensor) -> list[Image.Image]:
    """Decoded pictures [B, 3, H, W], about [-1, 1], as 8-bit images. Raises ValueError for NaN."""
    if not bool(decoded.isfinite().all()):
        raise ValueError("the autoencoder returned NaN or infinity; in float16 it may have overflowed: try float32")
    pixels = ((decoded.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str],
                  least: int = 256) -> Image.Image:
    """One image that shows many: a row per text, which stands to the left of its pictures, a label over each column.

    rows: (text, one image per column). Images under `least` px are enlarged, each pixel to a whole number of pixels.
    Raises ValueError for no rows, or a row whose number of images is not that of the columns.
    """
    if not rows or not columns:
        raise ValueError("a contact sheet needs at least one row and one column")
    for text, images in rows:
        if len(images) != len(columns):
            raise ValueError(f"the sheet has {len(columns)} columns, but {len(images)} images came for {text[:60]!r}")
    cells = [[_enlarged(image, least) for image in images] for _, images in rows]
    cell = max(image.width for images in cells for image in images)
    margin, gap, text_width = 28, 16, max(320, cell)
    font, head = _font(17), _font(19)

    texts = [_wrap(text, font, text_width) for text, _ in rows]
    line, head_line = _line_height(font), _line_height(head)
    heights = [max(*(image.height for image in images), line * len(lines))
               for images, lines in zip(cells, texts, strict=True)]
    heads = [_wrap(column, head, cell) for column in columns]
    head_height = head_line * max(len(lines) for lines in heads)

    left = margin + text_width + 2 * gap
    width = left + len(columns) * cell + (len(columns) - 1) * gap + margin
    height = margin + head_height + gap + sum(heights) + 2 * gap * (len(rows) - 1) + margin
    sheet = Image.new("RGB", (width, height), "#fcfcfb")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(heads):
        x = left + column * (cell + gap)
        for i, words in enumerate(lines):
            y = margin + head_height - (len(lines) - i) * head_line
            draw.text((x + (cell - head.getlength(words)) / 2, y), words, font=head, fill="#111111")
    y = margin + head_height + gap
    for row, (images, lines, row_height) in enumerate(zip(cells, texts, heights, strict=True)):
        if row:
            draw.line((margin, y - gap, width - margin, y - gap), fill="#dddddb")
        for i, words in enumerate(lines):
            draw.text((margin, y + (row_height - line * len(lines)) / 2 + line * i), words, font=font, fill="#333333")
        for column, image in enumerate(images):
            x = left + column * (cell + gap) + (cell - image.width) // 2
            sheet.paste(image, (x, y + (row_height - image.height) // 2))
        y += row_height + 2 * gap
    return sheet


def _enlarged(image: Image.Image, least: int) -> Image.Image:
    factor = max(1, least // max(image.size))
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """The text in lines no wider than width pixels; a word that is wider by itself is cut."""
    lines = []
    for paragraph in text.strip().split("\n"):
        current = ""
        for word in paragraph.split():
            if font.getlength(f"{current} {word}".strip()) <= width:
                current = f"{current} {word}".strip()
                continue
            if current:
                lines.append(current)
            while font.getlength(word) > width:
                cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
                lines.append(word[:cut])
                word = word[cut:]
            current = word
        lines.append(current)
    return lines


def _font(size: int) -> Font:
    return ImageFont.load_default(size=size)


def _line_height(font: Font) -> int:
    return round(font.getbbox("Ágjpq|")[3] * 1.25)
