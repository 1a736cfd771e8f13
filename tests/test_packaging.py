"""The built wheel, because the clone hides what an installation lacks."""

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MINIATURE = ["sd.safetensors", "tsc.safetensors", "clip/tokenizer.json", "t5/config.json", "t5/model.safetensors"]


def miniature() -> set[str]:
    folder = ROOT / "models" / "miniature"
    return {*MINIATURE, *(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is in the clone, with small stand-ins for the miniature's files."""
    source = tmp_path_factory.mktemp("source") / "clone"
    leave = shutil.ignore_patterns(".venv", ".git", "build", "dist", "*.egg-info", ".*_cache", "__pycache__", "runs",
                                   "out", "*.safetensors")
    shutil.copytree(ROOT, source, symlinks=True, ignore=leave)
    for name in miniature():
        path = source / "models" / "miniature" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    target = source.parent
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    target, source], check=True)
    [built] = target.glob("*.whl")
    return built


def test_the_wheel_holds_the_packages_and_the_miniature_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    sources = {"ella_kd": ROOT / "ella_kd", "ella_kd/models": ROOT / "models", "ella_kd/samplers": ROOT / "samplers"}
    modules = {f"{package}/{file.name}" for package, folder in sources.items() for file in folder.glob("*.py")}
    modules |= {f"ella_kd/{file.relative_to(ROOT / 'ella_kd')}" for file in (ROOT / "ella_kd").rglob("*.py")}
    modules |= {f"ella_kd/{file.relative_to(ROOT)}" for file in (ROOT / "models").rglob("*.py")}
    weights = {f"ella_kd/models/miniature/{name}" for name in miniature()}
    assert modules | weights | {"ella_kd/py.typed", "ella_kd/app/grid.html"} == set(names)
    assert {name.partition("/")[0] for name in names} == {"ella_kd"}, "samplers and models must not be top-level names"


def test_the_wheel_works_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = ("import ella_kd, ella_kd.cli, ella_kd.models, ella_kd.samplers\n"
              "from importlib.resources import files\n"
              "print(ella_kd.__file__, ella_kd.models.__file__, ella_kd.samplers.__file__, "
              "files('ella_kd.models') / 'miniature')")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": "site"},
                          text=True, capture_output=True, check=True)
    site = tmp_path / "site"
    assert [Path(word).resolve() for word in done.stdout.split()] == [
        site / "ella_kd/__init__.py", site / "ella_kd/models/__init__.py", site / "ella_kd/samplers/__init__.py",
        site / "ella_kd/models/miniature"]


def test_a_clone_works_beside_an_installed_package(wheel: Path, tmp_path: Path) -> None:
    """As after a plain `pip install .`: the clone's own ella_kd/ comes first, and its parts stand beside it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    clone = wheel.parent / "clone"
    script = ("import sys, ella_kd, ella_kd.cli, ella_kd.models, ella_kd.samplers\n"
              "print(ella_kd.__file__, ella_kd.models.__file__, ella_kd.samplers.__file__)\n"
              "assert not {'models', 'samplers'} & set(sys.modules)")
    paths = [str(tmp_path / "site"), *(path for path in sys.path if path.endswith("site-packages"))]
    done = subprocess.run([sys.executable, "-S", "-c", script], cwd=clone, text=True, capture_output=True, check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})  # -S: no finder of this clone's own
    assert done.returncode == 0, done.stderr
    assert [Path(word).resolve() for word in done.stdout.split()] == [
        clone / "ella_kd/__init__.py", clone / "models/__init__.py", clone / "samplers/__init__.py"]


def test_ci_versions_are_pinned_and_name_no_index() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if line.count("==") == 1}
    assert len(pinned) == len(lines), "every line is name==version"
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    names = {line.split()[0].lower() for block in wanted for line in block.split("\n") if line.strip()}
    assert names <= pinned
