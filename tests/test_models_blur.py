"""The Gaussian blur of guidance rules against scipy's."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from ella_kd.models.patches import gaussian_blur
from tiny import noise


@given(st.floats(0.05, 40), st.integers(1, 12), st.integers(1, 12))
def test_a_blur_equals_scipys_and_keeps_the_mean(sigma: float, h: int, w: int) -> None:
    x = noise(2, 3, h, w, dtype=torch.float64)
    got = gaussian_blur(x, sigma)
    want = torch.from_numpy(gaussian_filter(x.numpy(), sigma, axes=(2, 3), mode="reflect", truncate=6))
    assert float((got - want).abs().max()) < 1e-7
    assert float((got.mean((2, 3)) - x.mean((2, 3))).abs().max()) < 1e-14


def test_the_limits_of_a_blur() -> None:
    x = noise(2, 3, 5, 8, dtype=torch.float64)
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    assert torch.equal(gaussian_blur(x, 0.0), x)
    assert float((gaussian_blur(x, math.inf) - mean).abs().max()) < 1e-15
    assert float((gaussian_blur(x, 16.0) - mean).abs().max()) < 1e-8  # the last sigma that is summed, for 8 columns
    assert gaussian_blur(x.half(), 1.0).dtype == torch.float16
