"""Multi-head attention with a mask over the keys, and the one check of masks."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


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


def check_mask(mask: Tensor | None, keys: Tensor, read: bool = True) -> None:
    """Raises ValueError unless mask is None or fits keys [B, L, D]: [B, L], bool or floats >= 0 (see `attend`).

    read: whether the values of floats are looked at, which breaks the graph of a compiled network; on a CPU only:
    elsewhere it would wait for the device.
    """
    if mask is None:
        return
    if mask.shape != keys.shape[:2] or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(f"mask must be {list(keys.shape[:2])}, bool (True at keys that are seen) or floats (the "
                         f"weights of the keys), got {mask.dtype} {list(mask.shape)}")
    if read and mask.is_floating_point() and mask.device.type == "cpu" and not ((mask >= 0) & (mask < math.inf)).all():
        raise ValueError("the weights in a mask must be finite and at least 0 (0 unseen, 1 plain attention), got "
                         f"{mask.min().item():g} to {mask.max().item():g}")
