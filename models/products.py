"""Matrix products on a CPU as convolutions of oneDNN, for processors where those are the faster ones."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def capabilities() -> Mapping[str, Any]:
    """What torch says of this CPU; nothing where an older torch cannot tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def convolutions_multiply_faster() -> bool:
    """Whether this CPU has AVX-512 and is not Intel's: there MKL, torch's fp32 product, leaves AVX-512 unused.

    An AMD EPYC (Zen 5), 2 cores, the UNet's shapes: MKL 150 to 190 GFLOP/s, oneDNN's convolutions 240 to 430.
    """
    found = capabilities()
    return bool(found.get("avx512_f")) and not str(found.get("cpu_name", "Intel")).startswith("Intel")


def by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` as a 1x1 convolution over a picture one pixel high (one pixel wide is far slower)."""
    picture = x.reshape(1, -1, x.shape[-1]).transpose(1, 2).unsqueeze(2)  # channels_last as it lies in memory
    return F.conv2d(picture, weight[:, :, None, None], bias).squeeze(2).transpose(1, 2).reshape(*x.shape[:-1], -1)


class ConvLinear(nn.Module):
    """The linear layer it is made of, on the same parameters, by a convolution: x [..., C_in] -> [..., C_out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return by_convolution(x, self.weight, self.bias)
