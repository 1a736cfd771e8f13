"""The mutation tool: it finds what a toy's tests see and what they miss, and changes no file."""

import json
import os
import subprocess
import sys
from pathlib import Path

TOY = '''
def clip(x, low):
    """2 + 2: a docstring is not changed."""
    if x < low:
        raise ValueError(f"x must be at least {low}")
    return x

WIDTH = 3

def unseen():
    return clip(4, 2)
'''
TESTS = '''
import pytest, toy

def test_above():
    assert toy.clip(2, 1) == 2

@pytest.mark.parametrize("x", [0, -1])
def test_below(x):
    with pytest.raises(ValueError):
        toy.clip(x, 1)

def test_width():
    assert toy.WIDTH == 3 and toy.clip(2, 1) == 2
'''


def test_finds_what_a_suite_misses(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "test_toy.py").write_text(TESTS)
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("mutants.py")), "--only", "toy.py",
                           "--test-files", "test_*.py", "--count", "99", "--preload"],
                          cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "mutants.json").read_text())
    outcomes = {(mutant["line"], mutant["change"]): mutant["outcome"] for mutant in found["mutants"]}
    assert outcomes[4, "x < low  ->  x <= low"] == "survived"  # no test has x == low
    assert outcomes[4, "x < low  ->  x >= low"] == "killed"
    assert outcomes[8, "3  ->  4"] == "killed"  # acts during the import
    assert outcomes[11, "clip(4, 2)  ->  clip(2, 4)"] == "survived"  # no test calls it
    assert not any(line == 3 for line, _ in outcomes)
    assert "toy.py:4  if x < low:\n    x < low  ->  x <= low" in done.stdout
    assert (tmp_path / "toy.py").read_text() == TOY
