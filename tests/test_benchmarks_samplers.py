"""The measured tables and the plot are what their command writes, and what it measures is what is meant."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import plots, samplers
from benchmarks.results import HERE, between_marks
from ella_kd.samplers import LMS, SAMPLERS, Euler, Heun

RESULT = json.loads((HERE / "samplers.json").read_text())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("solver", "expected"), [(Euler(), 1.0), (Heun(), 2.0)])
def test_orders_are_measured(solver: Euler | Heun, expected: float) -> None:
    found = samplers.errors(solver, samplers.COUNTS)
    assert [evaluations for evaluations, _ in found] == [solver.evals * n for n in samplers.COUNTS]
    assert samplers.order(found) == pytest.approx(expected, abs=0.05)
    assert samplers.order([(0, 1.0 / n**3) for n in samplers.COUNTS]) == pytest.approx(3.0)
    assert samplers.order([(0, 1e-3), (0, 1e-5), (0, 1e-15), (0, 1e-15), (0, 1e-15)]) == pytest.approx(6.64, abs=0.01)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["dpmpp_2m", "lms", "uni_pc"])
def test_the_errors_on_file_are_those_of_the_code(name: str) -> None:
    again = samplers.errors(samplers.methods()[name], samplers.FEW)
    for (evaluations, error), (filed, on_file) in zip(again, RESULT["orders"][name]["errors"], strict=True):
        assert evaluations == filed
        assert error == pytest.approx(on_file, rel=1e-6)


def test_what_is_on_file_are_methods_without_noise() -> None:
    """A method that is newer than the file has no order in the README until python -m benchmarks.samplers runs."""
    assert [name for name in samplers.methods() if name in RESULT["orders"]] == list(RESULT["orders"])
    assert samplers.deterministic(LMS()) == LMS()
    assert samplers.deterministic(SAMPLERS["lcm"].solver) is None or "lcm" in RESULT["orders"]
    assert ["euler", "euler_ancestral", "ddim", "ddpm"] in samplers.same(RESULT["orders"])


def test_the_tables_and_the_plot_are_the_files() -> None:
    text = (HERE / "README.md").read_text()
    assert between_marks(text, "orders", samplers.orders_table(RESULT["orders"])) == text
    assert between_marks(text, "overhead", samplers.overhead_table(RESULT["overhead"])) == text
    assert (HERE / "orders.png").stat().st_size < 300_000


def test_the_driver_took_no_longer_than_k_diffusion_s() -> None:
    for name, row in RESULT["overhead"].items():
        assert row["ours"] <= row["theirs"], name


def test_overhead_is_measured_on_both_sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("euler", "euler_cfg_pp", "dpmpp_2m_sde")
    monkeypatch.setattr(samplers, "SAMPLERS", {name: SAMPLERS[name] for name in names})
    found = samplers.measure_overhead(1, steps=2)
    assert list(found) == ["euler", "dpmpp_2m_sde"]
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in found.values())
    assert torch.get_default_dtype() == torch.float32
    plots.orders({"euler": RESULT["orders"]["euler"]}, [["euler"]], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
