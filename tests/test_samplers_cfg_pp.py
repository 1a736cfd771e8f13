"""CFG++: one step is the base method's step on U, plus D - U of its first evaluation."""

import inspect
import math
import re
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd.samplers import (
    SAMPLERS,
    CFGpp,
    Euler,
    Heun,
    Run,
    Sampler,
    get_sigmas_exponential,
    get_sigmas_karras,
    sample,
    sample_dpmpp_2m_cfg_pp,
    sample_dpmpp_2m_paper_cfg_pp,
    sample_euler_ancestral_cfg_pp,
    sample_euler_cfg_pp,
    sample_heun_cfg_pp,
)
from ella_kd.samplers.names import COMFYUI
from mixtures import Guided, Mixture, Prediction, randn

pytestmark = pytest.mark.usefixtures("float64")

LAM = 0.6
CFG_PP = [name for name, row in SAMPLERS.items() if row.cfg_pp]


def base_of(name: str) -> Sampler:
    return SAMPLERS[re.sub("(_paper|_comfyui)?_cfg_pp$", "", name)]


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


def test_guidance_is_that_of_the_first_evaluation_added_once(guided: Guided) -> None:
    """Heun, whose second evaluation also sees U only."""
    s, t = 5.0, 2.0
    x = latents(s)
    first = guided.predict(x, torch.full((2,), s), True, LAM)
    base, _ = sample(Heun(), guided.uncond, x, torch.tensor([s, t]), disable=True)
    got, _ = sample(Heun(), guided, x, torch.tensor([s, t]), {"cond_scale": LAM}, disable=True, cfg_pp=True)
    torch.testing.assert_close(got, base + (first.denoised - first.uncond), rtol=1e-13, atol=1e-13)


FEW = ["euler_cfg_pp", "dpmpp_2m_paper_cfg_pp", "restart_cfg_pp", "seeds_3_cfg_pp"]


@pytest.mark.parametrize("name", FEW)
def test_a_plain_scale_warns_and_points_at_the_caller(name: str, guided: Guided) -> None:
    sigmas = get_sigmas_karras(2, 0.03, 14.6)
    with pytest.warns(UserWarning, match="7.5 is above 2") as caught:
        SAMPLERS[name].function(guided, latents(), sigmas, {"cond_scale": 7.5}, disable=True)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAMPLERS[name].function(guided, latents(), sigmas, {"cond_scale": 2.0}, disable=True)


@pytest.mark.parametrize("name", FEW)
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


VARIANTS = ["dpmpp_2m_paper_cfg_pp", "res_multistep_comfyui_cfg_pp"]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_row_is_its_base_on_u(name: str, guided: Guided) -> None:
    """Lambda 0: a variant too adds nothing."""
    row = SAMPLERS[name]
    base = base_of(name)
    options = {"noise_sampler": noise_sampler} if row.stochastic else {}
    sigmas = get_sigmas_karras(6, 0.03, 14.6)
    got = row.function(guided, latents(), sigmas, {"cond_scale": 0.0}, disable=True, **options)
    expected = base.function(guided.uncond, latents(), sigmas, disable=True, **options)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", VARIANTS)
def test_constant_denoised_adds_up_the_guidance(name: str) -> None:
    """U = u and D = u + g everywhere: any such method walks x' = (t/s) x + (1 - t/s) u + g; a corrector that steps
    anew from the x before would lose the g that was added there."""
    u, g = randn(2, 3, 4, 5, seed=3), 0.1 * randn(2, 3, 4, 5, seed=4)

    class Constant:
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            raise AssertionError("CFG++ asks predict")

        def predict(self, x: Tensor, sigma: Tensor, need_uncond: bool) -> Prediction:
            return Prediction(u + g, u)

    sigmas = get_sigmas_karras(7, 0.03, 14.6)
    options = {"eta": 0.0} if "eta" in inspect.signature(SAMPLERS[name].function).parameters else {}
    start = x = latents()
    gain = 1.0
    steps = SAMPLERS[name].solver.steps(sigmas.tolist())
    for i, (s, t) in enumerate(pairwise(sigmas.tolist())):
        if "paper" in name:
            gain = 1 - steps[i].weights.to_denoised[1]
        elif "comfyui" in name:
            gain = t / s if 0 < i < 6 else 1.0
        x = t / s * x + (1 - t / s) * u + gain * g
    got = SAMPLERS[name].function(Constant(), start, sigmas, disable=True, **options)
    torch.testing.assert_close(got, x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scale", ["lam", "cfg / 12.5", "normalised"])
@pytest.mark.parametrize("n", [1, 5, 20])
def test_the_effective_scale_in_the_record_is_that_of_plain_guidance(scale: Any, n: int, guided: Guided) -> None:
    sigmas = get_sigmas_karras(n, 0.03, 14.6)
    records: list[dict[str, Any]] = []
    got = sample_euler_cfg_pp(
        guided, latents(), sigmas, {"cond_scale": LAM}, records.append, disable=True, scale=scale
    )
    scales = {float(record["sigma"]): record["w"] for record in records}

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return guided(x, sigma, cond_scale=scales[float(sigma[0])])

    expected, _ = sample(Euler(), model, latents(), sigmas, disable=True)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for record, (s, t) in zip(records, pairwise(sigmas.tolist())):
        assert record["w"] * (1 - t / s) == pytest.approx(record["lam"], rel=1e-12)
        sigma = record["sigma"].expand(2)
        assert torch.equal(record["denoised"], guided(record["x"], sigma, cond_scale=record["lam"]))
    if scale != "normalised":
        assert {record["lam"] for record in records} == {LAM if scale == "lam" else LAM / 12.5}


def test_normalised_is_equally_strong_at_any_number_of_steps(guided: Guided) -> None:
    """w is the same for all steps and all n; on 20 exponential steps lambda is kappa, but for the last, to 0."""
    for ends_at_zero in (True, False):
        scales = set()
        for n in (5, 20, 80):
            sigmas = get_sigmas_exponential(n, 0.03, 14.6)
            if not ends_at_zero:
                sigmas = get_sigmas_exponential(n + 1, 0.03, 14.6)[:-1]
            run = Run(Heun(), CFGpp(guided, "normalised"), latents(), sigmas, {"cond_scale": LAM})
            records = list(run)
            scales |= {round(record["w"], 9) for record in records}
            if n == 20:
                finite = records[:-1] if ends_at_zero else records
                assert [record["lam"] for record in finite] == pytest.approx([LAM] * len(finite), rel=1e-9)
        steps = 19 if ends_at_zero else 20
        (strength,) = scales
        assert strength == pytest.approx(LAM / -math.expm1(-math.log(14.6 / 0.03) / steps), rel=1e-8)
    run = Run(Euler(), CFGpp(guided, "normalised"), latents(), torch.tensor([14.6, 0.0]), {"cond_scale": LAM})
    assert next(run)["lam"] == LAM


def test_slider_is_lambda_times_12_5(guided: Guided) -> None:
    sigmas = get_sigmas_karras(5, 0.03, 14.6)
    slider = sample_heun_cfg_pp(
        guided, latents(), sigmas, {"cond_scale": 12.5 * LAM}, disable=True, scale="cfg / 12.5"
    )
    expected = sample_heun_cfg_pp(guided, latents(), sigmas, {"cond_scale": LAM}, disable=True)
    torch.testing.assert_close(slider, expected, rtol=1e-13, atol=1e-13)


def test_paper_code_of_dpmpp_2m_by_hand(guided: Guided) -> None:
    """D - e^-h U + (1 - e^-h) (D - U_old) / (2 r) + e^-h x, and ComfyUI's name for it."""
    sigmas = torch.tensor([5.0, 2.0, 0.6, 0.2, 0.0])
    expected, old = latents(5.0), None
    for i, (s, t) in enumerate(pairwise(sigmas)):
        prediction = guided.predict(expected, s.expand(2), True, LAM)
        d, u = prediction.denoised, prediction.uncond
        expected = d - t / s * u + t / s * expected
        if old is not None and t > 0:
            r = (sigmas[i - 1] / s).log() / (s / t).log()
            expected = expected + (1 - t / s) * (d - old) / (2 * r)
        old = u
    assert COMFYUI["dpmpp_2m_cfg_pp"] is sample_dpmpp_2m_paper_cfg_pp
    got = sample_dpmpp_2m_paper_cfg_pp(guided, latents(5.0), sigmas, {"cond_scale": LAM}, disable=True)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    identity = sample_dpmpp_2m_cfg_pp(guided, latents(5.0), sigmas, {"cond_scale": LAM}, disable=True)
    assert float((got - identity).abs().max()) > 1e-3


@pytest.mark.parametrize("name", CFG_PP)
def test_made_functions_look_like_their_base(name: str) -> None:
    function = SAMPLERS[name].function
    base = base_of(name)
    *parameters, scale = inspect.signature(function).parameters.values()
    assert parameters == list(inspect.signature(base.function).parameters.values())
    assert (scale.name, scale.default, scale.kind) == ("scale", "lam", inspect.Parameter.KEYWORD_ONLY)
    assert function.__name__ == f"sample_{name}"
    doc = function.__doc__ or ""
    assert "CFG++ (2406.08070)" in doc and (base.function.__doc__ or "-") in doc


def test_every_fixed_grid_sampler_has_its_cfg_pp() -> None:
    for name, row in SAMPLERS.items():
        if not row.cfg_pp and "sigmas" in inspect.signature(row.function).parameters:
            assert f"{name}_cfg_pp" in SAMPLERS, name


def test_scales_refuse_and_warn(guided: Guided) -> None:
    sigmas = get_sigmas_karras(2, 0.03, 14.6)
    with pytest.raises(ValueError, match=r"one of .*'lam', 'cfg / 12.5', 'normalised'.*, got 'kappa'"):
        sample_euler_cfg_pp(guided, latents(), sigmas, {"cond_scale": LAM}, disable=True, scale="kappa")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'normalised' needs a number as cond_scale, got None"):
        sample_euler_cfg_pp(guided, latents(), sigmas, disable=True, scale="normalised")
    with pytest.warns(UserWarning, match=r"12\.5 lambda, usually 0 to 12\.5; 30 is above 25"):
        sample_euler_cfg_pp(guided, latents(), sigmas, {"cond_scale": 30.0}, disable=True, scale="cfg / 12.5")
    with pytest.warns(UserWarning, match="kappa, usually 0 to 1; 7 is above 2"):
        sample_euler_cfg_pp(guided, latents(), sigmas, {"cond_scale": 7}, disable=True, scale="normalised")
    records: list[dict[str, Any]] = []
    sample_euler_cfg_pp(guided, latents(), sigmas, None, records.append, disable=True)  # the model's own scale
    assert records[0]["lam"] is None and records[0]["w"] is None
