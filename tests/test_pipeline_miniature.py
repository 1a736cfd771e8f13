"""The miniature that comes with the package: its files, and that it is what the command draws with by default."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ella_kd import Pipeline, generate
from ella_kd.cli import main

FOLDER = Path(__file__).parents[1] / "models" / "miniature"
FILES = ["sd.safetensors", "tsc.safetensors", "clip/tokenizer.json", "t5/config.json", "t5/model.safetensors",
         "t5/tokenizer.json"]
PROMPT = "The scene is set in a deep forest. A red heart sits in the top left corner."


def test_the_files_are_there_and_small() -> None:
    missing = [name for name in FILES if not (FOLDER / name).is_file()]
    assert not missing, f"{FOLDER} lacks {missing}: train them with python -m benchmarks.miniature.train"
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 25e6


def test_it_draws_at_its_own_size_in_every_mode() -> None:
    pipeline = Pipeline.miniature(device="cpu")
    assert (pipeline.size, pipeline.name) == (48, "miniature")
    assert pipeline.vae.factor == 8
    drawn = [np.asarray(generate(pipeline, PROMPT, mode=mode, steps=4, seeds=1, progress=False)[0].image)
             for mode in ("clip", "fixed", "flexible")]
    assert {array.shape for array in drawn} == {(48, 48, 3)}
    assert all(array.std() > 5 for array in drawn)
    assert (drawn[0] != drawn[2]).any()


def test_the_command_draws_with_it_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["generate", PROMPT, "--steps", "2", "--seed", "1", "--enlarge", "4"])
    assert done.exit_code == 0, done.output
    with Image.open(next((tmp_path / "out").iterdir())) as image:
        assert image.size == (192, 192)
        assert "Model: miniature" in image.text["parameters"]  # type: ignore[attr-defined]
