"""Networks rearranged for inference on a CPU."""

from dataclasses import replace
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from ella_kd.models.around import Around
from ella_kd.models.attention import attend
from ella_kd.models.blocks import Attention, FeedForward
from ella_kd.models.parameters import Recipe, sharing
from ella_kd.models.products import ConvLinear, capabilities, convolutions_multiply_faster
from ella_kd.models.winograd import WinogradConv2d, is_plain_3x3, tile

M = TypeVar("M", bound=nn.Module)
AT_ONCE = 1 << 22  # numbers of a temporary tensor: larger ones come with page faults, each time anew


def fast_on_cpu(network: M) -> M:
    """The same network, a UNet or the connector, for inference on a CPU: what is faster there, and takes more memory.

    fp32: large 3x3 convolutions by Winograd; linear layers by oneDNN where MKL, which torch takes, does not use the
    CPU's AVX-512 (AMD). bf16: attention in blocks of two matrix products, if the CPU multiplies bf16 without tiles
    (AVX512_BF16 and no AMX); its logits are rounded to bf16. Both: feed-forward layers a part of the tokens at a time.
    The network given stays as it is and is kept, so that a LoRA finds its weights; they are shared with it but for
    Winograd's: of Stable Diffusion 1.5 those are 4.3 GB beside the plain 2.1. The answer differs by 4e-6 relative in
    fp32.
    Of a network made of networks each one is. Raises ValueError for a network that is not fp32 or bf16 on a CPU.
    """
    if isinstance(network, Around):
        return network.each(fast_on_cpu)
    weight = next(network.parameters())
    if weight.dtype not in (torch.float32, torch.bfloat16) or weight.device.type != "cpu":
        raise ValueError("fast_on_cpu takes a network in float32 or bfloat16 on the CPU, got "
                         f"{weight.dtype} on {weight.device}")
    recipe = Recipe.of(network)
    return replace(recipe, finish=(*recipe.finish, rearranged)).on(rearranged(sharing(network)))


def rearranged(network: M) -> M:
    """The network itself, its layers exchanged."""
    fp32 = next(network.parameters()).dtype == torch.float32
    for module in list(network.modules()):
        if isinstance(module, FeedForward):
            module.at_once = AT_ONCE
        elif isinstance(module, Attention) and not fp32 and _multiplies_bf16():
            module.attend = attend_in_blocks
        for name, layer in module.named_children():
            if fp32 and is_plain_3x3(layer) and min(layer.in_channels, layer.out_channels) >= 128:
                setattr(module, name, WinogradConv2d(layer, tile(layer)))
            elif fp32 and type(layer) is nn.Linear and convolutions_multiply_faster():
                setattr(module, name, ConvLinear(layer))
    return network


def _multiplies_bf16() -> bool:
    found = capabilities()
    return bool(found.get("avx512_bf16")) and not found.get("amx_tile")


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """`attend`, as two matrix products around a softmax over a few heads, or a few queries of a head, at a time.

    Beside torch's kernel: 4096 queries and keys, 16 heads of 40 channels, bf16, 2 cores of an AMD EPYC (Zen 5): 170 ms
    against 320. The logits have q's dtype, so bf16 rounds them: an error of 4.5e-3 where torch's is 2.3e-3.
    """
    if mask is not None:
        return attend(q, k, v, heads, mask)
    scale, nothing = (q.shape[-1] // heads) ** -0.5, q.new_zeros(1)
    rows = [rearrange(x, "b l (h d) -> (b h) l d", h=heads) for x in (q, k, v)]
    queries, keys = q.shape[1], k.shape[1]
    together = max(1, AT_ONCE // (queries * keys))
    done = []
    for some, key, value in zip(*(x.split(together) for x in rows), strict=True):
        parts = some.split(max(1, AT_ONCE // keys), dim=1)
        logits = (torch.baddbmm(nothing, part, key.mT, beta=0, alpha=scale) for part in parts)
        done.append(torch.cat([part.softmax(-1) @ value for part in logits], dim=1))
    return rearrange(torch.cat(done), "(b h) l d -> b l (h d)", h=heads)
