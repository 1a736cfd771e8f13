"""SD upscale: tiles share their noise and fade into one another, each with a prompt of its own; the door records it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ella_kd import Pipeline, generate, read_settings
from ella_kd.pictures.upscale import upscale
from ella_kd.request import Request
from test_pictures_pixels import speckled


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


@pytest.mark.parametrize(("given", "message"), [
    ({"upscale": "2"}, "tiles:SCALE"), ({"upscale": "tiles:2:3"}, "strength"),
    ({"upscale": "tiles:2", "start": "a.png", "strength": 0.5}, "without strength"),
    ({"upscale": "tiles:2", "control": "a.safetensors:b.png"}, "without control")])
def test_bad_words(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request("a", **given)
