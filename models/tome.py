"""Token merging (Bolya and Hoffman 2023, arXiv 2303.17604): self-attention over fewer, merged pixels."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ella_kd.models.blocks import TransformerBlock
from ella_kd.models.inside import Change, places_on
from ella_kd.models.patches import Patch
from ella_kd.models.unet import UNet


@dataclass(frozen=True)
class ToMe(Change):
    """Self-attention where ratio of the pixels are merged into others like them: `ToMe(0.5)`, the paper's setting.

    Of each 2 x 2 pixels one stays; of the rest those most like a staying one, in cosine, are averaged with it before
    the attention, and are given its answer after. places: the transformers; () for those of the finest level that has
    self-attention, as published. seed: chooses which of the four stays; None, always the upper left one. (The paper's
    code draws it anew at each call; here it is the same at each, so that the denoised depends on x and sigma alone.)
    Raises ValueError for a ratio outside [0, 0.75].
    """

    ratio: float = 0.5
    places: tuple[str, ...] = ()
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio <= 0.75:
            raise ValueError(f"ToMe merges a ratio of the pixels from 0 to 0.75, got {self.ratio}")

    def on(self, unet: UNet) -> "ToMe":
        return replace(self, places=places_on(unet, self.places))

    def at(self, level: float) -> Change | None:
        return super().at(level) if self.ratio else None

    @property
    def patches(self) -> tuple[Patch, ...]:
        return (MergedPixels(self.places, self.ratio, self.seed),)


@dataclass(frozen=True)
class MergedPixels(Patch):
    """What `ToMe` does in the places."""

    places: tuple[str, ...]
    ratio: float
    seed: int | None

    def __call__(self, block: TransformerBlock, x: Tensor, context: Tensor, mask: Tensor | None,
                 size: tuple[int, int]) -> Tensor:
        merge, part = merging(x, size, int(x.shape[1] * self.ratio), self.seed)
        merged = merge(block.norm1(x))
        x = x + part(block.attn1(merged, merged))
        x = x + block.cross_attention(x, context, mask)
        return x + block.feed_forward(x)


def merging(x: Tensor, size: tuple[int, int], fewer: int,
            seed: int | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """How pixels x [B, h * w, C] are merged into `fewer` less, and how the merged are given back to all of them."""
    source, target = split(size, seed, x.device)
    fewer = min(fewer, len(source))
    normed = x / x.norm(dim=-1, keepdim=True)
    likeness, nearest = (normed[:, source] @ normed[:, target].mT).max(-1)
    order = likeness.argsort(-1, descending=True)
    merged, kept = order[:, :fewer], order[:, fewer:]
    into = nearest.gather(1, merged)

    def merge(y: Tensor) -> Tensor:
        sources, targets = y[:, source], y[:, target]
        targets = targets.scatter_reduce(1, _wide(into, y), sources.gather(1, _wide(merged, y)), "mean")
        return torch.cat([sources.gather(1, _wide(kept, y)), targets], 1)

    def part(y: Tensor) -> Tensor:
        rest, targets = y.split([len(source) - fewer, len(target)], 1)
        whole = y.new_empty(len(y), len(source) + len(target), y.shape[2])
        whole[:, target] = targets
        whole = whole.scatter(1, _wide(source[kept], y), rest)
        return whole.scatter(1, _wide(source[merged], y), targets.gather(1, _wide(into, y)))

    return merge, part


def split(size: tuple[int, int], seed: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of the pixels of a map: those that may be merged, and those that stay, one of each whole 2 x 2."""
    h, w = size
    cells_h, cells_w = h // 2, w // 2
    rows, columns = torch.arange(cells_h, device=device)[:, None], torch.arange(cells_w, device=device)
    corner = torch.zeros(cells_h, cells_w, dtype=torch.int64, device=device) if seed is None else \
        _mixed(_mixed(_mixed(columns + seed) + rows)) % 4
    stay = torch.zeros(h * w, dtype=torch.bool, device=device)
    targets = ((2 * rows + corner // 2) * w + 2 * columns + corner % 2).flatten()
    stay[targets] = True
    return (stay.to(torch.uint8).argsort(stable=True)[:h * w - cells_h * cells_w], targets.sort().values)


def _mixed(x: Tensor) -> Tensor:
    """Integers that look drawn: the finaliser of a 32-bit hash, since a compiled network has no generator."""
    for shift, factor in ((16, 0x45D9F3B), (16, 0x45D9F3B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _wide(index: Tensor, like: Tensor) -> Tensor:
    """An index [B, n] of pixels for all of their channels."""
    return index[..., None].expand(*index.shape, like.shape[2])
