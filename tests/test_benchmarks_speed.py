"""The speed harness at a small size: every way draws the same picture, and the table is what the file says."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import steps_per_second
from benchmarks.results import HERE
from benchmarks.speed import clock
from benchmarks.speed.clock import Way, interleave
from benchmarks.speed.ways import WAYS


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("speed") / "not" / "there"
    options = ["--batch", "2", "--steps", "2", "--rounds", "1", "--mode", "eager", "--mode", "fast"]
    run = CliRunner().invoke(steps_per_second.main, [*options, "--skip", "constant, fast", "--out", str(out)])
    assert run.exit_code == 0, run.output
    (found,) = json.loads((out / "steps_per_second.json").read_text())
    assert steps_per_second.table([found]) in (out / "speed.md").read_text()
    assert (out / "steps_per_second.png").stat().st_size > 1000
    return found


def of(result: dict[str, Any], way: str, mode: str = "eager") -> dict[str, Any]:
    (found,) = [row for row in result["ways"] if (row["way"], row["mode"]) == (way, mode)]
    return found


def test_every_way_was_timed_and_draws_the_same(result: dict[str, Any]) -> None:
    ours = ("ELLA", "ELLA flexible", "k-diffusion")
    assert [(row["way"], row["mode"]) for row in result["ways"]] == [*((way, "eager") for way in WAYS),
                                                                     *((way, "fast") for way in ours)]
    assert all(row["steps_per_second"] > 0 and len(row["seconds"]) == 1 for row in result["ways"])
    # two UNets, two solvers, t rounded to an integer in one: 2e-5 here; another prompt is 1 away
    for way, mode in (("ELLA", "eager"), ("ELLA", "fast"), ("k-diffusion", "eager"), ("constant", "eager")):
        assert 0 <= of(result, way, mode)["error"] < 1e-3, (way, mode)
    assert of(result, "published")["ratio"] == 1 and result["machine"] and result["matrix_peak_gflops"][0] > 0


def test_the_flops_say_what_the_connector_costs(result: dict[str, Any]) -> None:
    flops = {way: of(result, way)["gflop_per_step"] for way in WAYS}
    assert flops["constant"] == pytest.approx(flops["diffusers"], rel=1e-6)
    # two pictures of one prompt: ours runs the connector on uncond and cond, the published way on four rows
    ours, published = flops["ELLA"] - flops["constant"], flops["published"] - flops["diffusers"]
    assert published == pytest.approx(2 * ours, rel=1e-6) and ours > 0
    assert flops["k-diffusion"] == pytest.approx(flops["ELLA"], rel=1e-6)  # step by step, and each prompt once as well
    assert of(result, "ELLA")["share_of_peak"] > 0


def test_rounds_take_turns_and_only_eager_ways_count_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "matrix_peak", lambda device, dtype: 1e9)
    order: list[str] = []
    a = torch.randn(8, 8)

    def way(name: str, mode: str) -> Way:
        def run() -> torch.Tensor:
            order.append(name)
            return a @ a

        return Way(name, mode, run)

    found, peaks = interleave([way("a", "eager"), way("b", "compiled")], 2, torch.device("cpu"), torch.float32,
                              lambda line: None)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [measured.flops for measured in found] == [2 * 8**3, 0]
    assert len(peaks) == len(found[0].seconds) == 2


def test_it_runs_as_a_file_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path or ".").resolve() != HERE.parent])
    runpy.run_path(str(HERE / "steps_per_second.py"))
    assert sys.path[0] == str(HERE.parent)


@pytest.mark.parametrize(("options", "said"), [
    (["--steps", "1"], "at least 2 steps"), (["--device", "cuda:99"], "no 'cuda:99' on this machine"),
    (["--device", "gpu"], "no 'gpu' on this machine"), (["--publish", "--out", "x"], "leave --out away")])
def test_what_cannot_be_is_refused_in_a_line(options: list[str], said: str) -> None:
    refused = CliRunner().invoke(steps_per_second.main, options)
    assert refused.exit_code == 2 and said in refused.output and isinstance(refused.exception, SystemExit)


def test_rounds_are_compared_with_the_reference_in_the_same_round() -> None:
    ways = [{"way": "ELLA", "mode": "eager", "seconds": [1.0, 2.0, 2.0]},
            {"way": "published", "mode": "eager", "seconds": [2.0, 8.0, 3.0]}]
    assert steps_per_second.ratios({"ways": ways}) == [("ELLA, eager", 1.5, 2.0, 4.0), ("published, eager", 1, 1, 1)]
    assert steps_per_second.ratios({"ways": ways[:1]}) == []


def test_the_tables_on_file_are_what_was_measured() -> None:
    results = json.loads((HERE / "steps_per_second.json").read_text())
    assert f"<!-- speed -->\n{steps_per_second.table(results)}\n<!-- /speed -->" in (HERE / "README.md").read_text()
    assert (HERE / "steps_per_second.png").stat().st_size < 300_000
