"""The named noise schedules against diffusers' tables, the zero-terminal-SNR rescale, and EDM's continuous one."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from ella_kd.models import EDMSchedule, NoiseSchedule
from ella_kd.samplers import SCHEDULES


@pytest.mark.parametrize(
    ("ours", "theirs", "sigma_max"),
    [
        (NoiseSchedule.sd2_v(), {"beta_end": 0.012, "beta_schedule": "scaled_linear"}, 14.6146),
        (
            NoiseSchedule.kolors(),
            {"beta_end": 0.014, "beta_schedule": "scaled_linear", "num_train_timesteps": 1100},
            29.2,
        ),
        (NoiseSchedule.paints_undo(), {"beta_end": 0.020, "beta_schedule": "linear"}, 191.0),
    ],
)
def test_named_tables_are_diffusers(ours: NoiseSchedule, theirs: dict[str, Any], sigma_max: float) -> None:
    scheduler: Any = DDPMScheduler(beta_start=0.00085, **theirs)
    torch.testing.assert_close(ours.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=5e-5, atol=0)
    assert ours.sigma_max == pytest.approx(sigma_max, rel=5e-3)
    assert ours.prediction == ("v" if theirs["beta_end"] == 0.012 else "eps")


def test_zero_terminal_snr_is_diffusers() -> None:
    scheduler: Any = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    ours = NoiseSchedule.sd2_v().zero_terminal_snr()
    assert ours.prediction == "v"
    # Theirs goes through betas in float32: a few 1e-3 in the last entries, whose alphas_cumprod is near 1e-6.
    torch.testing.assert_close(ours.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=5e-3, atol=0)
    torch.testing.assert_close(ours.alphas_cumprod[:900].float(), scheduler.alphas_cumprod[:900], rtol=1e-4, atol=0)
    assert ours.sigma_max == pytest.approx(4096, rel=1e-6)
    assert ours.sigma_min == pytest.approx(NoiseSchedule.sd15().sigma_min, rel=1e-9)
    for name in ("karras", "normal", "simple", "trailing"):
        assert len(SCHEDULES[name].sigmas(30, ours)) == 31
    with pytest.raises(ValueError, match=r"last must lie between 0 and .*, got 0\.5"):
        NoiseSchedule.sd15().zero_terminal_snr(0.5)


def test_edm_is_diffusers() -> None:
    schedule = EDMSchedule()
    scheduler: Any = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    sigma = torch.tensor([0.002, 0.1, 1.0, 37.5, 80.0])
    torch.testing.assert_close(schedule.sigma_to_t(sigma), scheduler.precondition_noise(sigma))
    c_skip, c_out, c_in = schedule.scalings(sigma)
    x, network = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(c_in * x, scheduler.precondition_inputs(x, sigma))
    torch.testing.assert_close(c_skip * x + c_out * network, scheduler.precondition_outputs(x, network, sigma))


@given(st.floats(0.002, 80.0))
def test_edm_round_trip(sigma: float) -> None:
    schedule = EDMSchedule()
    t = schedule.sigma_to_t(torch.tensor(sigma, dtype=torch.float64))
    assert t.dtype == torch.float32 and t.shape == ()
    assert float(t) == pytest.approx(math.log(sigma) / 4, rel=1e-6, abs=1e-7)
    assert float(schedule.t_to_sigma(t.double())) == pytest.approx(sigma, rel=1e-6)


def test_edm_clamps_keeps_dtypes_and_names_errors() -> None:
    schedule = EDMSchedule()
    t = schedule.sigma_to_t(torch.tensor([1e-9, 1e9, math.nan, -1.0]))
    assert t[:2].tolist() == pytest.approx([math.log(0.002) / 4, math.log(80) / 4])
    assert bool(t[2:].isnan().all())
    assert schedule.t_to_sigma(torch.tensor([-9.0, 9.0], dtype=torch.float64)).tolist() == [0.002, 80.0]
    assert schedule.t_to_sigma(torch.tensor(0)).dtype == torch.float32
    assert schedule.t_to_sigma(torch.tensor(0.0, dtype=torch.float16)).dtype == torch.float16
    assert schedule.sigmas[[0, -1]].tolist() == pytest.approx([0.002, 80.0])
    assert len(schedule.sigmas) == 1000 and bool((schedule.sigmas.diff() > 0).all())
    for row in SCHEDULES.values():
        assert len(row.sigmas(12, schedule)) == 13
    with pytest.raises(ValueError, match="no whole timesteps"):
        schedule.sigma_to_t(torch.ones(1), quantize=True)
    with pytest.raises(ValueError, match="0 < sigma_min"):
        EDMSchedule(sigma_min=0.0)
    with pytest.raises(ValueError, match="sigma_data > 0"):
        EDMSchedule(sigma_data=0.0)
    with pytest.raises(ValueError, match="n >= 2"):
        EDMSchedule(n=1)
