"""Whole trajectories equal those of the real k-diffusion package, in float64."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd.samplers import DPM2, SAMPLERS, Euler, Heun, sample, sample_dpm_2_ancestral
from ella_kd.samplers.upstream import k_diffusion
from mixtures import Guided, named
from oracles import TO_ZERO, given_noise, latents, relative

pytestmark = pytest.mark.usefixtures("float64")

SCHEDULES = {
    "to zero": TO_ZERO,
    "img2img, ends above zero": [3.1, 2.0, 1.2, 0.7, 0.31],
    "one step to zero": [14.6, 0.0],
    "one step": [14.6, 1.0],
    "ascending": [0.03, 0.2, 1.1, 4.2, 14.6],
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("euler", {}),
    ("heun", {}),
    ("dpm_2", {}),
    ("dpmpp_2m", {}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.4, "s_noise": 0.9}),
    ("euler_ancestral", {"eta": 0.0}),
    ("euler_ancestral", {"eta": 1.5}),  # sigma_up would exceed sigma_next: down to 0
    ("dpm_2_ancestral", {}),
    ("dpm_2_ancestral", {"eta": 0.4, "s_noise": 1.1}),
    ("dpm_2_ancestral", {"eta": 0.0}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_2s_ancestral", {"eta": 0.4, "s_noise": 1.1}),
    ("dpmpp_2s_ancestral", {"eta": 0.0}),
    ("dpmpp_2s_ancestral", {"eta": 1.5}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_2m_sde", {"eta": 0.3, "s_noise": 0.8, "solver_type": "heun"}),
    ("dpmpp_2m_sde", {"eta": 0.0}),
    ("dpmpp_sde", {}),
    ("dpmpp_sde", {"eta": 0.4, "s_noise": 0.9, "r": 0.3}),
    ("dpmpp_sde", {"eta": 0.0, "r": 1.0}),
    ("dpmpp_sde", {"eta": 1.5}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", {"eta": 0.3, "s_noise": 0.8}),
    ("dpmpp_3m_sde", {"eta": 0.0}),
    ("lms", {}),
    ("lms", {"order": 1}),
    ("lms", {"order": 3}),
    ("lms", {"order": 6}),
]


def assert_same_run(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], x: Tensor, expected: Tensor) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a.keys() - {"nfe"} == b.keys() == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert a["i"] == b["i"]
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            assert a[key].shape == b[key].shape
            assert relative(a[key], b[key]) <= 1e-10, (key, a["i"])
    assert relative(x, expected) <= 1e-10


@pytest.mark.parametrize(("name", "options"), CASES, ids=named)
def test_trajectory_equals_k_diffusion(name: str, options: dict[str, Any], guided: Guided) -> None:
    """The package's own function on the same model: our protocol asks nothing else of a model."""
    row, theirs_too = SAMPLERS[name], getattr(k_diffusion().sampling, f"sample_{name}")
    noise = {"noise_sampler": given_noise} if "noise_sampler" in inspect.signature(row.function).parameters else {}
    for schedule, values in SCHEDULES.items():
        sigmas, args, ours, theirs = torch.tensor(values), {"cond_scale": 3.0}, list[Any](), list[Any]()
        x = latents(values[0])
        if schedule == "ascending" and noise and options.get("eta") != 0.0:
            with pytest.raises(ValueError, match="ascending"):
                row.function(guided, x, sigmas, disable=True, **options, **noise)
            continue
        got = row.function(guided, x, sigmas, args, ours.append, True, **options, **noise)
        if name in ("dpmpp_2m_sde", "dpmpp_3m_sde") and schedule == "one step to zero":  # theirs: UnboundLocalError
            assert torch.equal(got, ours[0]["denoised"])
            continue
        assert_same_run(ours, theirs, got, theirs_too(guided, x, sigmas, args, theirs.append, True, **options, **noise))


def test_every_function_of_k_diffusion_is_compared() -> None:
    theirs = {name.removeprefix("sample_") for name in dir(k_diffusion().sampling) if name.startswith("sample_")}
    assert theirs - {"dpm_fast", "dpm_adaptive"} == {name for name, _ in CASES}


def test_dpm_2_ancestral_keeps_the_noise_that_k_diffusion_drops(guided: Guided) -> None:
    """At eta 1.5 sigma_down is 0: their x has then no noise where sigma_next says 1."""
    sigmas = torch.tensor([14.6, 1.0])
    options: dict[str, Any] = {"eta": 1.5, "noise_sampler": given_noise}
    theirs = k_diffusion().sampling.sample_dpm_2_ancestral(guided, latents(), sigmas, disable=True, **options)
    ours = sample_dpm_2_ancestral(guided, latents(), sigmas, disable=True, **options)
    torch.testing.assert_close(theirs, guided(latents(), sigmas[:1].expand(2)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs + given_noise(*sigmas), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("s_churn", "raised"), [(2.0, 1.25), (5.0, 2**0.5)])  # as much as sqrt(2) at most
@pytest.mark.parametrize("solver", [Euler, Heun, DPM2])
def test_churn_equals_k_diffusion(
    solver: type[Euler], s_churn: float, raised: float, guided: Guided, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigmas = torch.tensor(SCHEDULES["to zero"])
    x = latents(14.6)
    churn = {"s_churn": s_churn, "s_tmin": 0.15, "s_tmax": 10.0, "s_noise": 1.03}  # off at the first step and the last
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []

    def noise_sampler(sigma: Tensor, sigma_hat: Tensor) -> Tensor:
        assert float(sigma_hat) == pytest.approx(raised * float(sigma), rel=1e-15)
        return given_noise(sigma, 0)

    got, _ = sample(solver(**churn), guided, x, sigmas, callback=ours.append, disable=True, noise_sampler=noise_sampler)
    calls = iter(sigmas)
    monkeypatch.setattr(torch, "randn_like", lambda x: given_noise(next(calls), 0))  # once per step
    name = {Euler: "sample_euler", Heun: "sample_heun", DPM2: "sample_dpm_2"}[solver]
    expected = getattr(k_diffusion().sampling, name)(guided, x, sigmas, None, theirs.append, True, **churn)
    assert_same_run(ours, theirs, got, expected)
    assert [float(r["sigma_hat"] / r["sigma"]) for r in ours] == pytest.approx([1, *[raised] * 6, 1])


@pytest.mark.parametrize("name", [name for name in SAMPLERS if hasattr(k_diffusion().sampling, f"sample_{name}")])
def test_signature_is_k_diffusion_s_and_seeds(name: str) -> None:
    ours = list(inspect.signature(SAMPLERS[name].function).parameters.values())
    theirs = list(inspect.signature(getattr(k_diffusion().sampling, f"sample_{name}")).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert (ours[-1].name, ours[-1].default, ours[-1].kind) == ("seeds", None, inspect.Parameter.KEYWORD_ONLY)
