"""What other programs' timesteps are, and how what they cost is counted; the pictures need the weights."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import exactness
from benchmarks.exactness import AskedAt, Run, by_step, changes, mean_and_interval, redecorated, shares
from benchmarks.miniature.scenes import Scene, random_scene
from ella_kd.models import TSC, NoiseSchedule


@pytest.mark.parametrize(
    ("run", "mean", "largest"),
    [
        (Run("normal"), 0, 0),
        (Run("karras"), 60, 216),
        (Run("normal", 0.5), 128, 256),
        (Run("karras", 0.5), 110, 373),
    ],
)
def test_step_indexed_tokens_are_off_by_as_much_as_was_computed_from_comfyui(run: Run, mean: int, largest: int) -> None:
    """|t of the UNet - t of ComfyUI-ELLA's tokens| on 20 steps, computed from its code and ComfyUI's schedules."""
    schedule = NoiseSchedule.sd15()
    sigmas = run.sigmas(schedule)
    assert len(sigmas) == 21
    assert sigmas[-1] == 0
    t = schedule.sigma_to_t(sigmas[:-1])
    off = (by_step(t.tolist())(t) - t).abs()
    assert off.mean().item() == pytest.approx(mean, abs=0.6)
    assert off.max().item() == pytest.approx(largest, abs=1)  # ComfyUI rounds its timesteps


def test_the_connector_is_asked_at_the_changed_timestep_and_nowhere_else() -> None:
    torch.manual_seed(0)
    tsc = TSC(time_channel=32, time_embed_dim=16, width=16, layers=1, heads=2, num_latents=2, input_dim=8)
    for parameter in tsc.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    features, t = torch.randn(3, 5, 8), torch.tensor([999.0, 500.5, 0.0])
    told = {name: AskedAt(tsc, change)(features, t) for name, change in changes(t.tolist()).items()}

    def at(*values: float) -> Tensor:
        return tsc(features, torch.tensor(values))

    assert torch.equal(told["t"], at(999, 500.5, 0))
    assert torch.equal(told["t, rounded"], at(999, 500, 0))
    assert torch.equal(told["999 - t"], at(0, 498.5, 999))
    assert torch.equal(told["always 80"], at(80, 80, 80))
    assert not torch.allclose(told["t"], told["999 - t"])


def test_facts_are_counted_apart_and_redecorating_changes_late_ones_alone() -> None:
    rng = random.Random(0)
    wanted = [random_scene(rng, 3, unseen=True) for _ in range(20)]
    early, late = shares(wanted, wanted)
    assert (early == 100).all()
    assert (late == 100).all()
    early, late = shares(wanted, [redecorated(scene, rng) for scene in wanted])
    assert (early == 100).all()
    assert (late == 0).all()
    early, late = shares(wanted, [Scene("none", (), smudges=1)] * 20)
    assert early.max() == late.max() == 0


def test_an_interval_is_that_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(50, 10, 400)
    mean, half = mean_and_interval(values)
    assert mean == pytest.approx(50, abs=2)
    assert half == pytest.approx(1.96 * 10 / 20, rel=0.1)
    assert exactness.table({"karras": {"t": {"early": (99.0, 1.0), "late": (90.0, 2.0)}}}).count("|") == 21
