"""SD upscale: tiles share their noise and fade into one another, each with a prompt of its own; the door records it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ella_kd import Pipeline, Refiner, generate, read_settings
from ella_kd.models import UNet
from ella_kd.models.freeu import FreeU
from ella_kd.models.inside import Inside
from ella_kd.models.reuse import Reuse
from ella_kd.models.tome import ToMe
from ella_kd.pictures.upscale import upscale
from ella_kd.request import Request
from test_pictures_pixels import speckled
from tiny import randomised


@pytest.fixture(scope="module")
def pipeline(tiny_files: dict[str, str]) -> Pipeline:
    return Pipeline.load(**tiny_files, device="cpu")  # type: ignore[arg-type]


def test_tiles(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches change nothing; a drawing that gives back what it is given has no seam; prompts are each tile's own."""
    options: dict[str, Any] = {"uncond": pipeline.encode(""), "steps": 2, "tile": 16, "overlap": 4, "progress": False,
                               "strength": 0.5}
    picture, seen = speckled(16, 12), list[tuple[int, int]]()

    def prompts(tiles: list[Image.Image]) -> Any:
        seen.extend(tile.size for tile in tiles)
        return pipeline.encode([f"a {'red' if np.asarray(tile)[0, 0, 0] > 99 else 'blue'} ring" for tile in tiles])

    one, four = (upscale(pipeline, picture, prompts, batch_size=n, **options) for n in (1, 4))
    assert one.size == (32, 24) and seen == [(16, 16)] * 12
    assert np.abs(np.asarray(one).astype(int) - np.asarray(four)).max() <= 1
    other = upscale(pipeline, picture, pipeline.encode("a red ring"), **options)
    assert other.tobytes() != one.tobytes()
    large = picture.resize((32, 24), Image.Resampling.LANCZOS)
    boxes = iter([(0, 0), (8, 0), (16, 0), (0, 8), (8, 8), (16, 8)])
    monkeypatch.setattr("ella_kd.pictures.upscale.draw", lambda pipeline, cond, latents, **rest: [
        large.crop((left, top, left + 16, top + 16)) for left, top in (next(boxes) for _ in latents)])
    assert upscale(pipeline, picture, prompts, **options).tobytes() == large.tobytes()
    with pytest.raises(ValueError, match="overlap by less"):
        upscale(pipeline, picture, prompts, **{**options, "overlap": 16})


@pytest.mark.parametrize("start", [True, False])
def test_the_door(pipeline: Pipeline, start: bool, tmp_path: Path) -> None:
    speckled(16, 12).save(tmp_path / "start.png")
    options = {"start": str(tmp_path / "start.png")} if start else {"width": 16, "height": 12, "hires": "1.5"}
    [picture] = generate(pipeline, "a red ring", upscale="tiles:2", steps=1, seeds=3, progress=False, **options)
    assert picture.image.size == ((32, 24) if start else (48, 32)) and picture.settings.upscale == "tiles:2:0.3"
    picture.save(tmp_path / "a.png")
    [again] = generate(pipeline, progress=False, **read_settings(tmp_path / "a.png"))
    assert again.image.tobytes() == picture.image.tobytes() and again.settings == picture.settings
    assert Request.from_text(picture.settings.parameters()).arguments() == picture.settings.arguments()


@pytest.mark.parametrize(("size", "scale", "tile", "want"), [
    ((33, 47), 2, 16, (64, 96)), ((3, 5), 3.7, None, (12, 20)), ((5, 60), 2, (64, 8), (8, 120)),
    ((9, 9), 1, 200, (8, 8))])
def test_any_picture_and_any_tile(pipeline: Pipeline, size: Any, scale: float, tile: Any, want: Any) -> None:
    picture = upscale(pipeline, speckled(*size), pipeline.encode("a"), uncond=pipeline.encode(""), steps=1,
                      scale=scale, tile=tile, progress=False)
    assert picture.size == want


def test_what_is_refused_before_anything_is_drawn(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("drawing", "jobs", "pictures.upscale"):
        monkeypatch.setattr(f"ella_kd.{name}.draw", lambda *_, **__: pytest.fail("drawn"))
    text = pipeline.encode("a")
    given: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "by 1 to 64, got 0.5", {"scale": 0.5}), (ValueError, "by 1 to 64, got nan", {"scale": math.nan}),
        (TypeError, "by a number, got '2'", {"scale": "2"}), (ValueError, "tile's width .* got 0", {"tile": 0}),
        (ValueError, "tile's width .* got 16.0", {"tile": 16.0}), (ValueError, "batch_size .* 0", {"batch_size": 0}),
        (ValueError, "overlap by less", {"tile": 16, "overlap": -4}), (FileNotFoundError, "at 5x", {"upscaler": "5x"}),
        (ValueError, "latent enlarges what", {"upscaler": "latent"})]
    for error, says, each in given:
        with pytest.raises(error, match=says):
            upscale(pipeline, speckled(16, 16), text, uncond=text, **each)
    for way in ({"hires": "2:0.5"}, {"upscale": "tiles:2"}):
        with pytest.raises(FileNotFoundError, match="no upscaler at 5x"):
            generate(pipeline, "a", hires_upscaler="5x", progress=False, **way)  # type: ignore[arg-type]
@pytest.mark.parametrize("name", ["freeu", "tome", "reuse", "refiner"])
def test_what_reaches_the_tiles(pipeline: Pipeline, name: str) -> None:
    """Of a start picture and of what was drawn alike; what is for larger pictures alone acts before."""
    unet: Any = pipeline.unet
    text, how = dict[str, Any](), dict[str, Any](steps=2, progress=False)
    options: dict[str, Any] = {"freeu": {"freeu": True}, "tome": {"tome": 0.5}, "reuse": {"reuse": "2"},
                               "refiner": {"refiner": replace(pipeline, unet=randomised(UNet(unet.config), 9, 0.12))}}
    network = {"freeu": lambda: Inside(unet, FreeU.of(unet)), "tome": lambda: Inside(unet, ToMe(0.5)),
               "reuse": lambda: Reuse(unet, 2), "refiner": lambda: unet}[name]()
    cond, uncond = pipeline.encode("a red ring"), pipeline.encode("")
    if name == "refiner":
        text["refiner"] = Refiner(options[name]["refiner"], cond, uncond)
    picture, sd = speckled(12, 8), replace(pipeline, unet=network)
    want = upscale(sd, picture, cond, uncond=uncond, seed=3, strength=0.5, **text, **how)
    plain = upscale(pipeline, picture, cond, uncond=uncond, seed=3, strength=0.5, **how)
    [drawn] = generate(pipeline, "a red ring", start=picture, upscale="tiles:2:0.5", seeds=3, **options[name], **how)
    assert drawn.image.tobytes() == want.tobytes() != plain.tobytes()
    how |= {"width": 8, "height": 8}
    [first] = generate(pipeline, "a red ring", seeds=3, **options[name], **how)
    [after] = generate(pipeline, "a red ring", upscale="tiles:2:0.5", seeds=3, **options[name], **how)
    want = upscale(sd, first.image, cond, uncond=uncond, seed=3, strength=0.5, **text, steps=2, progress=False)
    assert after.image.tobytes() == want.tobytes()


@pytest.mark.parametrize(("given", "message"), [
    ({"upscale": "2"}, "tiles:SCALE"), ({"upscale": "tiles:0.5"}, "by 1 to 64, got 0.5"),
    ({"upscale": "tiles:2:3"}, "strength"),
    ({"upscale": "tiles:2", "start": "a.png", "strength": 0.5}, "without strength"),
    ({"upscale": "tiles:2", "control": "a.safetensors:b.png"}, "without control"),
    ({"upscale": "tiles:2", "tiling": True}, "enlarge with hires"),
    *(({"upscale": "tiles:2", "start": "a.png", name: value}, f"leave out {name}, or upscale") for name, value in (
        ("width", 96), ("height", 96), ("sigmas", (5, 1, 0)), ("variation", 0.5), ("tile", "48:16"),
        ("hidiffusion", True), ("deep_shrink", True)))])
def test_bad_words(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request("a", **given)
