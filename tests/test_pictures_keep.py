"""What is kept stays, exactly, for every method; what is repainted agrees with it as far as it can."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd.denoiser import ELLADenoiser
from ella_kd.guidance import CFGDenoiser
from ella_kd.pictures.inversion import undone
from ella_kd.pictures.keep import Keep, KeepRun, Repaint, Unlock
from ella_kd.pictures.segments import sample_in_segments
from ella_kd.refining import HandOver
from ella_kd.samplers import (
    SAMPLERS,
    DPMpp2M,
    Prediction,
    Run,
    Sampler,
    get_sigmas_karras,
    load_run,
    sample,
    without_history,
)
from ella_kd.samplers import randn as seeded
from ella_kd.samplers.registry import RANGE_SAMPLERS
from mixtures import COND, Guided, Pointwise, randn
from tiny import PointwiseUNet, features, tiny_tsc

ROWS = {**SAMPLERS, **RANGE_SAMPLERS}
each_row = pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
each_method = pytest.mark.parametrize("row", SAMPLERS.values(), ids=list(SAMPLERS))
SIGMAS = get_sigmas_karras(5, 0.05, 14.6).double()
ARGS = {"cond_scale": 0.7}
SEEDS, SHAPE = [7, 8, 9, 10], (4, 3, 4, 6)
PICTURE = randn(*SHAPE, seed=5, dtype=torch.float64)
NOISE = seeded(SHAPE, SEEDS, torch.float64)
START = PICTURE + SIGMAS[0] * NOISE
HALF = torch.zeros(4, 6).double()
HALF[:, 3:] = 1
LEVELS = torch.tensor([0.0, 0.3, 1.0, 4.0, 20.0, float("inf")]).double().expand(4, 6)  # a column each
ALWAYS = torch.full((4, 6), float("inf")).double()
MASKS = torch.stack([ALWAYS, torch.zeros(4, 6).double(), HALF * 1e9, LEVELS])[:, None]


def drawn(row: Sampler, model: Any, x: Tensor, sigmas: Tensor = SIGMAS, **options: Any) -> Tensor:
    return row.function(model, x, sigmas, extra_args=ARGS, disable=True, **{"seeds": SEEDS, **options})


@each_row
def test_what_is_kept_is_the_picture(row: Sampler) -> None:
    """At the end and, but for added noise, all the way, x there is picture + sigma * noise; the rest is finite. A mask
    of ones is the plain run, bit for bit, one of zeros the picture; a row depends on its own seed and mask alone."""
    seen = list[tuple[Tensor, Tensor]]()
    model = Keep(Pointwise(), PICTURE, Unlock(MASKS))
    x = drawn(row, model, START, callback=lambda record: seen.append((record["x"], record["sigma_hat"])))
    kept = (MASKS == 0).expand(SHAPE)
    end = SIGMAS[-2] * NOISE if row.name in RANGE_SAMPLERS else 0.0  # these end at the last sigma above 0
    assert bool(x.isfinite().all())
    assert float((x - PICTURE - end)[kept].abs().max()) < 1e-12
    for at, sigma in () if row.stochastic else seen:
        sigma = sigma.reshape(-1, 1, 1, 1)
        assert float(((at - PICTURE) / sigma - NOISE)[kept].abs().max()) < 1e-12
    assert torch.equal(drawn(row, Pointwise(), START[:1], seeds=SEEDS[:1]), x[:1])
    alone = Keep(Pointwise(), PICTURE[2:3], Repaint(HALF))
    assert torch.equal(drawn(row, alone, START[2:3], seeds=SEEDS[2:3]), x[2:3])


@pytest.mark.parametrize("name", ["euler_cfg_pp", "lms_cfg_pp", "dpmpp_2m_cfg_pp"])
def test_to_replace_denoised_alone_is_not_enough_for_cfg_pp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = KeepRun.__call__

    def denoised_alone(self: KeepRun, *args: Any) -> Prediction:
        return replace(whole(self, *args), uncond=self.inner(*args).uncond)

    monkeypatch.setattr(KeepRun, "__call__", denoised_alone)
    x = drawn(SAMPLERS[name], Keep(Guided(), PICTURE, Repaint(HALF)), START, SIGMAS[:-1])
    assert float((x - PICTURE - SIGMAS[-2] * NOISE)[..., :3].abs().max()) > 0.01


def test_planned_is_unplanned_and_rows_may_stand_at_levels_of_their_own() -> None:
    """The tokens of each level's own timestep reach the network through Keep, known beforehand or not."""
    inner = CFGDenoiser(ELLADenoiser(PointwiseUNet(), tiny_tsc()))
    x, picture = randn(2, 4, 4, 6).double(), randn(1, 4, 4, 6, seed=1).double()
    args = {"cond": features(3), "uncond": features(2, seed=4), "cond_scale": 3.0}
    model = Keep(inner, picture, Unlock(LEVELS.float()))
    levels = (2.0, 0.5)
    plan = model.bind(x, levels, need_uncond=True, **args)
    both = model.predict(x, torch.tensor(levels), need_uncond=True, **args)
    plain = inner.predict(x, torch.tensor(levels), need_uncond=True, **args)
    for i, level in enumerate(levels):
        for name in ("denoised", "cond", "uncond"):
            here = getattr(both, name)[i]
            assert torch.allclose(getattr(plan(x, level), name)[i], here, rtol=1e-5)
            open_ = LEVELS[0] >= level
            assert torch.equal(here[..., open_], getattr(plain, name)[i][..., open_])
            assert torch.equal(here[..., ~open_], picture[0][..., ~open_])
    assert model.sigma_max == inner.sigma_max and torch.equal(model.sigmas, inner.sigmas)
    assert torch.equal(model.sigma_to_t(torch.tensor([3.0])), inner.sigma_to_t(torch.tensor([3.0])))


@each_method
def test_segments(row: Sampler) -> None:
    """Without repeats they are the sampler, bit for bit. Where one level is everywhere the one to repaint from, and the
    method begins anew there, it is image to image from there: up to it x is picture + sigma * noise."""
    x = SIGMAS[0] * NOISE[:2]
    got = sample_in_segments(row.name, Pointwise(), x, SIGMAS, ARGS, disable=True, seeds=SEEDS[:2], jump=3)
    assert torch.equal(got, drawn(row, Pointwise(), x, seeds=SEEDS[:2]))
    looks_ahead = float(SIGMAS[2]) in row.solver.steps(SIGMAS.tolist())[1].evals  # and sees the change a step earlier
    if row.stochastic or looks_ahead:
        return
    mask = Unlock(torch.full((4, 6), float(SIGMAS[2])))
    assert mask.changes(SIGMAS.tolist()) == [2]
    model = Keep(Guided(), PICTURE[:2], mask)
    got = sample_in_segments(row.name, model, START[:2], SIGMAS, ARGS, disable=True, seeds=SEEDS[:2], fresh=[2])
    run = Run(row.solver, row.walked(Guided()), PICTURE[:2] + SIGMAS[2] * NOISE[:2], extra_args=ARGS,
              state={"sigmas": SIGMAS, "step": torch.tensor(2)})
    run.advance(len(run))
    assert float((got - run.x).abs().max()) < 1e-9


@pytest.mark.parametrize(("kept", "sampler", "wanted"), [
    ("half", "euler_ancestral", (0.59, 0.31, 0.22, 0.21)), ("half", "dpmpp_2m", (0.68, 0.40, 0.29, 0.28)),
    ("frame", "euler_ancestral", (0.40, 0.16, 0.10, 0.10)), ("frame", "dpmpp_2m", (0.52, 0.22, 0.14, 0.14))])
def test_resampling_agrees_better_with_what_is_kept(kept: str, sampler: str, wanted: tuple[float, ...],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gaussian field and its exact denoiser: everything is linear, so a run without noise of each unit picture gives
    the mean of what is repainted, exactly. Its distance to the true conditional mean, 1 if the kept part were ignored:
    plain, with 5 repeats, with 10, and with 5 of which all are spent within sigma .2 to 2."""
    at = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).double()
    covariance = (-torch.cdist(at, at) / 3).exp()
    known = at[:, 1] < 4 if kept == "half" else ((at < 2) | (at > 5)).any(1)  # around a hole of 4 x 4

    variances, axes = torch.linalg.eigh(covariance)

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        return (x.flatten(2) @ axes * (variances / (variances + sigma[0] ** 2)) @ axes.T).view(x.shape)

    root = torch.linalg.cholesky(covariance[known][:, known])
    mean = covariance[~known][:, known] @ torch.cholesky_inverse(root)
    pictures = torch.eye(64, dtype=torch.float64)[known].view(1, -1, 8, 8)
    model = Keep(denoised, pictures, Repaint((~known).double().view(8, 8)))
    sigmas = get_sigmas_karras(20, 0.03, 14.6).double()
    monkeypatch.setattr("ella_kd.pictures.segments.randn", lambda shape, seeds: torch.zeros(shape))
    options: dict[str, Any] = {"s_noise": 0.0} if sampler == "euler_ancestral" else {}

    def bias(**how: Any) -> float:
        got = sample_in_segments(sampler, model, pictures, sigmas, disable=True, seeds=[1], **how, **options)
        return float(((got[0].flatten(1)[:, ~known].T - mean) @ root).norm() / (mean @ root).norm())

    found = bias(), bias(repeats=5), bias(repeats=10), bias(repeats=5, within=(0.2, 2))
    assert found == pytest.approx(wanted, abs=0.006)
    assert bias(repeats=5, jump=2) == pytest.approx(found[1], abs=0.02)


@pytest.mark.parametrize(("name", "refine", "near"), [
    ("euler", 0, 0.2), ("euler", 100, 1e-6), ("euler_cfg_pp", 0, 0.4), ("euler_cfg_pp", 100, 1e-6)])
def test_inversion_is_undone_by_the_same_steps(name: str, refine: int, near: float) -> None:
    """As published it comes near, and the fixed point is the very start: each step up is one down, undone."""
    sigmas, row = get_sigmas_karras(40, 0.05, 14.6).double()[:-1], SAMPLERS[name]
    model = Guided(uncond=replace(COND, means=(-1.4, 0.5, 2.1)))
    up = undone(model, PICTURE, sigmas.flip(0), ARGS, row.cfg_pp, refine, disable=True)  # type: ignore[arg-type]
    assert 10 < float(up.std()) < 20
    away = float((drawn(row, model, up, sigmas) - PICTURE).norm() / PICTURE.norm())
    assert away < near
    assert refine or away > 0.003


def test_hand_over() -> None:
    """The second model takes the rest of the steps, with conditions of its own; the same model twice is one run."""
    x, at = SIGMAS[0] * NOISE, float(SIGMAS[2])
    for name in ("euler_ancestral", "heun_cfg_pp", "dpm_adaptive"):
        twice = HandOver(Guided(), Guided(), at, ARGS)
        assert torch.equal(drawn(ROWS[name], twice, x), drawn(ROWS[name], Guided(), x))
    first, second = Guided(), Guided(COND, COND)
    both = HandOver(first, second, at, {"cond_scale": 0.3})
    assert both.changes(SIGMAS.tolist()) == [2] and HandOver(first, second, 99.0, {}).changes(SIGMAS.tolist()) == []
    sample_in_segments("dpmpp_2m_cfg_pp", both, x, SIGMAS, ARGS, disable=True, seeds=SEEDS, fresh=[2])
    assert [*first.seen, *second.seen] == SIGMAS[:-1].tolist() and len(first.seen) == 2
    mixed = both(x[:2], SIGMAS[[1, 2]], **ARGS)
    assert torch.equal(mixed[0], first(x[:1], SIGMAS[[1]], 0.7)[0])
    assert torch.equal(mixed[1], second(x[1:2], SIGMAS[[2]], 0.3)[0])


def test_a_run_is_resumed_with_what_it_was_made_with(tmp_path: Path) -> None:
    """Bit for bit with the same conditions, picture and mask; others are refused by name, and taken on purpose."""
    inner = CFGDenoiser(ELLADenoiser(PointwiseUNet(), tiny_tsc()))
    x, picture = seeded((2, 4, 4, 6), [7, 8]).double() * SIGMAS[0], randn(1, 4, 4, 6, seed=1).double()
    args = {"cond": features(3), "uncond": features(2, seed=4), "cond_scale": 3.0}
    kept = Keep(inner, picture, Repaint(HALF))
    whole, _ = sample(DPMpp2M(), kept, x, SIGMAS, args, disable=True)
    run = Run(DPMpp2M(), kept, x, SIGMAS, args, stop=2)
    run.advance(2)
    run.save(tmp_path / "run.safetensors")
    half, state = load_run(tmp_path / "run.safetensors")
    again = Keep(inner, picture.expand(2, -1, -1, -1).clone(), Repaint(HALF.clone()))
    rest, end = sample(DPMpp2M(), again, half, None, {**args, "cond": features(3)}, disable=True, state=state)
    assert torch.equal(rest, whole) and torch.equal(end["given"], state["given"])
    for model, other, what in (
        (Keep(inner, picture, Repaint(1 - HALF)), args, "mask"), (Keep(inner, picture, Unlock(HALF)), args, "mask"),
        (Keep(inner, picture + 1e-6, Repaint(HALF)), args, "picture"), (inner, args, "picture and another mask"),
        (kept, {**args, "cond": features(3, seed=9)}, "cond"), (kept, {**args, "uncond": features(3)}, "uncond"),
    ):
        with pytest.raises(ValueError, match=f"another {what}: resume with the same"):
            sample(DPMpp2M(), model, half, None, other, disable=True, state=state)
        sample(DPMpp2M(), model, half, None, other, disable=True, state=without_history(state))


def test_refusals() -> None:
    picture = PICTURE[:1]
    for values, what in ((torch.full((4, 6), 2.0), "from 0 to 1"), (torch.ones(3), r"\[h, w\]")):
        with pytest.raises(ValueError, match=what):
            Repaint(values)
    with pytest.raises(ValueError, match="from 0 to inf"):
        Unlock(torch.full((4, 6), float("nan")))
    with pytest.raises(ValueError, match="to_cells"):
        Keep(Guided(), picture, Repaint(torch.ones(8, 8)))
    with pytest.raises(ValueError, match="one per sample"):
        Keep(Guided(), PICTURE[:3], Repaint(HALF)).bind(START, None)
    with pytest.raises(ValueError, match="channels"):
        Keep(Guided(), picture[:, :2], Repaint(HALF)).bind(START, None)
    with pytest.raises(ValueError, match="own steps"):
        sample_in_segments("dpm_adaptive", Guided(), START, SIGMAS, repeats=2)
    with pytest.raises(ValueError, match="nothing to repeat"):
        sample_in_segments("euler", Guided(), START, SIGMAS, repeats=2, within=(50, 90))
