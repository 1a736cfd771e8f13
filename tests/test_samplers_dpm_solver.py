"""DPM-Solver-fast and the adaptive one: parity with the package, orders, a controller per sample, corners."""

import inspect
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ella_kd.samplers import (
    SAMPLERS,
    DPMFast,
    get_sigmas_exponential,
    sample,
    sample_dpm_adaptive,
    sample_dpm_fast,
    sample_euler,
)
from ella_kd.samplers.dpm_solver import orders, stages
from ella_kd.samplers.upstream import k_diffusion
from mixtures import Guided, Mixture, Pointwise, randn

pytestmark = pytest.mark.usefixtures("float64")

LOW, HIGH = 0.03, 14.6


def given_noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    seed = round(float(sigma) * 1e6) + round(float(sigma_next) * 1e3)
    return randn(1, 3, 5, 3, seed=seed).expand(2, -1, -1, -1)


def single_noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    return given_noise(sigma, sigma_next)[:1]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def latents(rows: int = 2) -> Tensor:
    return randn(rows, 3, 5, 3) * HIGH


@pytest.mark.parametrize("options", [{}, {"eta": 0.5}, {"eta": 1.0, "s_noise": 0.9}, {"eta": 1.5}], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8, 12])
def test_fast_equals_k_diffusion(n: int, options: dict[str, float], guided: Guided) -> None:
    args, ours, theirs = {"cond_scale": 3.0}, list[dict[str, Any]](), list[dict[str, Any]]()
    common: dict[str, Any] = {**options, "noise_sampler": given_noise}
    got = sample_dpm_fast(guided, latents(), LOW, HIGH, n, args, ours.append, True, **common)
    assert len(guided.seen) == n
    expected = k_diffusion().sampling.sample_dpm_fast(
        guided, latents(), LOW, HIGH, n, args, theirs.append, True, **common
    )
    assert relative(got, expected) <= 1e-10
    assert len(ours) == len(theirs) == len(orders(n))
    for a, b in zip(ours, theirs):
        assert relative(a["x"], b["x"]) <= 1e-10 and relative(a["denoised"], b["denoised"]) <= 1e-10
        assert float(a["sigma"]) == pytest.approx(float(b["sigma"]), rel=1e-12)


def test_fast_inverts_as_k_diffusion_does(mixture: Mixture) -> None:
    x = randn(1, 3, 5, 3)
    got = sample_dpm_fast(mixture, x, HIGH, LOW, 7, disable=True)
    assert relative(got, k_diffusion().sampling.sample_dpm_fast(mixture, x, HIGH, LOW, 7, disable=True)) <= 1e-10
    with pytest.raises(ValueError, match="ascending"):
        sample_dpm_fast(mixture, x, HIGH, LOW, 7, disable=True, eta=1.0)


def test_orders_spend_n_evaluations() -> None:
    assert [orders(n) for n in (1, 2, 3, 6, 7, 8)] == [[1], [2], [2, 1], [3, 2, 1], [3, 3, 1], [3, 3, 2]]
    assert all(sum(orders(n)) == n for n in range(1, 60))


@pytest.mark.parametrize(("order", "r1"), [(1, None), (2, None), (2, 1 / 3), (3, None)])
def test_order_of_the_stages_as_measured(order: int, r1: float | None, mixture: Mixture) -> None:
    """Steps of one order only, on an even grid in log sigma, against the exact flow."""
    quantiles = np.linspace(0.03, 0.97, 6)
    counts, errors = (160, 320, 640), []
    for n in counts:
        sigmas = [20.0, *get_sigmas_exponential(n, 0.05, 20.0)[1:-1].tolist(), 0.05]
        x = torch.tensor([mixture.quantile(u, 20.0) for u in quantiles]).view(1, 1, 2, 3)
        for s, t in pairwise(sigmas):
            at, slopes = x, []
            evals, rows = stages(s, t, order, r1)
            for sigma, row in zip(evals, rows):
                slopes.append((at - mixture(at, torch.tensor([sigma]))) / sigma)
                at = x + sum(w * d for w, d in zip(row, slopes))
            x = at
        end = torch.tensor([mixture.quantile(u, 0.05) for u in quantiles]).view(1, 1, 2, 3)
        errors.append(float((x - end).pow(2).mean().sqrt()))
    measured = float(-np.polyfit(np.log(counts), np.log(errors), 1)[0])
    assert measured == pytest.approx(order, abs=0.2)


def test_fast_split_equals_whole_and_batch_equals_singles_bitwise() -> None:
    model, x, solver = Pointwise(), latents(3), DPMFast(eta=0.7, n=8)
    sigmas = torch.tensor([HIGH, 1.8, 0.3, LOW])
    whole, _ = sample(solver, model, x, sigmas, disable=True, seeds=[1, 2, 3])
    half, state = sample(solver, model, x, sigmas, disable=True, seeds=[1, 2, 3], stop=2)
    assert torch.equal(sample(solver, model, half, disable=True, state=state)[0], whole)
    for k in range(3):
        single, _ = sample(solver, model, x[k : k + 1].clone(), sigmas, disable=True, seeds=[k + 1])
        assert torch.equal(single[0], whole[k])


def bounded(x: Tensor, sigma: Tensor) -> Tensor:
    """Of the four operations alone, so bitwise the same in any batch; never far from 0, so that no run diverges."""
    scaled = x / (1 + sigma.view(-1, 1, 1, 1))
    return scaled / (1 + scaled * scaled) + 0.3


ADAPTIVE: list[dict[str, float]] = [
    {},
    {"order": 2},
    {"rtol": 0.01, "atol": 0.001},
    {"pcoeff": 0.2, "icoeff": 0.6, "dcoeff": 0.1},
    {"eta": 1.0},
    {"order": 2, "eta": 0.5, "s_noise": 0.9},
    {"h_init": 4.0, "rtol": 0.001, "atol": 0.0001},  # whose first tries are refused
]


@pytest.mark.parametrize("options", ADAPTIVE, ids=str)
def test_adaptive_equals_k_diffusion_at_batch_1(options: dict[str, float], mixture: Mixture) -> None:
    common: dict[str, Any] = {**options, "disable": True, "return_info": True, "noise_sampler": single_noise}
    theirs: list[dict[str, Any]] = []
    ours: list[dict[str, Any]] = []
    got, info = sample_dpm_adaptive(mixture, latents(1), LOW, HIGH, callback=ours.append, **common)
    expected, their_info = k_diffusion().sampling.sample_dpm_adaptive(
        mixture, latents(1), LOW, HIGH, callback=theirs.append, **common
    )
    assert relative(got, expected) <= 1e-10
    assert {key: [value] for key, value in their_info.items()} == info
    assert info["n_reject"][0] > 0 or "h_init" not in options
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert float(a["error"]) == pytest.approx(float(b["error"]), rel=1e-8)
        assert float(a["h"]) == pytest.approx(b["h"], rel=1e-8)
        assert relative(a["denoised"], b["denoised"]) <= 1e-10
        assert a["nfe"] == b["nfe"]
    assert torch.equal(ours[0]["x"], latents(1)), "before the step"


@pytest.mark.parametrize("options", [{}, {"order": 2}, {"eta": 1.0}, {"h_init": 4.0, "rtol": 0.001}], ids=str)
def test_adaptive_batch_equals_singles_bitwise(options: dict[str, Any]) -> None:
    """Rows of different difficulty take different steps, and none depends on the others."""
    model, x = bounded, latents(3) * torch.tensor([1.0, 0.02, 3.0]).view(3, 1, 1, 1)
    common = {**options, "disable": True, "return_info": True}
    batch, info = sample_dpm_adaptive(model, x, LOW, HIGH, seeds=[5, 6, 7], **common)
    assert len(set(info["steps"])) > 1
    for k in range(3):
        single, alone = sample_dpm_adaptive(model, x[k : k + 1].clone(), LOW, HIGH, seeds=[5 + k], **common)
        assert torch.equal(single[0], batch[k])
        assert {key: value[k] for key, value in info.items()} == {key: value[0] for key, value in alone.items()}


def test_k_diffusion_s_sample_depends_on_its_batch_mates() -> None:
    """The defect that ours does not have."""
    model, x = bounded, latents(2) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    batch = k_diffusion().sampling.sample_dpm_adaptive(model, x, LOW, HIGH, disable=True)
    single = k_diffusion().sampling.sample_dpm_adaptive(model, x[:1], LOW, HIGH, disable=True)
    assert relative(batch[:1], single) > 1e-6


def test_adaptive_meets_the_exact_flow_as_tolerances_shrink(mixture: Mixture) -> None:
    quantiles = np.linspace(0.03, 0.97, 6)
    start, end = (torch.tensor([mixture.quantile(u, s) for u in quantiles]).view(6, 1, 1, 1) for s in (HIGH, LOW))
    errors = []
    for tolerance in (1e-2, 1e-3, 1e-4):
        x = sample_dpm_adaptive(mixture, start, LOW, HIGH, disable=True, rtol=tolerance, atol=tolerance)
        errors.append(float((x - end).abs().max()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < errors[0] / 20, errors  # .020, .0085, .00042


def test_adaptive_inverts(mixture: Mixture) -> None:
    x = randn(1, 3, 5, 3)
    got = sample_dpm_adaptive(mixture, x, HIGH, LOW, disable=True)
    expected = k_diffusion().sampling.sample_dpm_adaptive(mixture, x, HIGH, LOW, disable=True)
    assert relative(got, expected) <= 1e-10


def test_adaptive_moments_are_the_data_s() -> None:
    mean, variance, count = 0.7, 0.25, 12000
    gaussian = Mixture((mean,), (variance**0.5,), (1.0,))
    x = mean + (variance + 100.0) ** 0.5 * randn(4, 3, 25, 40, seed=3)
    options: dict[str, Any] = {"rtol": 0.002, "atol": 0.001, "eta": 1.0, "seeds": [1, 2, 3, 4]}
    out = sample_dpm_adaptive(gaussian, x, 0.02, 10.0, disable=True, **options)
    expected = variance + 0.02**2
    assert abs(float(out.mean()) - mean) < 3 * (expected / count) ** 0.5
    assert abs(float(out.var()) - expected) < 3 * expected * (2 / count) ** 0.5


def test_inputs_are_left_alone_and_seeds_reproduce() -> None:
    model, x = bounded, latents().float()
    before, state = x.clone(), torch.get_rng_state()
    first = sample_dpm_adaptive(model, x, LOW, HIGH, disable=True)
    assert first.dtype == torch.float32 and torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state), "no noise, no random number"
    first = sample_dpm_adaptive(model, x, LOW, HIGH, disable=True, eta=1.0, seeds=[1, 2])
    other = sample_dpm_adaptive(model, x, LOW, HIGH, disable=True, eta=1.0, seeds=[1, 3])
    assert torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    first = sample_dpm_adaptive(model, x, LOW, HIGH, disable=True, eta=1.0)
    torch.manual_seed(4)
    assert torch.equal(sample_dpm_adaptive(model, x, LOW, HIGH, disable=True, eta=1.0), first)


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
def test_signature_is_k_diffusion_s_and_seeds(name: str) -> None:
    function: Any = {"dpm_fast": sample_dpm_fast, "dpm_adaptive": sample_dpm_adaptive}[name]
    ours = list(inspect.signature(function).parameters.values())
    theirs = list(inspect.signature(getattr(k_diffusion().sampling, f"sample_{name}")).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[:-1]] == [(p.name, p.default, p.kind) for p in theirs]
    assert (ours[-1].name, ours[-1].kind) == ("seeds", inspect.Parameter.KEYWORD_ONLY)
    assert name not in SAMPLERS, "the table holds those that take sigmas"


def failing(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.where(sigma.view(-1, 1, 1, 1) < 1.0, math.nan, x * 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: sample_dpm_adaptive(failing, x, LOW, HIGH, disable=True), ValueError, r"NaN or Inf .* \(sigma"),
        (lambda x: sample_dpm_fast(failing, x, LOW, HIGH, 9, disable=True), ValueError, "NaN or Inf values at step"),
        (lambda x: sample_dpm_adaptive(Pointwise(), x, 0.0, HIGH), ValueError, "must be above 0"),
        (lambda x: sample_dpm_adaptive(Pointwise(), x, -0.5, HIGH), ValueError, "must be above 0"),
        (lambda x: sample_dpm_adaptive(Pointwise(), x, HIGH, HIGH), ValueError, "finite and not equal"),
        (lambda x: sample_dpm_adaptive(Pointwise(), x, LOW, math.inf), ValueError, "finite"),
        (lambda x: sample_dpm_adaptive(Pointwise(), x, LOW, HIGH, order=4), ValueError, "order must be 2 or 3, got 4"),
        (lambda x: sample_dpm_adaptive(Pointwise(), x, LOW, HIGH, rtol=0, atol=0), ValueError, "rtol or atol"),
        (lambda x: sample_dpm_adaptive(Pointwise(), x, LOW, HIGH, h_init=0), ValueError, "h_init"),
        (lambda x: sample_dpm_adaptive(Pointwise(), x, LOW, HIGH, eta=-1), ValueError, "eta must be"),
        (lambda x: sample_dpm_adaptive(Pointwise(), x, HIGH, LOW, eta=1), ValueError, "ascending"),
        (lambda x: sample_dpm_adaptive(Pointwise(), x, LOW, HIGH, eta=1, seeds=[1]), ValueError, "expected 2, got 1"),
        (lambda x: sample_dpm_adaptive(lambda x, sigma: x[:1], x, LOW, HIGH), ValueError, "denoised like x"),
        (lambda x: sample_dpm_adaptive(Pointwise(), x[0], LOW, HIGH), ValueError, r"\[B, C, h, w\]"),
        (lambda x: sample_dpm_fast(Pointwise(), x, LOW, HIGH, 0), ValueError, "at least 1, got 0"),
        (lambda x: sample_dpm_fast(Pointwise(), x, 0.0, HIGH, 5), ValueError, "must be above 0"),
        (lambda x: sample_dpm_fast(Pointwise(), x, LOW, 0.0, 5), ValueError, "must be above 0"),
        (lambda x: sample(DPMFast(n=8), bounded, x, torch.tensor([2.0, 1.0])), ValueError, "8 evaluations are 3"),
        (lambda x: sample_euler(Pointwise(), x, torch.tensor([1.0])), ValueError, "at least 2"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(latents())


def test_the_adaptive_samplers_noise_is_like_x() -> None:
    x = torch.ones(2, 1, 2, 2, dtype=torch.float32)

    def run(drawn: torch.Tensor) -> torch.Tensor:
        out = sample_dpm_adaptive(
            lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1)), x, 0.5, 3.0, disable=True, eta=1.0,
            noise_sampler=lambda s, t: drawn,
        )
        assert isinstance(out, torch.Tensor)
        return out

    assert run(torch.ones(2, 1, 2, 2, dtype=torch.float64)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"noise like x \[2, 1, 2, 2\], got \[2, 1, 1, 1\]"):
        run(torch.ones(2, 1, 1, 1))
