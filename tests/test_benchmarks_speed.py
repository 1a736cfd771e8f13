"""The speed harness at a small size: every way draws the same picture, and the table is what the file says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import steps_per_second
from benchmarks.speed.clock import Way, interleave
from benchmarks.speed.ways import WAYS

HERE = Path(steps_per_second.__file__).parent


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("speed")
    (out / "README.md").write_text("<!-- speed -->\n<!-- /speed -->\n")
    options = ["--batch", "2", "--steps", "2", "--rounds", "1", "--mode", "eager", "--mode", "fast"]
    run = CliRunner().invoke(steps_per_second.main, [*options, "--skip", "constant, fast", "--out", str(out)])
    assert run.exit_code == 0, run.output
    (found,) = json.loads((out / "steps_per_second.json").read_text())
    assert steps_per_second.table([found]) in (out / "README.md").read_text()
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
    assert flops["k-diffusion"] == pytest.approx(flops["published"], rel=1e-6)
    assert of(result, "ELLA")["share_of_peak"] > 0


def test_rounds_take_turns_and_only_eager_ways_count_flops() -> None:
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


def test_it_runs_as_a_file_and_refuses_one_step() -> None:
    path = HERE / "steps_per_second.py"
    shown = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True, cwd="/").stdout
    assert "--network [miniature|sd15]" in shown
    refused = CliRunner().invoke(steps_per_second.main, ["--steps", "1"])
    assert refused.exit_code == 2 and "at least 2 steps" in refused.output


def test_the_tables_on_file_are_what_was_measured() -> None:
    results = json.loads((HERE / "steps_per_second.json").read_text())
    assert f"<!-- speed -->\n{steps_per_second.table(results)}\n<!-- /speed -->" in (HERE / "README.md").read_text()
    assert (HERE / "steps_per_second.png").stat().st_size < 300_000
