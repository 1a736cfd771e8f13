"""What the networks share: the timestep sinusoid, multi-head attention, and reading an architecture off shapes."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
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

    mask [B, Lk]: bool, True at keys that are seen; or floats w >= 0, the factor by which a key's share of the attention
    is multiplied: softmax(q k / sqrt(d) + log w), 0 unseen, 1 plain. None: all are plain. A row of zeros gives NaN.
    """
    q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=heads) for x in (q, k, v))
    bias = None if mask is None else (mask if mask.dtype == torch.bool else log_weights(mask, q.dtype))[:, None, None]
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), "b h l d -> b l (h d)")


def log_weights(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention bias log w of weights w >= 0; the logarithm is taken in fp32 at least, then rounded to dtype."""
    return weights.to(torch.promote_types(weights.dtype, torch.float32)).log().to(dtype)


def check_mask(mask: Tensor | None, keys: Tensor) -> None:
    """Raises ValueError unless mask is None or fits keys [B, L, D]: [B, L], bool or floats >= 0 (see `attend`).

    The values of floats are read on a CPU only: elsewhere that would wait for the device.
    """
    if mask is None:
        return
    if mask.shape != keys.shape[:2] or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(f"mask must be {list(keys.shape[:2])}, bool (True at keys that are seen) or floats (the "
                         f"weights of the keys), got {mask.dtype} {list(mask.shape)}")
    if mask.is_floating_point() and mask.device.type == "cpu" and not ((mask >= 0) & (mask < math.inf)).all():
        raise ValueError("the weights in a mask must be finite and at least 0 (0 unseen, 1 plain attention), got "
                         f"{mask.min().item():g} to {mask.max().item():g}")


def zero_init(layer: nn.Module) -> nn.Module:
    """The same layer with its parameters at zero: a residual branch that starts as the identity (LDM's zero_module)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def sharing(module: M) -> M:
    """Another module on the same tensors, to be changed or compiled while this one stays as it is."""
    return copy.deepcopy(module, {id(x): x for x in [*module.parameters(), *module.buffers()]})


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
