"""Winograd's convolution is the plain one, at every size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ella_kd.models import winograd
from ella_kd.models.winograd import WinogradConv2d
from tiny import noise, randomised, relative


@pytest.mark.parametrize("scratch", [1, 3000, 1 << 23])  # a row at a time, a few rows of a picture, all together
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 9), (13, 6)])
@pytest.mark.parametrize("m", [2, 4])
def test_equals_the_plain_convolution(m: int, size: tuple[int, int], scratch: int,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "SCRATCH", scratch)
    conv = randomised(nn.Conv2d(6, 10, 3, padding=1, bias=m == 2), 0).double()
    x = noise(3, 6, *size, dtype=torch.float64)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        got = WinogradConv2d(conv, m)(given)
        assert got.stride(1) == 1  # channels_last, and stays so
        assert relative(got, conv(x)) < 1e-14


@pytest.mark.parametrize(("m", "bound"), [(2, 8e-7), (4, 6e-6)])
def test_its_rounding_is_as_stated(m: int, bound: float) -> None:
    conv = randomised(nn.Conv2d(320, 32, 3, padding=1), 0)
    x = noise(1, 320, 16, 16)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)  # type: ignore[union-attr]
    assert float((WinogradConv2d(conv, m)(x) - exact).norm() / exact.norm()) < bound


def test_large_layers_take_small_tiles() -> None:
    with torch.device("meta"):
        tiles = [winograd.tile(nn.Conv2d(a, b, 3)) for a, b in ((640, 640), (1920, 640), (1280, 1280), (2560, 1280))]
    assert tiles == [4, 4, 2, 2]


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 0}, {"kernel_size": 1, "padding": 0}, {"groups": 2},
                                     {"dilation": 2}])
def test_other_layers_are_refused(options: dict[str, int]) -> None:
    conv = nn.Conv2d(4, 4, **{"kernel_size": 3, "padding": 1, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stride 1 and padding 1"):
        WinogradConv2d(conv, 4)
