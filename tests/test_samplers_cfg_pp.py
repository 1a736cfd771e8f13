"""CFG++: one step is the base method's step on U, plus D - U of its first evaluation."""

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd.samplers import (
    SAMPLERS,
    DPMpp2M,
    DPMpp2SAncestral,
    Euler,
    EulerAncestral,
    Heun,
    Solver,
    get_sigmas_karras,
    sample,
    sample_dpmpp_2m_cfg_pp,
    sample_euler_ancestral_cfg_pp,
    sample_euler_cfg_pp,
)
from mixtures import Guided, Mixture, randn

pytestmark = pytest.mark.usefixtures("float64")

LAM = 0.6
CFG_PP = [name for name, row in SAMPLERS.items() if row.cfg_pp]


def latents(sigma: float = 14.6) -> Tensor:
    return randn(2, 3, 4, 5) * sigma


def noise_sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    return randn(2, 3, 4, 5, seed=int(sigma * 1000))


@pytest.mark.parametrize("end", [0.0, 0.02])
def test_euler_cfg_pp_is_euler_with_a_scale_per_step(guided: Guided, end: float) -> None:
    sigmas = torch.cat([get_sigmas_karras(8, 0.03, 14.6)[:-1], torch.tensor([end])])
    x = latents()
    got = sample_euler_cfg_pp(guided, x, sigmas, {"cond_scale": LAM}, disable=True)
    scales = {float(s): LAM * float(s / (s - t)) for s, t in pairwise(sigmas)}

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return guided(x, sigma, cond_scale=scales[float(sigma[0])])

    expected, _ = sample(Euler(), model, x, sigmas, disable=True)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_two_by_hand_steps_of_dpmpp_2m_and_ancestral(guided: Guided) -> None:
    """Written out with U history and D - U added once, against the driver."""
    s0, s1, s2 = 5.0, 2.0, 0.6
    x = latents(s0)
    sigmas = torch.tensor([s0, s1, s2])
    d0 = guided.predict(x, torch.full((2,), s0), True, LAM)
    x1 = s1 / s0 * x + (1 - s1 / s0) * d0.uncond + (d0.denoised - d0.uncond)
    d1 = guided.predict(x1, torch.full((2,), s1), True, LAM)
    r = torch.tensor(s0 / s1).log() / torch.tensor(s1 / s2).log()
    extrapolated = d1.uncond + (d1.uncond - d0.uncond) / (2 * r)
    x2 = s2 / s1 * x1 + (1 - s2 / s1) * extrapolated + (d1.denoised - d1.uncond)
    got = sample_dpmpp_2m_cfg_pp(guided, x, sigmas, {"cond_scale": LAM}, disable=True)
    torch.testing.assert_close(got, x2, rtol=1e-12, atol=1e-12)

    up = (s1**2 * (s0**2 - s1**2) / s0**2) ** 0.5
    down = (s1**2 - up**2) ** 0.5
    noise = noise_sampler(torch.tensor(s0), torch.tensor(s1))
    expected = d0.denoised + down * (x - d0.uncond) / s0 + up * noise
    got = sample_euler_ancestral_cfg_pp(
        guided, x, sigmas[:2], {"cond_scale": LAM}, disable=True, noise_sampler=noise_sampler
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "solver", [Euler(), EulerAncestral(), Heun(), DPMpp2SAncestral(), DPMpp2M(), DPMpp2M(eta=1.0)], ids=repr
)
def test_lambda_zero_is_the_base_method_on_uncond(solver: Solver, guided: Guided) -> None:
    sigmas = get_sigmas_karras(7, 0.03, 14.6)
    got, _ = sample(
        solver, guided, latents(), sigmas, {"cond_scale": 0.0}, disable=True, cfg_pp=True, noise_sampler=noise_sampler
    )
    expected, _ = sample(solver, guided.uncond, latents(), sigmas, disable=True, noise_sampler=noise_sampler)
    assert torch.equal(got, expected)


def test_guidance_is_that_of_the_first_evaluation_added_once(guided: Guided) -> None:
    """Heun, whose second evaluation also sees U only."""
    s, t = 5.0, 2.0
    x = latents(s)
    first = guided.predict(x, torch.full((2,), s), True, LAM)
    base, _ = sample(Heun(), guided.uncond, x, torch.tensor([s, t]), disable=True)
    got, _ = sample(Heun(), guided, x, torch.tensor([s, t]), {"cond_scale": LAM}, disable=True, cfg_pp=True)
    torch.testing.assert_close(got, base + (first.denoised - first.uncond), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CFG_PP)
def test_callback_sees_the_guided_denoised(name: str, guided: Guided) -> None:
    records: list[dict[str, Any]] = []
    sigmas = get_sigmas_karras(3, 0.03, 14.6)
    SAMPLERS[name].function(guided, latents(), sigmas, {"cond_scale": LAM}, records.append, True)
    assert len(records) == 3
    for record in records:
        assert torch.equal(record["denoised"], guided(record["x"], record["sigma"].expand(2), cond_scale=LAM))


@pytest.mark.parametrize("name", CFG_PP)
def test_a_plain_scale_warns_and_points_at_the_caller(name: str, guided: Guided) -> None:
    sigmas = get_sigmas_karras(2, 0.03, 14.6)
    with pytest.warns(UserWarning, match="7.5 is above 2") as caught:
        SAMPLERS[name].function(guided, latents(), sigmas, {"cond_scale": 7.5}, disable=True)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAMPLERS[name].function(guided, latents(), sigmas, {"cond_scale": 2.0}, disable=True)


@pytest.mark.parametrize("name", CFG_PP)
def test_refuses_a_model_without_predict_and_an_ascending_schedule(name: str, guided: Guided, mixture: Mixture) -> None:
    with pytest.raises(TypeError, match=r"\.predict"):
        SAMPLERS[name].function(mixture, latents(), get_sigmas_karras(2, 0.03, 14.6), disable=True)
    with pytest.raises(ValueError, match="ascending"):
        SAMPLERS[name].function(guided, latents(), torch.tensor([0.1, 1.0]), disable=True)


def test_a_model_that_returns_no_uncond_is_named(guided: Guided) -> None:
    class Forgetful:
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            raise AssertionError("CFG++ asks predict")

        def predict(self, x: Tensor, sigma: Tensor, need_uncond: bool) -> Any:
            return guided.predict(x, sigma, need_uncond=False)

    with pytest.raises(ValueError, match="must return uncond like x"):
        sample_euler_cfg_pp(Forgetful(), latents(), get_sigmas_karras(2, 0.03, 14.6), disable=True)
