"""Patches: what some rows of a batch do differently in the UNet's transformer blocks, for one call.

`unet(x, t, context, patches=[(4, None), (4, IdentityAttention(("middle_block.1",)))])` runs eight rows, the last
four with the patch. A patch is an argument, not a change of the network: nothing has to be undone, and an exception
leaves nothing behind. `unet.places` lists the blocks it may name. One of your own is a frozen dataclass:

    @dataclass(frozen=True)
    class FadedText(Patch):
        places: tuple[str, ...]
        factor: float = 0.5

        def __call__(self, block, x, context, mask, size):
            x = x + block.self_attention(x)
            x = x + self.factor * block.cross_attention(x, context, mask)
            return x + block.feed_forward(x)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ella_kd.models.attention import attend
from ella_kd.models.blocks import Attention, TransformerBlock
from ella_kd.models.network import Patches


class Patch(ABC):
    """What rows do in place of the transformer blocks they name; a value: frozen, hashable, equal if its fields are.

    A place is a transformer of the UNet: where it is several blocks deep (SDXL), each of them is replaced.
    """

    places: tuple[str, ...]

    @abstractmethod
    def __call__(self, block: TransformerBlock, x: Tensor, context: Tensor, mask: Tensor | None,
                 size: tuple[int, int]) -> Tensor:
        """Replaces `block(x, context, mask)`: x [b, h * w, C], pixels row by row; size: (h, w) -> [b, h * w, C].

        context [b, L, D] and mask [b, L] or None are the text tokens of the same rows.
        """

    def of_place(self, place: str) -> "Patch | None":
        """What holds in the blocks of one place."""
        return self if place in self.places else None


class SelfAttentionPatch(Patch):
    """A patch that only replaces self-attention."""

    @abstractmethod
    def attention(self, attn: Attention, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Replaces `attn(x, x)`: x [b, h * w, C], normalised -> what is added, [b, h * w, C]."""

    def __call__(self, block: TransformerBlock, x: Tensor, context: Tensor, mask: Tensor | None,
                 size: tuple[int, int]) -> Tensor:
        x = x + self.attention(block.attn1, block.norm1(x), size)
        x = x + block.cross_attention(x, context, mask)
        return x + block.feed_forward(x)


@dataclass(frozen=True)
class Several(Patch):
    """Several patches in one row; where two name the same place, the first of them holds there."""

    patches: tuple[Patch, ...]

    @property
    def places(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(place for patch in self.patches for place in patch.places))

    def of_place(self, place: str) -> Patch | None:
        return next((found for patch in self.patches if (found := patch.of_place(place)) is not None), None)

    def __call__(self, block: TransformerBlock, x: Tensor, context: Tensor, mask: Tensor | None,
                 size: tuple[int, int]) -> Tensor:
        raise TypeError("which of several patches holds is a matter of the place: ask of_place(place)")


def for_all(patches: Patches, more: Sequence[Patch], rows: int) -> Patches:
    """The patches of a call of so many rows, where each row has these too; a row's own comes first."""
    if not more:
        return patches
    each: Sequence[tuple[int, Any]] = patches or [(rows, None)]
    found: list[tuple[int, Any]] = [(n, Several(tuple(more) if own is None else (own, *more))) for n, own in each]
    return found


@dataclass(frozen=True)
class IdentityAttention(SelfAttentionPatch):
    """Every pixel attends to itself alone: perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377)."""

    places: tuple[str, ...]

    def attention(self, attn: Attention, x: Tensor, size: tuple[int, int]) -> Tensor:
        return attn.to_out(attn.to_v(x))


@dataclass(frozen=True)
class BlurredQueries(SelfAttentionPatch):
    """Queries blurred over the feature map: smoothed energy guidance (Hong 2024, arXiv 2408.00760).

    sigma: of the Gaussian, in pixels of the feature map; 0 changes nothing, inf gives every pixel the mean query.
    The author's code cuts the kernel to the map and pads without repeating the edge, so that a large sigma does not
    tend to the mean; here it does (`gaussian_blur`), as the paper has it. Raises ValueError for a sigma below 0.
    """

    places: tuple[str, ...]
    sigma: float = math.inf

    def __post_init__(self) -> None:
        _check_sigma(self.sigma)

    def attention(self, attn: Attention, x: Tensor, size: tuple[int, int]) -> Tensor:
        grid = rearrange(attn.to_q(x), "b (h w) c -> b c h w", h=size[0])
        q = rearrange(gaussian_blur(grid, self.sigma), "b c h w -> b (h w) c")
        return attn.to_out(attend(q, attn.to_k(x), attn.to_v(x), attn.heads))


@dataclass(frozen=True)
class SkipAttention(Patch):
    """The blocks without their self-attention."""

    places: tuple[str, ...]

    def __call__(self, block: TransformerBlock, x: Tensor, context: Tensor, mask: Tensor | None,
                 size: tuple[int, int]) -> Tensor:
        x = x + block.cross_attention(x, context, mask)
        return x + block.feed_forward(x)


@dataclass(frozen=True)
class SkipBlock(Patch):
    """The blocks left out: skip layer guidance."""

    places: tuple[str, ...]

    def __call__(self, block: TransformerBlock, x: Tensor, context: Tensor, mask: Tensor | None,
                 size: tuple[int, int]) -> Tensor:
        return x


@dataclass(frozen=True, eq=False)
class Recorder(SelfAttentionPatch):
    """Keeps how much attention the pixels of one place receive, in the first block of it where there are several
    (SDXL), and changes nothing; made for one call, and no value: two differ.

    After the call `received` is [b, 1, h, w] fp32 or fp64: what all queries together give a pixel, mean of the heads, 1
    on average. Its size is the place's; of a call that was made in parts (tiles, rows of several networks), each with a
    recorder of its own (`in_part`), the latents'. Raises ValueError if it is read before, or after several calls.
    """

    place: str
    _found: list[tuple[Attention | None, Tensor]] = field(default_factory=list, init=False, repr=False)

    @property
    def places(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.place,)

    @property
    def received(self) -> Tensor:
        if len(self._found) != 1:
            raise ValueError("a recorder holds what one plain condition attends to in one call of the UNet, and this "
                             f"one saw {len(self._found)}: a composition of prompts has one for each")
        return self._found[0][1]

    def attention(self, attn: Attention, x: Tensor, size: tuple[int, int]) -> Tensor:
        if all(attn is first for first, _ in self._found):
            q, k = (rearrange(y, "b l (h d) -> b h l d", h=attn.heads) for y in (attn.to_q(x), attn.to_k(x)))
            precise = torch.promote_types(x.dtype, torch.float32)
            weights = (q.to(precise) @ k.to(precise).mT / math.sqrt(q.shape[-1])).softmax(-1)
            self._found.append((attn, weights.mean(1).sum(1).unflatten(1, size)[:, None]))
        return attn(x, x)

    def keep(self, received: Tensor) -> None:
        """What was put together of the parts of a call."""
        self._found.append((None, received))


def in_part(patches: Patches) -> tuple[Patches, dict[Any, Recorder]]:
    """The patches of a part of a call, where recorders are the part's own; and these by the whole call's."""
    each: Sequence[tuple[int, Any]] = patches
    own = {patch: Recorder(patch.place) for _, patch in each if isinstance(patch, Recorder)}
    return [(n, own.get(patch, patch)) for n, patch in each], own


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """x [B, C, h, w] blurred with a Gaussian of standard deviation sigma pixels; inf: the mean of each channel.

    At its edges the picture goes on as its mirror image, the edge pixels twice: with this padding the mean of a channel
    is kept for every sigma, and the limit for a large sigma is the mean. Raises ValueError for a sigma below 0.
    """
    _check_sigma(sigma)
    if sigma == 0:
        return x
    rows, columns = (_blur_matrix(n, sigma, x) for n in x.shape[2:])
    return rows @ x @ columns.mT


def _blur_matrix(n: int, sigma: float, like: Tensor) -> Tensor:
    """[n, n], symmetric, rows and columns sum to 1: the Gaussian over n pixels, mirrored until nothing is left."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if sigma > 2 * n:  # the mean, to 3e-9: the slowest cosine fades with exp(-(pi sigma / n)^2 / 2)
        return torch.full((n, n), 1 / n, dtype=like.dtype, device=like.device)
    radius = math.ceil(6 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=like.device)
    weights = (-0.5 * (offsets.to(dtype) / sigma) ** 2).exp()
    mirrored = (torch.arange(n, device=like.device)[:, None] + offsets) % (2 * n)
    mirrored = torch.minimum(mirrored, 2 * n - 1 - mirrored)
    matrix = torch.zeros(n, n, dtype=dtype, device=like.device)
    return matrix.scatter_add(1, mirrored, (weights / weights.sum()).expand(n, -1)).to(like.dtype)


def _check_sigma(sigma: float) -> None:
    if not sigma >= 0:
        raise ValueError(f"a blur needs sigma >= 0, in pixels, inf for the mean; got {sigma}")
