"""What the README says: its scripts run as written, its table is the library's, its links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.readme import README, between_marks, samplers_table
from ella_kd.samplers import SAMPLERS

TEXT = README.read_text()
SCRIPT, SWAP = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(script: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    names = {} if names is None else names
    exec(script, names)
    return names


def test_the_scripts_run_as_written() -> None:
    names = run(SCRIPT)
    assert names["images"].shape == (1, 3, 32, 32)
    assert bool(names["images"].isfinite().all())
    ours = names["latents"]
    theirs = run(SWAP, names)["latents"]  # k-diffusion's own sampler, from the same noise
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_be_swapped_in(name: str) -> None:
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
    for text, folder in ((TEXT, README.parent), ((README.parent / "benchmarks" / "README.md").read_text(),
                                                 README.parent / "benchmarks")):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or Path(folder, target).is_file(), target
