"""Noise: per-sample seeds, Brownian paths that outlive the step count, and no random number drawn for nothing."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd.samplers import (
    SAMPLERS,
    BrownianNoise,
    NormalNoise,
    get_sigmas_karras,
    randn,
    sample_dpm_2,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
)
from mixtures import Pointwise, named

SHAPE = (2, 4, 8, 8)
SIGMAS = get_sigmas_karras(5, 0.03, 14.6)
MODEL = Pointwise()


def test_randn_is_torch_s_own_per_row() -> None:
    noise = randn(SHAPE, [3, 4])
    for row, seed in enumerate((3, 4)):
        assert torch.equal(noise[row], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(randn(SHAPE, [3, 4], dtype=torch.float64), noise.double())
    torch.manual_seed(0)
    first = randn(SHAPE)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(0)
    assert torch.equal(randn(SHAPE), first)


@pytest.mark.parametrize("kind", [NormalNoise, BrownianNoise])
def test_a_row_depends_on_its_own_seed(kind: type[NormalNoise]) -> None:
    x = torch.zeros(3, 4, 8, 8)
    batch = kind(x, [5, 6, 5 + 2**40])
    alone, double = kind(x[:1], [6]), kind(x[:1].double(), [6])
    for s, t in ((14.6, 3.0), (3.0, 0.2)):
        drawn = batch(s, t)
        assert torch.equal(drawn[1], alone(s, t)[0])
        assert torch.equal(double(s, t)[0], drawn[1].double()), "drawn in float32 for any dtype"
        assert not torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2]), "all bits of a seed count"


def test_streams_of_a_seed_are_independent_and_normal() -> None:
    x = torch.zeros(1, 4, 64, 64)
    normal, brownian = NormalNoise(x, [9]), BrownianNoise(x, [9])
    draws = [randn(x.shape, [9]), normal(2.0, 1.0), normal(1.0, 0.5), brownian(2.0, 1.0), brownian(1.0, 0.5)]
    flat = torch.stack([draw.flatten() for draw in draws]).double()
    correlation = torch.corrcoef(flat)
    limit = 4.5 / math.sqrt(flat.shape[1])
    assert float((correlation - torch.eye(5).double()).abs().max()) < limit
    assert float(flat.mean(1).abs().max()) < limit
    assert float((flat.std(1) - 1).abs().max()) < limit
    assert float(((flat**4).mean(1) / 3 - 1).abs().max()) < 0.1


def test_brownian_path_is_the_same_for_10_and_50_steps() -> None:
    """Coarse increments are the sums of the fine ones, whatever was asked before, on a full or a partial schedule."""
    x = torch.zeros(1, 4, 8, 8)
    fine = torch.linspace(math.log(14.6), math.log(0.03), 51).double().exp().tolist()
    coarse = fine[::5]
    paths = []
    for grid in (fine, coarse, fine[20:]):
        noise = BrownianNoise(x, [11])
        steps = [noise(s, t) * math.sqrt(math.log(s / t)) for s, t in pairwise(grid)]
        paths.append(torch.stack(steps))
    # 1e-3: log sigma is resolved to 1e-6, so an increment is right to about sqrt(1e-6)
    torch.testing.assert_close(paths[0].view(10, 5, *x.shape).sum(1), paths[1], rtol=0, atol=1e-3)
    assert torch.equal(paths[2], paths[0][20:])
    assert not torch.equal(BrownianNoise(x, [12])(14.6, 1.0), BrownianNoise(x, [11])(14.6, 1.0))
    assert torch.equal(BrownianNoise(x, [11])(1.0, 14.6), -BrownianNoise(x, [11])(14.6, 1.0))


def test_sde_with_one_seed_converges_to_one_picture() -> None:
    """The reason for Brownian paths: 10, 50 and 150 steps of one seed approach each other; another seed does not."""
    x = randn((1, 4, 8, 8), [1]) * 14.6

    def picture(steps: int, seed: int) -> Tensor:
        sigmas = get_sigmas_karras(steps, 0.3, 14.6)[:-1]
        return sample_dpmpp_2m_sde(MODEL, x, sigmas, disable=True, seeds=[seed])

    end = picture(150, 5)
    distance = {n: float((picture(n, 5) - end).norm() / end.norm()) for n in (10, 50)}
    assert distance[50] < distance[10] / 2 < 0.2
    assert float((picture(50, 6) - end).norm() / end.norm()) > 0.9


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (sample_euler, {}),
        (sample_heun, {}),
        (sample_dpm_2, {}),
        (sample_dpmpp_2m, {}),
        (sample_euler, {"s_churn": 5.0, "s_tmin": 100.0}),
        (sample_heun, {"s_churn": 5.0, "s_noise": 0.0}),
        (sample_euler_ancestral, {"eta": 0.0}),
        (sample_dpmpp_2s_ancestral, {"eta": 0.0}),
        (sample_dpmpp_2m_sde, {"eta": 0.0}),
        (sample_euler_ancestral, {"seeds": [1, 2]}),
        (sample_dpmpp_2m_sde, {"seeds": [1, 2]}),
        (sample_dpmpp_2m_sde, {"noise_sampler": lambda s, t: torch.zeros(SHAPE)}),
    ],
    ids=named,
)
def test_the_global_generator_is_left_alone(function: Any, options: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    function(MODEL, randn(SHAPE, [1, 2]) * 14.6, SIGMAS, disable=True, **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_noise_sampler_is_called_without_noise() -> None:
    def never(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        raise AssertionError("called for nothing")

    for function in (sample_euler_ancestral, sample_dpmpp_2s_ancestral, sample_dpmpp_2m_sde):
        function(MODEL, randn(SHAPE, [1, 2]), SIGMAS, disable=True, eta=0.0, noise_sampler=never)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde", "er_sde", "euler_ancestral_cfg_pp"])
def test_a_noise_sampler_of_another_dtype_changes_no_dtype(name: str) -> None:
    """Its noise is converted to x's, as the library's own is."""
    x = randn(SHAPE, [1, 2]) * 14.6
    noise = torch.linspace(-1.5, 1.5, x.numel(), dtype=torch.float64).view(x.shape)
    function, options = SAMPLERS[name].function, {"disable": True}
    drawn = function(MODEL, x, SIGMAS, noise_sampler=lambda s, t: noise, **options)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, function(MODEL, x, SIGMAS, noise_sampler=lambda s, t: noise.float(), **options))


def test_churn_draws_only_where_it_is_on() -> None:
    kwargs: dict[str, Any] = {"disable": True, "seeds": [1, 2], "s_churn": 1.0}
    x = randn(SHAPE, [1, 2]) * 14.6
    plain = sample_euler(MODEL, x, SIGMAS, disable=True)
    assert not torch.equal(sample_euler(MODEL, x, SIGMAS, **kwargs), plain)
    assert torch.equal(sample_euler(MODEL, x, SIGMAS, **kwargs, s_tmin=20.0), plain)
    assert torch.equal(sample_euler(MODEL, x, SIGMAS, **kwargs, s_tmax=0.01), plain)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seeds": [1]}, ValueError, "expected 2, got 1"),
        ({"seeds": [1, -1]}, ValueError, r"\[0, 2\^63\)"),
        ({"seeds": [1, 2**63]}, ValueError, r"\[0, 2\^63\)"),
        ({"seeds": [1, 2.5]}, TypeError, "integers"),
        ({"seeds": 3}, TypeError, "one per row"),
        ({"seeds": "ab"}, TypeError, "integers"),
        ({"seeds": [1, 2], "noise_sampler": lambda s, t: torch.zeros(SHAPE)}, ValueError, "not both"),
        ({"noise_sampler": lambda s, t: torch.zeros(1, 4, 8, 8)}, ValueError, r"like x \[2, 4, 8, 8\], got \[1,"),
    ],
    ids=named,
)
def test_bad_seeds_and_noise_samplers(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample_euler_ancestral(MODEL, randn(SHAPE, [1, 2]), SIGMAS, disable=True, **options)


def test_brownian_refuses_what_it_cannot_resolve() -> None:
    noise = BrownianNoise(torch.zeros(1, 1, 2, 2), [1])
    for s, t in ((1.0, 1.0), (1.0, 1.0 + 1e-8), (1e7, 1.0), (1.0, 1e-8)):
        with pytest.raises(ValueError, match="no Brownian increment"):
            noise(s, t)
