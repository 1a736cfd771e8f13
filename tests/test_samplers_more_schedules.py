"""The rest of the schedules, each against something independent: k-diffusion, diffusers, scipy's distributions, or the
property that defines it; and what other programs mean by the same names."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from scipy import stats
from torch import Tensor

from ella_kd.models import NoiseSchedule
from ella_kd.samplers import (
    SCHEDULES,
    get_schedule,
    get_sigmas_ays_sdxl,
    get_sigmas_beta,
    get_sigmas_ddim_uniform,
    get_sigmas_exponential,
    get_sigmas_gits,
    get_sigmas_kl_optimal,
    get_sigmas_laplace,
    get_sigmas_leading,
    get_sigmas_linear_quadratic,
    get_sigmas_linspace,
    get_sigmas_normal,
    get_sigmas_polyexponential,
    get_sigmas_sgm_uniform,
    get_sigmas_simple,
    get_sigmas_trailing,
    get_sigmas_vp,
)
from ella_kd.samplers.compatible_schedules import (
    get_sigmas_beta_a1111,
    get_sigmas_ddim_uniform_comfyui,
    get_sigmas_kl_optimal_a1111,
)
from ella_kd.samplers.registry import COMPATIBLE_SCHEDULES
from ella_kd.samplers.schedules import vp_betas
from ella_kd.samplers.upstream import k_diffusion

pytestmark = pytest.mark.usefixtures("float64")

SD15 = NoiseSchedule.sd15()
LOW, HIGH = SD15.sigma_min, SD15.sigma_max
each_n = pytest.mark.parametrize("n", [1, 2, 3, 10, 37, 1000])


def timesteps(sigmas: Tensor) -> list[float]:
    """The timesteps of a schedule, without its last 0, in float64 (log sigma is linear between whole ones)."""
    logs = SD15.log_sigmas.numpy()
    values: list[float] = np.interp(np.log(sigmas[:-1].numpy()), logs, np.arange(1000.0)).tolist()
    return values


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_count_from_1_to_1000(name: str) -> None:
    """float32, where two would be equal first: every count to 50, where roundings of N / n fall, and the last ones."""
    counts = {*range(1, 51), *range(51, 1001, 17), 99, 100, 128, 138, 139, 200, 250, 333, 334, 499, 500, 501, 999, 1000}
    for dtype, some in ((torch.float32, counts), (torch.float64, {1, 2, 139, 999, 1000})):
        torch.set_default_dtype(dtype)  # the fixture puts it back
        for n in some:
            sigmas = SCHEDULES[name].sigmas(n, SD15)
            assert sigmas.shape == (n + 1,) and sigmas.dtype == dtype, n
            assert bool((sigmas.diff() < 0).all()), n
            assert float(sigmas[-1]) == 0.0


@each_n
def test_polyexponential_and_vp_are_k_diffusion_s(n: int) -> None:
    theirs = k_diffusion().sampling
    for rho in (0.5, 1.0, 2.0):
        expected = theirs.get_sigmas_polyexponential(n, LOW, HIGH, rho)
        torch.testing.assert_close(get_sigmas_polyexponential(n, LOW, HIGH, rho), expected, rtol=1e-13, atol=0)
    assert torch.equal(get_sigmas_polyexponential(n, LOW, HIGH), get_sigmas_exponential(n, LOW, HIGH))
    torch.testing.assert_close(get_sigmas_vp(n), theirs.get_sigmas_vp(n), rtol=1e-12, atol=0)
    options = (9.0, 0.8, 1e-2)
    torch.testing.assert_close(get_sigmas_vp(n, *options), theirs.get_sigmas_vp(n, *options), rtol=1e-12, atol=0)


def test_vp_fitted_to_a_range_ends_there() -> None:
    for low, high in ((LOW, HIGH), (0.01, 152.0)):
        sigmas = get_sigmas_vp(9, *vp_betas(low, high))
        assert sigmas[[0, -2]].tolist() == pytest.approx([high, low], rel=1e-9)
    assert SCHEDULES["vp"].sigmas(9, SD15)[[0, -2]].tolist() == pytest.approx([HIGH, LOW], rel=1e-9)
    assert vp_betas(LOW, HIGH) == pytest.approx((9.0458, 0.8458), abs=1e-3)


@pytest.mark.parametrize(("mu", "beta"), [(0.0, 0.5), (-1.0, 0.7), (3.0, 0.4)])
def test_laplace_is_even_in_its_quantiles(mu: float, beta: float) -> None:
    sigmas = get_sigmas_laplace(23, LOW, HIGH, mu, beta)
    assert sigmas[[0, -2]].tolist() == pytest.approx([HIGH, LOW], rel=1e-9)
    quantiles = stats.laplace(mu, beta).cdf(sigmas[:-1].log().numpy())
    np.testing.assert_allclose(np.diff(quantiles), np.diff(quantiles)[0], rtol=1e-8)


@each_n
def test_kl_optimal_is_even_in_arctan(n: int) -> None:
    angles = get_sigmas_kl_optimal(n, LOW, HIGH)[:-1].atan()
    np.testing.assert_allclose(angles, np.linspace(math.atan(HIGH), math.atan(LOW), n), rtol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 8, 9, 30, 1000])
def test_linear_quadratic_is_a_line_and_a_parabola_that_meet_smoothly(n: int) -> None:
    v = 1 - get_sigmas_linear_quadratic(n, HIGH).double() / HIGH
    half = n // 2
    assert v[[0, half, n]].tolist() == pytest.approx([0.0, 0.025, 1.0], abs=1e-12)
    np.testing.assert_allclose(v[: half + 1].diff(), 0.025 / half, rtol=1e-7)
    bends = v[half:].diff().diff()
    np.testing.assert_allclose(bends, bends[:1].expand_as(bends), rtol=1e-5, atol=1e-13)
    first = float(v[half:].diff()[0])  # of a parabola through the joint with the line's slope: slope + bend
    slope, bend = 0.025 / half, (1 - 0.025 / half * n) / (n - half) ** 2
    assert first == pytest.approx(slope + bend, rel=1e-9)
    assert get_sigmas_linear_quadratic(1, HIGH).tolist() == pytest.approx([HIGH, 0.0])


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 20, 30, 50, 250, 600, 999])
def test_spacings_are_diffusers(n: int) -> None:
    for spacing, ours in (
        ("leading", get_sigmas_leading),
        ("trailing", get_sigmas_trailing),
        ("linspace", get_sigmas_linspace),
    ):
        scheduler: Any = EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing=spacing, steps_offset=1
        )
        if (spacing, n) == ("linspace", 1):
            continue  # theirs is timestep 0, from which nothing can be drawn
        scheduler.set_timesteps(n)  # float32, its betas too
        torch.testing.assert_close(ours(n, SD15), scheduler.sigmas.double(), rtol=1e-4, atol=0)


def test_leading_starts_below_and_the_offset_is_said() -> None:
    assert timesteps(get_sigmas_leading(20, SD15))[:2] == pytest.approx([951, 901])
    assert timesteps(get_sigmas_leading(20, SD15, steps_offset=0))[-1] == pytest.approx(0)
    assert timesteps(get_sigmas_leading(600, SD15))[0] == pytest.approx(600)
    with pytest.raises(ValueError, match="steps_offset 50 leads to timestep 1000 of 1000 with 20 steps"):
        get_sigmas_leading(20, SD15, steps_offset=50)


@each_n
def test_simple_and_sgm_uniform(n: int) -> None:
    stride = 1000 / n
    expected = [999 - math.floor(i * stride + 1e-9) for i in range(n)]
    assert timesteps(get_sigmas_simple(n, SD15)) == pytest.approx(expected, abs=1e-9)
    assert timesteps(get_sigmas_sgm_uniform(n, SD15)) == pytest.approx([999 * (1 - i / n) for i in range(n)], abs=1e-9)
    torch.testing.assert_close(get_sigmas_sgm_uniform(n, SD15)[:-1], get_sigmas_normal(n + 1, SD15)[:-2])


def test_ddim_uniform_has_n_steps_and_is_comfyui_s_where_n_divides() -> None:
    for n in (1, 2, 4, 5, 10, 20, 25, 50, 100, 250, 500):
        assert torch.equal(get_sigmas_ddim_uniform(n, SD15), get_sigmas_ddim_uniform_comfyui(n, SD15))
    assert timesteps(get_sigmas_ddim_uniform(20, SD15))[::19] == pytest.approx([951, 1])
    assert len(get_sigmas_ddim_uniform_comfyui(30, SD15)) == 32
    spread = timesteps(get_sigmas_ddim_uniform(600, SD15))
    assert spread[0] == pytest.approx(999) and spread[-1] == pytest.approx(1)
    assert timesteps(get_sigmas_ddim_uniform(1000, SD15))[-1] == pytest.approx(0)


@each_n
def test_beta_is_even_in_its_quantiles(n: int) -> None:
    share = np.array(timesteps(get_sigmas_beta(n, SD15))) / 999
    np.testing.assert_allclose(stats.beta(0.6, 0.6).cdf(share), 1 - np.arange(n) / n, atol=1e-9)


def test_node_tables() -> None:
    sdxl = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.0]
    assert get_sigmas_ays_sdxl(10).tolist() == pytest.approx(sdxl)
    gits = [14.615, 4.617, 2.507, 1.236, 0.702, 0.402, 0.240, 0.156, 0.104, 0.094, 0.0]
    assert get_sigmas_gits(10).tolist() == pytest.approx(gits)
    assert get_sigmas_gits(20)[:-1:2].tolist() == pytest.approx(gits[:-1])


def test_compatible_names_are_theirs() -> None:
    """What ComfyUI and A1111 give, from the definitions: rounded and dropped, linear in sigma, no 0, clamped."""
    for n in (1, 5, 20, 200):
        rounded = np.rint(stats.beta.ppf(1 - np.arange(n) / n, 0.6, 0.6) * 999)
        kept = [float(SD15.sigmas[int(t)]) for i, t in enumerate(rounded) if i == 0 or t != rounded[i - 1]]
        assert get_schedule("beta_comfyui").sigmas(n, SD15).tolist() == pytest.approx([*kept, 0.0])
        assert len(kept) == n or n == 200
    share = (get_sigmas_beta_a1111(9, LOW, HIGH)[:-1] - LOW) / (HIGH - LOW)
    np.testing.assert_allclose(stats.beta(0.6, 0.6).cdf(share), np.linspace(1, 0, 9), atol=1e-9)
    for n in (1, 4):
        angles = get_sigmas_kl_optimal_a1111(n, LOW, HIGH).atan()
        np.testing.assert_allclose(angles, np.linspace(math.atan(HIGH), math.atan(LOW), n + 1), rtol=1e-12)
    laplace = get_schedule("laplace_comfyui").sigmas(7, SD15)
    assert len(laplace) == 7 and laplace[[0, -1]].tolist() == pytest.approx([HIGH, LOW])
    np.testing.assert_allclose(stats.laplace(0, 0.5).sf(laplace[1:-1].log()), np.arange(1, 6) / 6, atol=1e-5)
    ays = get_schedule("ays_a1111").sigmas(11, SD15)
    assert ays[[0, 5, 10, 11]].tolist() == pytest.approx([14.615, 1.396, 0.029, 0.0])
    assert get_schedule("ays_a1111").sigmas(1, SD15).tolist() == pytest.approx([0.029, 0.0])
    assert not COMPATIBLE_SCHEDULES.keys() & SCHEDULES.keys()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: get_sigmas_simple(1001, SD15), ValueError, "1001 steps do not fit: .* there are 1000"),
        (lambda: get_sigmas_ddim_uniform(3, torch.tensor([0.1, 1.0])), ValueError, "there are 2"),
        (lambda: get_sigmas_trailing(0, SD15), ValueError, "at least 1"),
        (lambda: get_sigmas_beta(5, None), TypeError, "a denoiser with a 1-D tensor"),
        (lambda: get_sigmas_vp(5, eps_s=0.0), ValueError, "eps_s must lie between 0 and 1"),
        (lambda: get_sigmas_vp(5, beta_d=-9.0), ValueError, "do not fit"),
        (lambda: get_sigmas_laplace(5, LOW, HIGH, beta=0.0), ValueError, "beta must be above 0"),
        (lambda: get_sigmas_polyexponential(5, LOW, HIGH, rho=-1.0), ValueError, "rho must be above 0"),
        (lambda: get_sigmas_linear_quadratic(3, HIGH, 0.4), ValueError, "between 0 and 0.333333 for 3 steps, got 0.4"),
        (lambda: get_sigmas_linear_quadratic(3, 0.0), ValueError, "sigma_max must be above 0"),
        (lambda: get_schedule("laplace_comfyui").sigmas(1000, SD15), ValueError, "no schedule of 1000 steps"),
        (lambda: get_schedule("laplace_comfyui").sigmas(1, SD15), ValueError, "no schedule of 1 steps"),
        (lambda: get_schedule("beta_confyui"), ValueError, "did you mean beta_comfyui"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
