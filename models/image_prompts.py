"""Pictures that the UNet's cross-attentions see beside the text (IP-Adapter), for rows that want it, in one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ella_kd.models.blocks import Attention, TransformerBlock
from ella_kd.models.devices import upload
from ella_kd.models.partial import ForRows, add_to_rows, rows_of


class KeysAndValues(Protocol):
    """The projections of one cross-attention: to_k_ip and to_v_ip, each a module."""

    to_k_ip: Any
    to_v_ip: Any


class ImageAdapter(Protocol):
    """What has projections for each transformer block of a UNet."""

    name: str

    def of_block(self, number: int) -> KeysAndValues:
        """Those of the block of this number."""
        ...

    def check(self, unet: Any) -> None:
        """Raises ValueError for a UNet of another kind."""


@dataclass(frozen=True, eq=False)
class ImagePrompt(ForRows):
    """Pictures that some rows of a context see: out = to_out(attn(q, K, V) + strength * attn(q, K_ip, V_ip)).

    tokens: of each row, what the adapter makes of its pictures, [L, D].
    """

    columns: ClassVar[tuple[str, ...]] = ("tokens", "strengths")
    adapter: ImageAdapter
    tokens: tuple[Tensor, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return super().key, self.tokens[0].shape

    def check(self, unet: Any) -> None:
        """Raises ValueError for a UNet that the adapter was not made for, or on another device."""
        here, there = self.tokens[0].device, next(unet.parameters()).device
        if here != there:
            raise ValueError(f"the image prompt of {self.adapter.name} is on {here} and the UNet on {there}: load the "
                             f"adapter there, or move it before cond.with_image, adapter.to({str(there)!r})")
        self.adapter.check(unet)


@dataclass(frozen=True, eq=False)
class Seen(ForRows):
    """An image prompt made ready for a call of the UNet: tokens [n, L, D], and strengths [n, 1, 1], a tensor, so that
    a compiled network is the same for all of them."""

    columns: ClassVar[tuple[str, ...]] = ("strengths", "tokens")
    adapter: ImageAdapter
    tokens: Tensor

    def found(self, q: Tensor, attn: Any, number: int) -> Tensor:
        """What the queries [n, l, C] of these rows find in their pictures."""
        layer = self.adapter.of_block(number)
        k, v = (to(self.tokens).to(q.dtype) for to in (layer.to_k_ip, layer.to_v_ip))
        return attn.attend(q, k, v, attn.heads) * self.strengths


def ready(images: Sequence[ImagePrompt], unet: Any) -> tuple[Seen, ...]:
    """Image prompts as a UNet's blocks take them. Raises ValueError for one that does not fit the UNet."""
    found = []
    for image in images:
        image.check(unet)
        tokens = torch.stack(image.tokens)
        strengths = upload(torch.tensor(image.strengths, dtype=unet.dtype)[:, None, None], tokens.device)
        found.append(Seen(image.rows, strengths, image.adapter, tokens))
    return tuple(found)


class SeeingAttention:
    """A cross-attention that sees pictures too, for one call; all else is the attention's own."""

    def __init__(self, attn: Attention, number: int, images: Sequence[Seen]) -> None:
        self.attn, self.number, self.images = attn, number, images

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attn, name)

    def finish(self, q: Tensor, found: Tensor) -> Tensor:
        for image in self.images:
            found = add_to_rows(found, image.rows, image.found(rows_of(q, image.rows), self.attn, self.number))
        return self.attn.to_out(found)

    def __call__(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        me: Any = self
        return Attention.forward(me, x, context, mask)


class Seeing:
    """A transformer block whose cross-attention sees pictures too, for one call; it is what patches are given."""

    def __init__(self, block: TransformerBlock, images: Sequence[Seen]) -> None:
        self.block, self.attn2 = block, SeeingAttention(block.attn2, block.number, images)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def cross_attention(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        return self.attn2(self.block.norm2(x), context, mask)

    def __call__(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        me: Any = self
        return TransformerBlock.forward(me, x, context, mask)
