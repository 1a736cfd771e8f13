"""Any sampler, any schedule, any number of steps, any batch: what must hold for all of them."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ella_kd import NoiseSchedule
from ella_kd.samplers import (
    SAMPLERS,
    SCHEDULES,
    get_sigmas_karras,
    randn,
    sample_ddim,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_sde,
    sample_euler,
    sample_res_multistep,
)
from mixtures import Mixture, Pointwise

ARGS = {"cond_scale": 0.7}
SD15 = NoiseSchedule.sd15()


@pytest.mark.parametrize("name", SAMPLERS)
@settings(max_examples=12)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    n=st.integers(1, 8),
    seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=4),
    row=st.integers(0, 3),
)
def test_whatever_is_asked(name: str, schedule: str, n: int, seeds: list[int], row: int) -> None:
    sigmas = SCHEDULES[schedule].sigmas(n, SD15)
    sample, model = SAMPLERS[name].function, Pointwise()
    x = randn((len(seeds), 2, 3, 4), seeds) * sigmas[0]
    x_before, sigmas_before = x.clone(), sigmas.clone()

    drawn = sample(model, x, sigmas, ARGS, disable=True, seeds=seeds)
    assert drawn.shape == x.shape
    assert drawn.dtype == x.dtype
    assert bool(drawn.isfinite().all())
    assert torch.equal(x, x_before)
    assert torch.equal(sigmas, sigmas_before)
    assert torch.equal(sample(model, x, sigmas, ARGS, disable=True, seeds=seeds), drawn)
    row %= len(seeds)
    alone = sample(model, x[row : row + 1], sigmas, ARGS, disable=True, seeds=seeds[row : row + 1])
    assert torch.equal(alone[0], drawn[row])


HEUN_2M = partial(sample_dpmpp_2m_sde, eta=0.0, solver_type="heun")
IDENTITIES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "res_multistep is 2M heun": (sample_res_multistep, HEUN_2M),
    "2M is 2M SDE at eta 0": (sample_dpmpp_2m, partial(sample_dpmpp_2m_sde, eta=0.0)),
    "2S is SDE at eta 0": (partial(sample_dpmpp_2s_ancestral, eta=0.0), partial(sample_dpmpp_sde, eta=0.0, r=0.5)),
    "DDIM is Euler": (sample_ddim, sample_euler),
}


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("end", [0.0, 0.05])
def test_two_names_of_one_method_agree(name: str, end: float, mixture: Mixture, float64: None) -> None:
    one, other = IDENTITIES[name]
    sigmas = get_sigmas_karras(9, 0.05, 14.6)
    sigmas = sigmas if end == 0 else sigmas[:-1]
    x = randn((2, 1, 4, 4), [1, 2], dtype=torch.float64) * sigmas[0]
    torch.testing.assert_close(one(mixture, x, sigmas, disable=True), other(mixture, x, sigmas, disable=True),
                               rtol=1e-12, atol=1e-12)


DETERMINISTIC = [name for name, row in SAMPLERS.items() if not row.stochastic and not row.cfg_pp]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_gaussian_scales_with_its_noise(name: str, float64: None) -> None:
    """Data N(0, S): the denoised is S x / (S + sigma^2), so twice the noise on twice the data is twice the picture."""

    def gaussian(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, sigma: scale**2 * x / (scale**2 + sigma.view(-1, 1, 1, 1) ** 2)

    sigmas = get_sigmas_karras(7, 0.05, 10.0)
    x = randn((2, 1, 4, 4), [1, 2], dtype=torch.float64) * 10
    sample = SAMPLERS[name].function
    one = sample(gaussian(0.7), x, sigmas, disable=True)
    twice = sample(gaussian(1.4), 2 * x, 2 * sigmas, disable=True)
    torch.testing.assert_close(twice, 2 * one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_may_change_places(name: str) -> None:
    sigmas, seeds, order = get_sigmas_karras(5, 0.05, 10.0), [5, 6, 7], [2, 0, 1]
    x = randn((3, 1, 4, 4), seeds) * 10
    sample = SAMPLERS[name].function
    drawn = sample(Pointwise(), x, sigmas, ARGS, disable=True, seeds=seeds)
    moved = sample(Pointwise(), x[order], sigmas, ARGS, disable=True, seeds=[seeds[k] for k in order])
    assert torch.equal(moved, drawn[order])
