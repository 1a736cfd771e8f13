"""What the README says: its scripts run as written, its table is the library's, its links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import studio
from benchmarks.demo import describe
from benchmarks.miniature.scenes import parse
from benchmarks.readme import README, between_marks, samplers_table
from ella_kd import Pipeline
from ella_kd.samplers import SAMPLERS

TEXT = README.read_text()
GUIDE = README.parent / "examples" / "README.md"
SCRIPT, SWAP, COMBINE, ADD = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(autouse=True)
def _folder_for_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(script: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    names = {} if names is None else names
    exec(script, names)
    return names


def test_the_scripts_run_as_written(tmp_path: Path) -> None:
    names = run(SCRIPT)
    assert names["images"].shape == (1, 3, 48, 48)
    assert bool(names["images"].isfinite().all())
    ours = names["latents"]
    theirs = run(SWAP, names)["latents"]  # k-diffusion's own sampler, from the same noise
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"heart.png", "heart_by_k_diffusion.png"}


def test_regions_show_what_each_was_told() -> None:
    images = run(COMBINE, {"sd": Pipeline.miniature()})["images"]
    assert {describe(parse(np.asarray(image))) for image in images} == {
        "red heart middle left, blue ring middle right, night"}


def test_add_ons_do_what_they_are_for() -> None:
    styled, word, steered = (parse(np.asarray(image)).things for image in run(ADD)["images"])
    assert [(thing.shape, thing.place) for thing in styled] == [("heart", 4)] and styled[0].colour != "red"
    assert [(thing.shape, thing.colour, thing.place) for thing in word] == [("ring", "yellow", 0)]
    assert [(thing.shape, thing.colour, thing.place) for thing in steered] == [("heart", "red", 4)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_be_swapped_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    miniature = studio.miniature()
    monkeypatch.setattr(Pipeline, "miniature", lambda: miniature)  # the first test has loaded it as a reader does
    script = SCRIPT.replace("sample_dpmpp_2m", f"sample_{name}").replace("karras(20,", "karras(3,")
    if name.endswith("_cfg_pp"):
        script = script.replace("cond_scale=3.0", "cond_scale=0.6")
    assert bool(run(script)["latents"].isfinite().all())


def test_the_table_is_the_librarys() -> None:
    assert between_marks(TEXT, "samplers", samplers_table()) == TEXT, "run python -m benchmarks.readme"


def test_marks_that_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match="<!-- nothing -->"):
        between_marks(TEXT, "nothing", "")


def test_links_and_pictures_exist() -> None:
    for page in (README, GUIDE, README.parent / "benchmarks" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or Path(page.parent, target).is_file(), target
