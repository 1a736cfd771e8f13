"""Schedules give n + 1 strictly decreasing values ending in 0; tables and look-ups name them."""

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ella_kd.samplers import (
    SCHEDULES,
    get_sigmas_ays,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_normal,
)
from ella_kd.samplers.upstream import k_diffusion


def sd15_sigmas() -> Tensor:
    alphas_cumprod = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


class Denoiser:
    sigmas = sd15_sigmas()
    sigma_min = float(sigmas[0])
    sigma_max = float(sigmas[-1])


def assert_schedule(sigmas: Tensor, n: int) -> None:
    assert sigmas.shape == (n + 1,)
    assert sigmas.dtype == torch.get_default_dtype()
    assert bool((sigmas.diff() < 0).all())
    assert float(sigmas[-1]) == 0.0


counts = st.integers(1, 1000)
lows = st.floats(1e-3, 0.5)
highs = st.floats(1.0, 700.0)


@given(n=counts, low=lows, high=highs, rho=st.floats(1.0, 10.0))
def test_karras_and_exponential_decrease_to_zero(n: int, low: float, high: float, rho: float) -> None:
    for sigmas in (get_sigmas_karras(n, low, high, rho), get_sigmas_exponential(n, low, high)):
        assert_schedule(sigmas, n)
        assert float(sigmas[0]) == pytest.approx(high, rel=1e-6)
        if n > 1:
            assert float(sigmas[-2]) == pytest.approx(low, rel=1e-6)


@given(n=st.integers(1, 1000), size=st.integers(2, 50))
def test_normal_decreases_for_any_table(n: int, size: int) -> None:
    table = torch.linspace(0.1, 5.0, size).exp()
    sigmas = get_sigmas_normal(n, table)
    assert_schedule(sigmas, n)
    assert float(sigmas[0]) == pytest.approx(float(table[-1]), rel=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("n", [2, 3, 10, 37])
def test_equal_to_k_diffusion(n: int) -> None:
    upstream = k_diffusion()
    discrete = upstream.external.DiscreteSchedule(sd15_sigmas(), quantize=False)
    for ours, theirs, tolerance in (
        (get_sigmas_karras(n, 0.03, 14.6), upstream.sampling.get_sigmas_karras(n, 0.03, 14.6), 1e-13),
        (get_sigmas_karras(n, 0.03, 14.6, 5.0), upstream.sampling.get_sigmas_karras(n, 0.03, 14.6, 5.0), 1e-13),
        (get_sigmas_exponential(n, 0.03, 14.6), upstream.sampling.get_sigmas_exponential(n, 0.03, 14.6), 1e-13),
        (get_sigmas_normal(n, Denoiser()), discrete.get_sigmas(n), 2e-5),  # theirs rounds t to float32
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_signature_is_k_diffusion_s(name: str) -> None:
    ours = inspect.signature(SCHEDULES[name].function).parameters.values()
    theirs = inspect.signature(getattr(k_diffusion().sampling, f"get_sigmas_{name}")).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


def test_normal_takes_a_denoiser_or_its_table_and_is_even_in_t() -> None:
    sigmas = get_sigmas_normal(1000, Denoiser())
    torch.testing.assert_close(sigmas[:-1], Denoiser.sigmas.flip(0).float(), rtol=1e-6, atol=0)
    assert torch.equal(sigmas, get_sigmas_normal(1000, Denoiser.sigmas))


def test_ays_nodes() -> None:
    nodes = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
    torch.testing.assert_close(get_sigmas_ays(10), torch.tensor(nodes))
    twenty = get_sigmas_ays(20)
    torch.testing.assert_close(twenty[:-1:2], torch.tensor(nodes[:-1]))
    assert float(twenty[1]) == pytest.approx(math.sqrt(14.615 * 6.475), rel=1e-6)
    assert float(twenty[19]) == pytest.approx(math.sqrt(0.152 * 0.029), rel=1e-6)
    assert get_sigmas_ays(1).tolist() == pytest.approx([14.615, 0.0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: get_sigmas_karras(0, 0.1, 1.0), ValueError, "at least 1, got 0"),
        (lambda: get_sigmas_exponential(-3, 0.1, 1.0), ValueError, "at least 1, got -3"),
        (lambda: get_sigmas_ays(0), ValueError, "at least 1"),
        (lambda: get_sigmas_normal(0, Denoiser()), ValueError, "at least 1"),
        (lambda: get_sigmas_ays(2.5), TypeError, "must be an integer, got 2.5"),  # type: ignore[arg-type]
        (lambda: get_sigmas_ays(True), TypeError, "must be an integer"),
        (lambda: get_sigmas_karras(5, 0.0, 1.0), ValueError, "0 < sigma_min < sigma_max"),
        (lambda: get_sigmas_karras(5, 2.0, 1.0), ValueError, "0 < sigma_min < sigma_max"),
        (lambda: get_sigmas_exponential(5, 0.1, math.inf), ValueError, "0 < sigma_min < sigma_max"),
        (lambda: get_sigmas_exponential(5, math.nan, 1.0), ValueError, "0 < sigma_min < sigma_max"),
        (lambda: get_sigmas_karras(5, 0.1, 1.0, rho=0.0), ValueError, "rho must be above 0"),
        (lambda: get_sigmas_karras(50, 1.0, 1.0 + 1e-6), ValueError, "50 steps do not fit"),
        (lambda: get_sigmas_normal(5, "denoiser"), TypeError, "a denoiser with a 1-D tensor .sigmas"),
    ],
)
def test_bad_schedule_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


