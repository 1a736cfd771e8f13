"""What a picture depends on, as one value: kept in its PNG, read back, and drawn again."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ella_kd import PAG, Interval, Pipeline, Rescale, generate, read_settings
from ella_kd.guidance import CFG
from ella_kd.images import Picture, save_image
from ella_kd.request import VERSION, Request

PROMPT = "The scene is set in a deep forest. A red heart sits in the top left corner."
REQUEST = Request("a red circle, left of: a \"blue\" square", "grey, blurred", scale=7.5, seed=42, width=4, height=2,
                  model="model, with: separators")


def with_texts(path: Path, **texts: str) -> Path:
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    save_image(Image.new("RGB", (4, 2)), path, info)
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
    assert Request.from_png(tmp_path / "a.png") == request
    assert read_a1111(request.parameters())["Prompt"] == request.prompt
    assert "Negative prompt" not in request.parameters()


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
        read = Request.from_png(with_texts(tmp_path / "a.png", parameters=text))
    assert (read.sampler, read.schedule) == ours
    assert read == Request("a (red:1.2) fox,\nin snow", "blurred", "clip", *ours, 25, 6.0, 4242, 512, 768, "v1-5", "",
                           clip_skip=2, syntax=True)


def test_older_and_newer_pictures_are_read_with_a_word(tmp_path: Path) -> None:
    old = {"prompt": "a", "negative": "", "mode": "plain", "sampler": "dpmpp_2m", "schedule": "karras", "steps": 20,
           "scale": 7.0, "seed": 1, "width": 32, "height": 32, "model": "miniature", "version": "0.0.9", "guidance": "",
           "negative_mode": "plain", "tags": None, "syntax": False, "clip_skip": 1}
    with pytest.warns(UserWarning, match=f"was drawn by ella_kd 0.0.9, this is {VERSION}"):
        read = Request.from_png(with_texts(tmp_path / "old.png", ella_kd=json.dumps(old)))
    assert read == Request("a", mode="clip", seed=1, width=32, height=32, model="miniature", version="0.0.9")
    new = json.dumps({**json.loads(REQUEST.json()), "control": "canny.png"})
    with pytest.warns(UserWarning, match="left out: control$"):
        assert Request.from_png(with_texts(tmp_path / "new.png", ella_kd=new)) == REQUEST


@pytest.mark.parametrize(("content", "error", "message"), [
    (None, FileNotFoundError, "no picture at"),
    (b"text", ValueError, "is not a whole picture"),
    ({}, ValueError, "carries no settings: expected a PNG with the text"),
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
