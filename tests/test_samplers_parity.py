"""Whole trajectories equal those of the real k-diffusion package, in float64."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd.samplers import DPM2, SAMPLERS, Euler, Heun, sample
from ella_kd.samplers.upstream import k_diffusion
from mixtures import Guided, randn

pytestmark = pytest.mark.usefixtures("float64")

SCHEDULES = {
    "to zero": [14.6, 9.1, 4.2, 2.2, 1.1, 0.5, 0.2, 0.03, 0.0],
    "img2img, ends above zero": [3.1, 2.0, 1.2, 0.7, 0.31],
    "one step to zero": [14.6, 0.0],
    "one step": [14.6, 1.0],
}
ASCENDING = {"ascending": [0.03, 0.2, 1.1, 4.2, 14.6]}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("euler", {}),
    ("heun", {}),
    ("dpm_2", {}),
    ("dpmpp_2m", {}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.4, "s_noise": 0.9}),
    ("euler_ancestral", {"eta": 0.0}),
    ("euler_ancestral", {"eta": 1.5}),  # sigma_up would exceed sigma_next: down to 0
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_2s_ancestral", {"eta": 0.4, "s_noise": 1.1}),
    ("dpmpp_2s_ancestral", {"eta": 0.0}),
    ("dpmpp_2s_ancestral", {"eta": 1.5}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_2m_sde", {"eta": 0.3, "s_noise": 0.8, "solver_type": "heun"}),
    ("dpmpp_2m_sde", {"eta": 0.0}),
]


def given_noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Noise that depends on its sigmas alone, so that both sides may ask in any order."""
    seed = int(torch.as_tensor(sigma * 1e6 + sigma_next * 1e3))
    return randn(2, 3, 5, 3, seed=seed)


def latents(sigmas: Tensor) -> Tensor:
    return randn(2, 3, 5, 3) * sigmas[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def assert_same_run(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], x: Tensor, expected: Tensor) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a.keys() - {"nfe"} == b.keys() == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert a["i"] == b["i"]
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            assert a[key].shape == b[key].shape
            assert relative(a[key], b[key]) <= 1e-10, (key, a["i"])
    assert relative(x, expected) <= 1e-10


@pytest.mark.parametrize("schedule", [*SCHEDULES, *ASCENDING])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
def test_trajectory_equals_k_diffusion(name: str, options: dict[str, Any], schedule: str, guided: Guided) -> None:
    stochastic = SAMPLERS[name].stochastic and options.get("eta") != 0.0
    sigmas = torch.tensor({**SCHEDULES, **ASCENDING}[schedule])
    x = latents(sigmas)
    options = {**options, **({"noise_sampler": given_noise} if SAMPLERS[name].stochastic else {})}
    function = SAMPLERS[name].function
    if schedule in ASCENDING and stochastic:
        with pytest.raises(ValueError, match="ascending"):
            function(guided, x, sigmas, disable=True, **options)
        return
    if name == "dpmpp_2m_sde" and schedule == "one step to zero":  # upstream raises UnboundLocalError there
        assert relative(function(guided, x, sigmas, disable=True, **options), guided(x, sigmas[:1].expand(2))) < 1e-15
        return
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    args = {"cond_scale": 3.0}
    got = function(guided, x, sigmas, args, ours.append, True, **options)
    # The package's own function on the same model: our protocol asks nothing else of a model.
    expected = getattr(k_diffusion().sampling, f"sample_{name}")(
        guided, x, sigmas, args, theirs.append, True, **options
    )
    assert_same_run(ours, theirs, got, expected)


@pytest.mark.parametrize("solver", [Euler, Heun, DPM2])
def test_churn_equals_k_diffusion(solver: type[Euler], guided: Guided, monkeypatch: pytest.MonkeyPatch) -> None:
    sigmas = torch.tensor(SCHEDULES["to zero"])
    x = latents(sigmas)
    churn = {"s_churn": 2.0, "s_tmin": 0.15, "s_tmax": 10.0, "s_noise": 1.03}  # off at the first step and the last
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []

    def noise_sampler(sigma: Tensor, sigma_hat: Tensor) -> Tensor:
        assert float(sigma_hat) == pytest.approx(1.25 * float(sigma), rel=1e-15)
        return given_noise(sigma, torch.zeros(()))

    got, _ = sample(solver(**churn), guided, x, sigmas, callback=ours.append, disable=True, noise_sampler=noise_sampler)
    calls = iter(sigmas)
    monkeypatch.setattr(torch, "randn_like", lambda x: given_noise(next(calls), torch.zeros(())))  # once per step
    name = {Euler: "sample_euler", Heun: "sample_heun", DPM2: "sample_dpm_2"}[solver]
    expected = getattr(k_diffusion().sampling, name)(guided, x, sigmas, None, theirs.append, True, **churn)
    assert_same_run(ours, theirs, got, expected)
    assert [float(r["sigma_hat"] / r["sigma"]) for r in ours] == pytest.approx([1, *[1.25] * 6, 1])


@pytest.mark.parametrize("name", [name for name in SAMPLERS if hasattr(k_diffusion().sampling, f"sample_{name}")])
def test_signature_is_k_diffusion_s_and_seeds(name: str) -> None:
    ours = list(inspect.signature(SAMPLERS[name].function).parameters.values())
    theirs = list(inspect.signature(getattr(k_diffusion().sampling, f"sample_{name}")).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert (ours[-1].name, ours[-1].default, ours[-1].kind) == ("seeds", None, inspect.Parameter.KEYWORD_ONLY)
