"""What the UNet and the connector share: the timestep sinusoid and multi-head attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """The sinusoid of a diffusion timestep, `[cos | sin]`, max period 10,000 (LDM, and ELLA's flip_sin_to_cos).

    t [B], fractional values welcome -> [B, channels] fp32, always: at t near 1000 fp16 steps by 0.5. The frequencies are
    computed in fp32, exactly as the published models were trained: in float64 they differ by 6e-5 at t = 999.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention: q [B, Lq, heads * d], k and v [B, Lk, heads * d] -> [B, Lq, heads * d].

    mask [B, Lk] bool, True at keys that are seen; None: all are. A row without any True gives NaN.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    seen = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)


def zero_init(layer: nn.Module) -> nn.Module:
    """The same layer with its parameters at zero: a residual branch that starts as the identity (LDM's zero_module)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
