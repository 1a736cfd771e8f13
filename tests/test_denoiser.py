from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ella_kd import ELLA, CFGDenoiser, Constant, ELLADenoiser, LDMDenoiser, NoiseSchedule
from ella_kd.models import EDMSchedule
from ella_kd.models.text import TextFeatures
from ella_kd.samplers.upstream import k_diffusion
from tiny import (
    FEATURES,
    WIDTH,
    PointwiseTSC,
    PointwiseUNet,
    features,
    noise,
    relative,
    tiny_tsc,
    tiny_unet,
)

SIGMAS = torch.tensor([0.001, 0.0292, 0.1, 1.0, 3.3, 14.6, 14.615, 80.0], dtype=torch.float64)


class CompVis(nn.Module):
    """The model that k-diffusion's CompVis denoisers wrap; t in fp32, as ours is."""

    def __init__(self, unet: nn.Module, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.unet, self.alphas_cumprod = unet, schedule.alphas_cumprod

    def apply_model(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.unet(x, t.float(), cond)


def both(prediction: str, quantize: bool, unet: nn.Module) -> tuple[LDMDenoiser, Any]:
    schedule = NoiseSchedule.sd15(prediction)  # type: ignore[arg-type]
    external = k_diffusion().external
    theirs = external.CompVisDenoiser if prediction == "eps" else external.CompVisVDenoiser
    return LDMDenoiser(unet, schedule, quantize), theirs(CompVis(unet, schedule), quantize=quantize)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_equals_k_diffusions_denoiser_with_constant_tokens(prediction: str, quantize: bool) -> None:
    ours, theirs = both(prediction, quantize, PointwiseUNet())
    clean, eps = (noise(8, 4, 4, 4, seed=seed, dtype=torch.float64) for seed in (4, 5))
    cond = noise(8, 3, 2, dtype=torch.float64)
    x = clean + eps * SIGMAS[:, None, None, None]
    # 1e-7: t is rounded to fp32, in the two by different arithmetic
    assert relative(ours(x, SIGMAS, cond=cond), theirs(x, SIGMAS, cond=cond)) < 1e-7
    torch.testing.assert_close(ours.loss(clean, eps, SIGMAS, cond=cond), theirs.loss(clean, eps, SIGMAS, cond=cond),
                               rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.sigma_to_t(SIGMAS), theirs.sigma_to_t(SIGMAS).float(), rtol=2e-7, atol=1e-9)
    t = torch.tensor([0.0, 0.3, 500.5, 999.0])
    torch.testing.assert_close(ours.t_to_sigma(t), theirs.t_to_sigma(t).float(), rtol=1e-6, atol=0)
    for n in (None, 7):
        torch.testing.assert_close(ours.get_sigmas(n), theirs.get_sigmas(n).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    torch.testing.assert_close(ours.log_sigmas, theirs.log_sigmas)
    assert (ours.sigma_min, ours.sigma_max) == pytest.approx((float(theirs.sigma_min), float(theirs.sigma_max)))
    assert ours.inner_model is theirs.inner_model.unet
    assert ours.sigma_data == theirs.sigma_data


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_equals_k_diffusions_denoiser_around_a_unet(prediction: str) -> None:
    ours, theirs = both(prediction, False, tiny_unet())
    x, sigma, cond = noise(3, 4, 8, 8) * 5, torch.tensor([0.05, 2.0, 14.0]), noise(3, 6, WIDTH)
    theirs.float()
    assert relative(ours(x, sigma, cond), theirs(x, sigma, cond=cond)) < 1e-5


def test_unet_and_connector_see_the_same_fp32_timestep() -> None:
    unet, tsc = PointwiseUNet(), PointwiseTSC()
    ours = ELLADenoiser(unet, tsc)  # type: ignore[arg-type]
    ours(noise(8, 4, 2, 2, dtype=torch.float64), SIGMAS, features(3))
    assert unet.t[0].dtype == torch.float32
    assert torch.equal(unet.t[0], ours.sigma_to_t(SIGMAS))
    assert torch.equal(unet.context[0][:, 0, 0].float(), unet.t[0])


def test_quantize_gives_both_the_nearest_integer() -> None:
    unet = PointwiseUNet()
    ours = ELLADenoiser(unet, PointwiseTSC(), quantize=True)  # type: ignore[arg-type]
    sigma = ours.t_to_sigma(torch.tensor([961.73, 921.04, 0.4, 998.6], dtype=torch.float64))
    ours(noise(4, 4, 2, 2), sigma.float(), features(3))
    assert unet.t[0].tolist() == [962, 921, 0, 999]
    assert unet.context[0][:, 0, 0].tolist() == [962, 921, 0, 999]
    assert ours.sigma_to_t(sigma, quantize=False).tolist() == pytest.approx([961.73, 921.04, 0.4, 998.6], rel=1e-6)


@pytest.mark.parametrize("network", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_x_dtype_whatever_the_networks(network: torch.dtype, dtype: torch.dtype) -> None:
    x, sigma = noise(2, 4, 8, 8, dtype=dtype) * 3, torch.tensor([2.0, 7.0], dtype=dtype)
    exact = ELLADenoiser(tiny_unet().double(), tiny_tsc().double())(x, sigma, features(4))
    got = ELLADenoiser(tiny_unet().to(network), tiny_tsc().to(network))(x, sigma, features(4))
    assert got.dtype == dtype
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5, torch.float64: 1e-6}
    assert relative(got, exact) < tolerance[network]


@pytest.mark.parametrize("schedule", [
    NoiseSchedule.sd15(), NoiseSchedule.sd15("v"), EDMSchedule()], ids=["eps", "v", "EDM"])
def test_the_loss_is_the_error_of_the_denoised_in_the_networks_units(schedule: NoiseSchedule | EDMSchedule) -> None:
    denoiser, (clean, eps) = LDMDenoiser(PointwiseUNet(), schedule), noise(2, 4, 4, 4, 4, dtype=torch.float64)
    sigma, cond = torch.tensor([0.3, 1.0, 4.0, 12.0], dtype=torch.float64), noise(1, 3, 2, dtype=torch.float64)
    error = denoiser(clean + eps * sigma[:, None, None, None], sigma, cond) - clean
    expected = error.square().mean((1, 2, 3)) / denoiser.get_scalings(sigma)[1] ** 2
    torch.testing.assert_close(denoiser.loss(clean, eps, sigma, cond), expected, rtol=1e-6, atol=0)


def test_loss_trains_unet_and_connector() -> None:
    unet, tsc = tiny_unet().requires_grad_(True), tiny_tsc().requires_grad_(True)
    denoiser = ELLADenoiser(unet, tsc)
    loss = denoiser.loss(noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=5), torch.tensor([0.1, 1.0, 9.0]), features(2, 5, 1))
    assert loss.shape == (3,)
    loss.mean().backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert tsc.connector.latents.grad.norm() > 0  # type: ignore[union-attr]


def test_lift() -> None:
    tsc, text = tiny_tsc(), features(4, 2)
    plain, ella = LDMDenoiser(tiny_unet()), ELLADenoiser(tiny_unet(), tsc)
    lifted = ella.lift(text)
    assert isinstance(lifted, ELLA)
    assert lifted.tsc is tsc
    assert lifted.features is text
    bare = ella.lift(text.tokens)
    assert isinstance(bare, ELLA)
    assert bare.features.tokens is text.tokens
    assert bare.features.mask is None
    assert isinstance(plain.lift(text), Constant)
    clip = Constant(features(3, width=WIDTH))
    assert ella.lift(clip) is clip
    assert plain.lift(lifted) is lifted


@pytest.mark.parametrize(("cond", "error", "message"), [
    ("a red cube", TypeError, r"got str: encode prompts first, cond=t5\(prompt\)"),
    (None, TypeError, "got NoneType"),
    (["a"], TypeError, "got list"),
    (noise(3, FEATURES), ValueError, r"\[B, L, D\].*\[3, 12\]"),
    (noise(1, 0, FEATURES), ValueError, r"at least 1.*\[1, 0, 12\]"),
    (torch.ones(1, 3, FEATURES, dtype=torch.long), ValueError, "floats .*int64"),
    (noise(1, 3, 2048), ValueError, "width 12, got 2048"),
    (noise(3, 3, FEATURES), ValueError, r"has 3 rows and the batch 2: .*repeat\(n\)"),
    (TextFeatures(noise(1, 3, FEATURES), torch.ones(1, 4, dtype=torch.bool)), ValueError, r"\[1, 3\], bool .*\[1, 4\]"),
    (TextFeatures(noise(1, 3, FEATURES), torch.ones(1, 3).int()), ValueError, "mask must be .* bool .*int32"),
    (Constant(TextFeatures(noise(1, 3, 768))), ValueError, "24.*768"),
])
def test_bad_conditions(cond: object, error: type[Exception], message: str) -> None:
    denoiser = ELLADenoiser(tiny_unet(), tiny_tsc())
    with pytest.raises(error, match=message):
        denoiser(noise(2, 4, 8, 8), torch.ones(2), cond)


X = noise(2, 4, 8, 8)


@pytest.mark.parametrize(("x", "sigma", "message"), [
    (X, torch.tensor([1.0, 0.0]), "finite sigmas above 0, got .*0.0"),
    (X, torch.tensor([1.0, -1.0]), "finite sigmas above 0"),
    (X, torch.tensor([torch.nan, 1.0]), "finite sigmas above 0"),
    (X, torch.tensor([torch.inf, 1.0]), "finite sigmas above 0"),
    (X, torch.tensor(1.0), r"shape \[2\], one per sample, got \[\]"),
    (X, torch.ones(1), r"shape \[2\].* got \[1\]"),
    (X, torch.ones(2, 1), r"got \[2, 1\]"),
    (X[0], torch.ones(4), r"\[B, C, h, w\], got torch.float32 \[4, 8, 8\]"),
    (X.half(), torch.ones(2), "float32 or float64.*float16"),
])
def test_bad_x_and_sigma(x: Tensor, sigma: Tensor, message: str) -> None:
    denoiser = LDMDenoiser(PointwiseUNet())
    with pytest.raises(ValueError, match=message):
        denoiser(x, sigma, noise(1, 1, 2))
    with pytest.raises(ValueError, match=message):
        denoiser.loss(x, x, sigma, noise(1, 1, 2))


def test_missing_condition() -> None:
    with pytest.raises(TypeError, match="cond"):
        LDMDenoiser(PointwiseUNet())(X, torch.ones(2))


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_a_run_refuses_what_is_no_noise_level(bad: float) -> None:
    denoiser = ELLADenoiser(PointwiseUNet(), tiny_tsc())
    with pytest.raises(ValueError, match="finite sigmas above 0"):
        denoiser.bind(X, torch.tensor([1.0, bad, 0.0]), cond=features(3))
    with pytest.raises(ValueError, match="finite sigmas above 0"):
        denoiser.bind(X, cond=features(3))(X, bad)


def test_levels_are_one_or_one_per_row_and_rounded_as_x_is() -> None:
    denoiser = ELLADenoiser(tiny_unet(), tiny_tsc())
    bound = denoiser.bind(X, [0.1, 2.0, 0.0], cond=features(3))
    exact = denoiser(X, torch.tensor([0.1, 2.0]), features(3))
    assert relative(bound(X, (0.1, 2.0)).denoised, exact) < 1e-5
    assert relative(bound(X, float(torch.tensor(0.1))).denoised[:1], exact[:1]) < 1e-5
    with pytest.raises(ValueError, match="one per sample, so 2, got 3"):
        bound(X, (0.1, 2.0, 3.0))
    with pytest.raises(TypeError, match="has no guidance scale"):
        bound(X, 2.0, 7.5)


def test_nothing_in_an_evaluation_waits_for_the_device() -> None:
    """On the meta device reading a value raises, as waiting would stall an accelerator."""
    denoiser = ELLADenoiser(tiny_unet(), tiny_tsc()).to("meta")
    text = features(5, 2)
    there = TextFeatures(text.tokens.to("meta"), None if text.mask is None else text.mask.to("meta"))
    x = X.to("meta")
    for sigmas in (None, (1.0, 0.5)):
        assert denoiser.bind(x, sigmas, cond=there)(x, 1.0).denoised.shape == x.shape
        guided = CFGDenoiser(denoiser).bind(x, sigmas, cond=there, uncond=there, cond_scale=3.0)
        assert guided(x, 0.5).denoised.shape == x.shape
