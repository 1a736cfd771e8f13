"""Any sampler, any schedule, any number of steps, any batch: what must hold for all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ella_kd import NoiseSchedule
from ella_kd.samplers import SAMPLERS, SCHEDULES, randn
from mixtures import Pointwise

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
