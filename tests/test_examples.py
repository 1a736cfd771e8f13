"""The examples run as they stand, are as short as they say, and their pictures show what they are about."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.miniature.scenes import Scene, parse

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.chdir(folder)
    return runpy.run_path(str(FOLDER / f"{name}.py"))


def seen(image: Image.Image) -> Scene:
    return parse(np.asarray(image.convert("RGB")))


def test_there_are_ten_and_each_is_listed() -> None:
    assert len(EXAMPLES) == 10
    text = (FOLDER / "README.md").read_text()
    assert all(f"({name}.py)" in text for name in EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (FOLDER / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 25
    assert source.startswith('"""')
    run(name, tmp_path, monkeypatch)
    pictures = list(tmp_path.glob("*.png"))
    assert pictures
    for path in pictures:
        with Image.open(path) as image:
            assert np.asarray(image).std() > 5
