"""CONTRIBUTING's blocks run as they stand, each in a process's worth of names of its own, and leave no row behind."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
BLOCKS = dict(re.findall(r"### (A[^\n]*)\n.*?```python\n(.*?)```", PAGE, re.DOTALL))


def test_the_page_has_its_headings() -> None:
    assert list(BLOCKS) == ["A sampler", "A schedule", "A guidance rule", "A condition", "A network input", "An add-on"]


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs(name: str) -> None:
    names: dict[str, Any] = {"__name__": "howto"}
    exec(compile(BLOCKS[name], f"CONTRIBUTING.md: {name}", "exec"), names)
