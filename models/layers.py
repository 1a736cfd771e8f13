"""What the networks share: the timestep sinusoid, multi-head attention, and reading an architecture off shapes."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Shapes = Mapping[str, Sequence[int]]  # tensor name -> shape


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """The sinusoid of a diffusion timestep, `[cos | sin]`, max period 10,000 (LDM, and ELLA's flip_sin_to_cos).

    t [B], fractional values welcome -> [B, channels] fp32, always: near t = 1000 fp16 steps by 0.5. The frequencies
    are fp32 too, as the published models were trained: float64 ones move the result by 6e-5 at t = 999.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention: q [B, Lq, heads * d], k and v [B, Lk, heads * d] -> [B, Lq, heads * d].

    mask [B, Lk] bool, True at keys that are seen; None: all are. A row without any True gives NaN.
    """
    q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=heads) for x in (q, k, v))
    seen = None if mask is None else mask[:, None, None, :]
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=seen), "b h l d -> b l (h d)")


def zero_init(layer: nn.Module) -> nn.Module:
    """The same layer with its parameters at zero: a residual branch that starts as the identity (LDM's zero_module)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def shape_of(shapes: Shapes, name: str, ndim: int) -> Sequence[int]:
    """A shape that tells the architecture. Raises ValueError if the tensor is missing or not of ndim dimensions."""
    if name not in shapes:
        raise ValueError(f"tensor {name} is missing")
    if len(shapes[name]) != ndim:
        raise ValueError(f"tensor {name} must have {ndim} dimensions, its shape is {list(shapes[name])}")
    return shapes[name]


def count_of(shapes: Shapes, prefix: str) -> int:
    """How many of `prefix.0.*`, `prefix.1.*`, ... there are, without a gap."""
    n = 0
    while any(name.startswith(f"{prefix}.{n}.") for name in shapes):
        n += 1
    return n
