"""Benchmarks write where they are told, to committed tables on request only; and what is on file is what they wrote."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import studio
from benchmarks import plots, readme, results, samplers, score

FEW = ["--count", "2", "--sampler-count", "2", "--most", "2"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The score at one step, in a folder with a copy of the published pages; benchmarks/ of that copy."""
    monkeypatch.setattr(score, "STEPS", 1)
    monkeypatch.setattr(score, "SCORED", ("euler",))
    miniature = studio.miniature()
    monkeypatch.setattr(score.Pipeline, "miniature", lambda: miniature)
    here = tmp_path / "clone" / "benchmarks"
    here.mkdir(parents=True)
    for name in ("README.md", "samplers.json", "wordings.json"):
        (here / name).write_bytes((results.HERE / name).read_bytes())
    (here.parent / "README.md").write_bytes(readme.README.read_bytes())
    for module in (results, readme):
        monkeypatch.setattr(module, "HERE", here)
    monkeypatch.setattr(readme, "README", here.parent / "README.md")
    monkeypatch.chdir(tmp_path)
    return here


def texts(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*options: str) -> str:
    done = CliRunner().invoke(score.main, [*FEW, *options])
    assert done.exit_code == 0, done.output
    return done.output


def test_results_go_to_a_folder_and_are_published_on_request_only(quick: Path, tmp_path: Path) -> None:
    before = texts(quick.parent)
    run("--out", "new/folder")
    run("--part", "systems")  # by default in out/score
    assert texts(quick.parent) == before
    assert {path.name for path in (tmp_path / "new/folder").iterdir()} == {"score.json", "score.md", "samplers.png"}
    assert {path.name for path in (tmp_path / "out/score").iterdir()} == {"score.json", "score.md"}

    run("--publish")
    page, front = (quick / "README.md").read_text(), (quick.parent / "README.md").read_text()
    found = json.loads((quick / "score.json").read_text())
    for name in score.PARTS:
        assert score.TABLES[name](found[name]) in page
        assert found["measured"][name]["command"] in page
    assert readme.measured_table(found["systems"]) in front
    assert found["settings"]["steps"] == 1

    systems = found["systems"]
    run("--publish", "--part", "samplers")  # what is not measured stays
    found = json.loads((quick / "score.json").read_text())
    assert found["systems"] == systems


def test_what_is_on_file_is_what_the_pages_and_pictures_show(tmp_path: Path) -> None:
    found = json.loads((results.HERE / "score.json").read_text())
    page, front = (results.HERE / "README.md").read_text(), readme.README.read_text()
    for part in score.PARTS:
        assert results.between_marks(page, part, score.TABLES[part](found[part])) == page
        assert f"`{found['measured'][part]['command']}` on" in page
    for name, table in readme.tables().items():
        assert results.between_marks(front, name, table) == front, "run python -m benchmarks.readme --publish"
    assert all((results.HERE / f"{name}.png").stat().st_size < 300_000 for name in ("samplers", "demo"))
    plots.scores(found["samplers"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize(("main", "options"), [(samplers.main, ["--rounds", "1"]), (readme.main, [])])
def test_the_other_commands_write_to_a_folder_too(main: click.Command, options: list[str], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "measure_orders", lambda: {})
    monkeypatch.setattr(samplers, "measure_overhead", lambda rounds: {})
    monkeypatch.setattr(plots, "orders", lambda *args: None)
    done = CliRunner().invoke(main, [*options, "--out", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "new").glob("*.md"))) == 1


def test_a_folder_that_cannot_be_made_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(score.main, ["--out", str(tmp_path / "file" / "below")])
    assert done.exit_code == 2 and "cannot make" in done.output
