"""The map between timestep and sigma: the known numbers, k-diffusion's formula, clamping, dtypes and errors."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ella_kd.models import NoiseSchedule

SCHEDULE = NoiseSchedule.sd15()


def k_diffusion_sigma_to_t(log_sigmas: Tensor, sigma: Tensor) -> Tensor:
    """As in k_diffusion.external.DiscreteSchedule, by an independent route: a piecewise linear function, tabulated."""
    log_sigma = sigma.log().clamp(log_sigmas[0], log_sigmas[-1])
    low = (log_sigma[..., None] >= log_sigmas).sum(-1).sub(1).clamp(0, len(log_sigmas) - 2)
    return low + (log_sigma - log_sigmas[low]) / (log_sigmas[low + 1] - log_sigmas[low])


def test_sd15_has_the_known_numbers() -> None:
    assert len(SCHEDULE.sigmas) == 1000
    assert SCHEDULE.sigmas.dtype == SCHEDULE.log_sigmas.dtype == torch.float64
    assert round(SCHEDULE.sigma_min, 4) == 0.0292
    assert round(SCHEDULE.sigma_max, 4) == 14.6146
    assert (SCHEDULE.sigmas.diff() > 0).all()
    # sigma^2 = (1 - ac) / ac, against diffusers' float32 table
    scheduler: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.allclose(SCHEDULE.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-5)
    assert torch.allclose(1 / (1 + SCHEDULE.sigmas**2), SCHEDULE.alphas_cumprod, rtol=1e-14)


@pytest.mark.parametrize("quantize", [False, True])
def test_every_timestep_is_a_round_trip(quantize: bool) -> None:
    t = torch.arange(1000, dtype=torch.float64)
    assert torch.equal(SCHEDULE.t_to_sigma(t), SCHEDULE.log_sigmas.exp())
    assert torch.allclose(SCHEDULE.sigma_to_t(SCHEDULE.sigmas, quantize).double(), t, atol=1e-9)


@given(st.floats(0.03, 14.6))
def test_every_sigma_is_a_round_trip(sigma: float) -> None:
    exact = torch.tensor([sigma], dtype=torch.float64)
    t = SCHEDULE.sigma_to_t(exact)
    want = k_diffusion_sigma_to_t(SCHEDULE.log_sigmas, exact)
    assert torch.equal(t, want.float()) or abs(float(t - want)) < 1e-10 * 1000
    assert math.isclose(float(SCHEDULE.t_to_sigma(want)), sigma, rel_tol=1e-10)
    assert math.isclose(float(SCHEDULE.t_to_sigma(t)), sigma, rel_tol=2e-6)  # t was rounded to float32
    assert float(SCHEDULE.sigma_to_t(exact, quantize=True)) == round(float(want))


def test_the_timesteps_of_karras_20() -> None:
    """The first values that ELLA's tokens must be asked for: fractional, 961.73 and 921.04 after the first."""
    ramp = torch.linspace(0, 1, 20, dtype=torch.float64)
    rho = 7.0
    high, low = SCHEDULE.sigma_max ** (1 / rho), SCHEDULE.sigma_min ** (1 / rho)
    t = SCHEDULE.sigma_to_t((high + ramp * (low - high)) ** rho)
    assert t[1:3].tolist() == pytest.approx([961.73, 921.04], abs=0.01)
    assert t[0] == 999
    assert t[-1] == pytest.approx(0, abs=1e-6)


def test_t_is_float32_and_rounded_once() -> None:
    """However a sigma arrives, the same number gives the same bits: alone or in a batch, float32 or float64."""
    sigmas = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 14
    together = SCHEDULE.sigma_to_t(sigmas)
    assert together.dtype == torch.float32
    assert torch.equal(together, SCHEDULE.sigma_to_t(sigmas.double()))
    assert torch.equal(together, torch.cat([SCHEDULE.sigma_to_t(x[None]) for x in sigmas]))
    assert SCHEDULE.sigma_to_t(sigmas.view(4, 16)).shape == (4, 16)
    assert SCHEDULE.sigma_to_t(sigmas[0]).shape == ()


def test_what_is_outside_the_table_clamps() -> None:
    sigma = torch.tensor([1e-6, 14.615, 1e9, math.inf], dtype=torch.float64)
    for quantize in (False, True):
        assert SCHEDULE.sigma_to_t(sigma, quantize).tolist() == [0, 999, 999, 999]
        assert SCHEDULE.sigma_to_t(torch.tensor([math.nan, -1.0]), quantize).isnan().all()
    t = torch.tensor([-3.0, 999.5, 5000.0], dtype=torch.float64)
    assert SCHEDULE.t_to_sigma(t).tolist() == SCHEDULE.t_to_sigma(t.clamp(0, 999)).tolist()
    assert SCHEDULE.t_to_sigma(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize(("given_dtype", "want"), [
    (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float16),
    (torch.int64, torch.float32)])
def test_t_to_sigma_keeps_the_dtype(given_dtype: torch.dtype, want: torch.dtype) -> None:
    sigma = SCHEDULE.t_to_sigma(torch.tensor([500], dtype=given_dtype))
    assert sigma.dtype == want
    assert math.isclose(float(sigma), float(SCHEDULE.sigmas[500]), rel_tol=1e-3)


@pytest.mark.parametrize(("table", "prediction", "says"), [
    (torch.tensor([[0.9, 0.5]]), "eps", r"shape \[N\] with N >= 2, got \[1, 2\]"),
    (torch.tensor([0.9]), "eps", r"got \[1\]"),
    (torch.tensor([0.9, 0.9]), "eps", "decrease strictly"),
    (torch.tensor([0.5, 0.9]), "eps", "decrease strictly"),
    (torch.tensor([0.9, 0.0]), "eps", "decrease strictly"),
    (torch.tensor([1.0, 0.5]), "eps", "decrease strictly"),
    (torch.tensor([0.9, math.nan]), "eps", "decrease strictly"),
    (torch.tensor([0.9, 0.5]), "epsilon", "\"eps\" or \"v\", got 'epsilon'"),
])
def test_wrong_tables_are_refused(table: Tensor, prediction: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        NoiseSchedule(table, prediction)  # type: ignore[arg-type]
