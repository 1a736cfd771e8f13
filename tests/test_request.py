"""What a picture depends on, as one value: kept in its PNG, read back, and drawn again."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ella_kd import PAG, Interval, Pipeline, Rescale, generate, read_settings
from ella_kd.guidance import CFG
from ella_kd.images import Picture, save_image
from ella_kd.request import VERSION, Request

PROMPT = "The scene is set in a deep forest. A red heart sits in the top left corner."
WEB_TEXT = "un château\nSteps: 20, Sampler: Euler, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 4x2"
REQUEST = Request("a red circle, left of: a \"blue\" square", "grey, blurred", scale=7.5, seed=42, width=4, height=2,
                  model="model, with: separators")


def with_texts(path: Path, **texts: str) -> Path:
    save_image(Image.new("RGB", (4, 2)), path, texts)
    return path


def read_a1111(text: str) -> dict[str, str]:
    """What the AUTOMATIC1111 web UI reads from `parameters`: its rules, written from their description."""
    *lines, last = text.strip().split("\n")
    fields = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert len(fields) >= 3
    fields = {key: json.loads(value) if value.startswith('"') else value for key, value in fields.items()}
    at = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[at:]).removeprefix("Negative prompt:").strip()
    return {"Prompt": "\n".join(lines[:at]), "Negative prompt": negative, **fields}


@pytest.fixture(scope="module")
def miniature() -> Pipeline:
    return Pipeline.miniature(device="cpu")


@pytest.mark.parametrize("arguments", [
    {},
    {"mode": "clip", "negative": "a blue ring", "sampler": "euler_ancestral", "schedule": "ays", "clip_skip": 2},
    {"guidance": Interval(PAG(Rescale(CFG(4), 0.7), 0.5, "output_blocks.1.1"), 0.3), "width": 40, "height": 24},
    {"syntax": True, "prompts": "a (red:1.4) heart AND a ring :-0.3", "tags": "night", "negative_mode": "clip"},
    {"syntax": True, "prompts": "[a red heart:a blue ring:0.5]", "negative": "[night|snow]", "tags": "[red:blue:1]"},
    {"sampler": "dpmpp_2m_cfg_pp", "scale": 0.6, "mode": "fixed"},
])
def test_a_picture_is_drawn_again_from_its_png(miniature: Pipeline, arguments: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompts": PROMPT, "scale": 3.0, "steps": 2, "seeds": 2**40 + 1, **arguments}
    [picture] = generate(miniature, progress=False, **options)
    picture.save(tmp_path / "a.png")
    [again] = generate(miniature, progress=False, **read_settings(tmp_path / "a.png"))
    assert again.settings == picture.settings
    assert (np.asarray(again.image) == np.asarray(picture.image)).all()
    text = Request.from_text(picture.settings.parameters())  # says as much, but for the dtype
    assert text.arguments() == picture.settings.arguments()


def test_others_read_how_it_was_made(tmp_path: Path) -> None:
    Picture(Image.new("RGB", (4, 2)), REQUEST).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        text = image.text["parameters"]  # type: ignore[attr-defined]
    assert text.splitlines()[-1].startswith(
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 4x2, ")
    read = read_a1111(text)
    assert (read["Prompt"], read["Negative prompt"]) == (REQUEST.prompt, "grey, blurred")
    assert (read["Model"], read["ELLA"], read["Version"]) == (REQUEST.model, "flexible", f"ella_kd {VERSION}")


def test_prompts_of_any_script_and_of_several_lines_survive(tmp_path: Path) -> None:
    request = Request("ein grüner Würfel\n绿色的方块 🟩", width=4, height=2)
    Picture(Image.new("RGB", (4, 2)), request).save(tmp_path / "a.png")
    assert Request.from_picture(tmp_path / "a.png") == request
    assert read_a1111(request.parameters())["Prompt"] == request.prompt
    assert "Negative prompt" not in request.parameters()


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "webp"])
def test_every_format_carries_the_settings(tmp_path: Path, ending: str) -> None:
    """Others read `parameters` where the web UI puts it; ours come back whole, of any script."""
    request = Request("ein grüner Würfel\n绿色的方块 🟩", "grey, blurred", seed=7, width=16, height=8, sigmas=(5, 1, 0))
    image = Image.effect_noise((16, 8), 50).convert("RGB")
    path = tmp_path / f"a.{ending}"
    Picture(image, request).save(path, quality=100)
    assert Request.from_picture(path) == request
    with Image.open(path) as saved:
        assert saved.size == (16, 8) and saved.format == {"png": "PNG", "webp": "WEBP"}.get(ending, "JPEG")
        off = np.abs(np.asarray(saved, int) - np.asarray(image, int)).max()
        assert off <= (2 if saved.format == "JPEG" else 0)
        if saved.format != "PNG":
            comment = saved.getexif().get_ifd(0x8769)[0x9286]
            assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be") == request.parameters()
    exact = path.stat().st_size
    Picture(image, request).save(path, quality=20, overwrite=True)
    assert path.stat().st_size < exact or ending == "png"


@pytest.mark.parametrize("comment", [
    b"UNICODE\0" + WEB_TEXT.encode("utf-16-be"), b"UNICODE\0" + WEB_TEXT.encode("utf-16-le"),
    b"UNICODE\0" + WEB_TEXT.encode("utf-16"), b"ASCII\0\0\0" + WEB_TEXT.encode(), bytes(8) + WEB_TEXT.encode(),
    WEB_TEXT.encode()])
def test_the_settings_of_others_in_exif(tmp_path: Path, comment: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    read = Request.from_picture(tmp_path / "a.jpg")
    assert (read.prompt, read.sampler, read.seed) == ("un château", "euler", 5)


def test_another_ending_or_quality_is_refused(tmp_path: Path) -> None:
    picture = Picture(Image.new("RGB", (4, 2)), REQUEST)
    for name, quality, what in (("a.gif", 95, r"\.png, \.jpg or \.webp, got"), ("a.jpg", 0, "from 1 to 100, got 0")):
        with pytest.raises(ValueError, match=what):
            picture.save(tmp_path / name, quality=quality)
    assert not list(tmp_path.iterdir())


WEB_UI = """a (red:1.2) fox,
in snow
Negative prompt: blurred
Steps: 25, Sampler: {}, {}CFG scale: 6, Seed: 4242, Size: 512x768, Model hash: 6ce0161689, Model: v1-5, VAE: vae.pt, \
Clip skip: 2, Version: v1.9.4"""


@pytest.mark.parametrize(("sampler", "schedule", "ours"), [
    ("DPM++ 2M", "Karras", ("dpmpp_2m", "karras")),
    ("DPM++ 2M", "Align Your Steps", ("dpmpp_2m", "ays_a1111")),
    ("DPM++ 2M SDE", "Automatic", ("dpmpp_2m_sde", "exponential")),
    ("Euler a", "Automatic", ("euler_ancestral", "normal")),
    ("DPM++ 2M Karras", "", ("dpmpp_2m", "karras")),
    ("DPM++ 2M", "", ("dpmpp_2m", "normal")),
])
def test_the_web_uis_pictures_are_read_and_what_is_not_understood_is_named(tmp_path: Path, sampler: str, schedule: str,
                                                                           ours: tuple[str, str]) -> None:
    text = WEB_UI.format(sampler, f"Schedule type: {schedule}, " if schedule else "")
    with pytest.warns(UserWarning, match=r"left out: Model hash: 6ce0161689, VAE: vae\.pt$"):
        read = Request.from_picture(with_texts(tmp_path / "a.png", parameters=text))
    assert (read.sampler, read.schedule) == ours
    assert read == Request("a (red:1.2) fox,\nin snow", "blurred", "clip", *ours, 25, 6.0, 4242, 512, 768, "v1-5", "",
                           clip_skip=2, syntax=True)


def test_older_and_newer_pictures_are_read_with_a_word(tmp_path: Path) -> None:
    old = {"prompt": "a", "negative": "", "mode": "plain", "sampler": "dpmpp_2m", "schedule": "karras", "steps": 20,
           "scale": 7.0, "seed": 1, "width": 32, "height": 32, "model": "miniature", "version": "0.0.9", "guidance": "",
           "negative_mode": "plain", "tags": None, "syntax": False, "clip_skip": 1}
    with pytest.warns(UserWarning, match=f"was drawn by ella_kd 0.0.9, this is {VERSION}"):
        read = Request.from_picture(with_texts(tmp_path / "old.png", ella_kd=json.dumps(old)))
    assert read == Request("a", mode="clip", seed=1, width=32, height=32, model="miniature", version="0.0.9")
    new = json.dumps({**json.loads(REQUEST.json()), "hologram": "canny.png"})
    with pytest.warns(UserWarning, match="left out: hologram$"):
        assert Request.from_picture(with_texts(tmp_path / "new.png", ella_kd=new)) == REQUEST


@pytest.mark.parametrize(("content", "error", "message"), [
    (None, FileNotFoundError, "no picture at"),
    (b"text", ValueError, "is not a whole picture"),
    ({}, ValueError, "carries no settings: expected a picture with the text"),
    ({"parameters": "a fox"}, ValueError, r"a\.png: expected generation parameters that end in a line such as"),
    ({"ella_kd": "[]"}, ValueError, r"a\.png: expected a JSON object with a prompt"),
    ({"ella_kd": "{"}, ValueError, r"a\.png: "),
    ({"ella_kd": '{"prompt": "a", "sampler": "mine"}'}, ValueError, r"a\.png: unknown sampler 'mine'"),
])
def test_what_cannot_be_read_is_named(tmp_path: Path, content: Any, error: type[Exception], message: str) -> None:
    path = tmp_path / "a.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with_texts(path, **content)
    with pytest.raises(error, match=message):
        read_settings(path)
