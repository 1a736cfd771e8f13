"""The examples run as they stand, are as short as they say, and their pictures show what they are about."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ella_kd
import studio
from benchmarks.demo import describe
from benchmarks.miniature.scenes import parse

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))
Run = Callable[[str], dict[str, Any]]

HEART, RING = "red heart middle left", "blue ring middle right"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs an example in an empty folder, with one miniature for all and at most 10 steps; its variables."""
    monkeypatch.chdir(tmp_path)
    miniature = studio.miniature()
    monkeypatch.setattr(ella_kd.Pipeline, "miniature", lambda: miniature)
    for name in ("draw", "generate"):
        function = getattr(ella_kd, name)
        monkeypatch.setattr(ella_kd, name, lambda *args, function=function, **options: function(
            *args, **{"steps": 10, "progress": False, **options}))
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))


def seen(images: list[Image.Image]) -> list[str]:
    return [describe(parse(np.asarray(image.convert("RGB")))) for image in images]


def test_there_are_thirteen_short_ones_and_each_is_listed() -> None:
    assert len(EXAMPLES) == 13
    text = (FOLDER / "README.md").read_text()
    for name in EXAMPLES:
        source = (FOLDER / f"{name}.py").read_text()
        assert len(source.splitlines()) <= 25
        assert source.startswith('"""')
        assert f"({name}.py)" in text


def test_regions(run: Run) -> None:
    cross, triangle, ring = "yellow cross bottom right", "green triangle top right", "blue ring bottom left"
    heart, expected = "red heart top left", [(0, 1), (2, 3), (0, 2), (3, 1)]
    things = (heart, cross, triangle, ring)
    assert seen(run("regions")["images"]) == [f"{things[i]}, {things[j]}, night" for i, j in expected]


def test_early_late(run: Run) -> None:
    late, still_late, both, _, early = seen(run("early_late")["images"])
    assert late == still_late == "red heart bottom right, snow"
    assert "top left" in both and "red" not in both and both.endswith("night")
    assert early == "blue ring top left, night"


def test_ella_and_clip(run: Run) -> None:
    sentence, tags, both, above, below = seen(run("ella_and_clip")["images"])
    assert sentence == below == f"{HEART}, night"
    assert tags.startswith("yellow cross top right, ")
    assert both == above == f"yellow cross top right, {HEART}, night"


def test_weights(run: Run) -> None:
    for _, images in run("weights")["rows"]:
        found = seen(images)
        assert found[0].startswith("blue") and found[-1].startswith("red")


def test_and_prompts(run: Run) -> None:
    assert seen(run("and_prompts")["images"]) == [f"{HEART}, {RING}, night", f"{HEART}, night", f"{RING}, night"]


def test_prompt_travel(run: Run) -> None:
    found = seen(run("prompt_travel")["images"])
    assert (found[0], found[-1]) == ("red heart center, night", "yellow heart center, night")


def test_img2img(run: Run) -> None:
    names = run("img2img")
    assert seen([names["image"], names["edited"]]) == ["red heart center, night", "red heart center, forest"]


def test_inpainting(run: Run) -> None:
    names = run("inpainting")
    cross = f"{HEART}, yellow cross middle right, night"
    found = seen([names[name] for name in ("image", "repainted", "extended")])
    assert found == [f"{HEART}, {RING}, night", cross, cross]


def test_guidance_rules(run: Run) -> None:
    names = run("guidance_rules")
    assert len({image.tobytes() for images in names["drawn"] for image in images}) == 2 * len(names["rules"])


def test_own_rule(run: Run, tmp_path: Path) -> None:
    run("own_rule")
    with Image.open(tmp_path / "own_rule.png") as image:
        assert seen([image]) == ["red heart center, night"]


def test_features_on_disk(run: Run) -> None:
    assert seen([run("features_on_disk")["image"]]) == ["red heart center, night"]


def test_lora(run: Run) -> None:
    for (_, images), things in zip(run("lora")["rows"], (("red heart center", "yellow ring top left"),
                                                         ("green square center", "pink cross bottom right"))):
        plain, _, striped, _, both = seen(images)
        assert all(thing in plain and f"striped {thing}" in striped for thing in things)
        assert both.count("striped") == 2 and not any(thing in both for thing in things)


def test_control(run: Run) -> None:
    for _, (picture, _, without, steered) in run("control")["rows"]:
        before, plain, after = (parse(np.asarray(image)) for image in (picture, without, steered))
        assert {(t.shape, t.place) for t in after.things} == {(t.shape, t.place) for t in before.things}
        assert after.background != before.background
        assert {(t.shape, t.place) for t in plain.things} != {(t.shape, t.place) for t in before.things}
