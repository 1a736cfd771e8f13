"""The blocks of the latent-diffusion UNet."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ella_kd.models.attention import attend
from ella_kd.models.network import Patches
from ella_kd.models.parameters import zero_init
from ella_kd.models.partial import take

if TYPE_CHECKING:
    from ella_kd.models.image_prompts import Seen
    from ella_kd.models.patches import Patch


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions around the added time embedding, and a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, in_channels), nn.SiLU(),
                                       nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out_channels), nn.SiLU(), nn.Identity(),  # 2 was a dropout
                                        zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        self.skip_connection = (nn.Identity() if in_channels == out_channels
                                else nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor, emb: Tensor, apart: int = 1) -> Tensor:
        """apart: how many pixels apart the weights of its 3x3 convolutions stand."""
        more = self.emb_layers(emb)[:, :, None, None]
        if apart == 1:
            return self.skip_connection(x) + self.out_layers(self.in_layers(x) + more)
        *before, first = self.in_layers
        *between, second = self.out_layers
        h = dilated(first, nn.Sequential(*before)(x), apart) + more
        return self.skip_connection(x) + dilated(second, nn.Sequential(*between)(h), apart)


class Attention(nn.Module):
    """Attention from x [B, L, channels] to context [B, M, context_dim]; self-attention if the two are the same."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))
        self.attend = attend

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.to_q(x)
        return self.finish(q, self.attend(q, self.to_k(context), self.to_v(context), self.heads, mask))

    def finish(self, q: Tensor, found: Tensor) -> Tensor:
        """What queries [B, L, channels] found, as it is added; `models.image_prompts` adds what they find in pictures.
        """
        return self.to_out(found)


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """x [B, L, channels] -> the same shape; at_once: numbers of the widest temporary tensor, None without limit."""

    at_once: int | None = None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = channels * 8
        self.net = nn.Sequential(GEGLU(channels, channels * 4), nn.Identity(),  # 1 was a dropout
                                 nn.Linear(channels * 4, channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.at_once is None or x.shape[:-1].numel() * self.wide <= self.at_once:
            return self.net(x)
        parts = x.flatten(0, -2).split(max(1, self.at_once // self.wide))
        return torch.cat([self.net(part) for part in parts]).view_as(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text tokens, feed-forward; each on a LayerNorm, each added.

    The three methods return what is added, [B, L, channels] as x is: a Patch puts a block together anew from them.
    cross_only: the first attention looks at the text tokens too, and there is no self-attention (the x4 upscaler).
    number: which of its UNet's blocks it is, by which image prompts find it.
    """

    number = 0

    def __init__(self, channels: int, context_dim: int, heads: int, cross_only: bool = False) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.attn1 = Attention(channels, context_dim if cross_only else channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = x + (self.attn1(self.norm1(x), context, mask) if self.cross_only else self.self_attention(x))
        x = x + self.cross_attention(x, context, mask)
        return x + self.feed_forward(x)

    def self_attention(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        return self.attn1(normed, normed)

    def cross_attention(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        return self.attn2(self.norm2(x), context, mask)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks, one after another, over the pixels of a feature map [B, C, h, w]; they see the text tokens.

    place: the module's name in its UNet, by which patches call all of its blocks.
    """

    place = ""

    def __init__(self, channels: int, context_dim: int, heads: int, linear_proj: bool, depth: int = 1,
                 cross_only: bool = False) -> None:
        super().__init__()
        self.linear_proj, self.cross_only = linear_proj, cross_only
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)  # not 1e-5, as in ResBlock
        self.proj_in = nn.Linear(channels, channels) if linear_proj else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads, cross_only)
                                                 for _ in range(depth)])
        self.proj_out = zero_init(nn.Linear(channels, channels) if linear_proj else nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, patches: Patches = (),
                images: "Sequence[Seen]" = ()) -> Tensor:
        h = self.norm(x)
        h = self.proj_in(_tokens(h)) if self.linear_proj else _tokens(self.proj_in(h))
        patched = any(patch is not None and patch.of_place(self.place) is not None for _, patch in patches)
        for block in self.transformer_blocks:
            if patched:
                h = self._patched(block, h, context, mask, patches, (x.shape[2], x.shape[3]), images)
            else:
                h = _seeing(block, images)(h, context, mask)
        h = _image(self.proj_out(h), x) if self.linear_proj else self.proj_out(_image(h, x))
        return x + h

    def _patched(self, block: Any, x: Tensor, context: Tensor, mask: Tensor | None, patches: Patches,
                 size: tuple[int, int], images: "Sequence[Seen]") -> Tensor:
        """A block over x [B, h * w, C], where each row goes through its patch; plain neighbours go together."""
        here: list[tuple[Patch | None, int]] = []
        for rows, patch in patches:
            patch = patch and patch.of_place(self.place)
            if patch is None and here and here[-1][0] is None:  # a patch may look from row to row of one condition
                rows += here.pop()[1]
            here.append((patch, rows))
        done: list[Tensor] = []
        start = 0
        for patch, rows in here:
            part = slice(start, start := start + rows)
            args = x[part], context[part], None if mask is None else mask[part]
            shown: Any = take(images, range(part.start, part.stop)) if images else None
            seeing = _seeing(block, shown or ())
            done.append(seeing(*args) if patch is None else patch(seeing, *args, size))
            if done[-1].shape != x[part].shape:
                raise ValueError(f"a patch must return the shape of its x {list(x[part].shape)}: {patch} returned "
                                 f"{list(done[-1].shape)}")
        return torch.cat(done) if len(done) > 1 else done[0]


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, wider: int = 1, apart: int = 1) -> Tensor:
        """wider: how many times stride, padding and dilation are what they are otherwise; apart: as in ResBlock."""
        return self.op(x) if wider * apart == 1 else dilated(self.op, x, wider * apart, 2 * wider)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size, apart: int = 1) -> Tensor:
        x = F.interpolate(x, size=size, mode="nearest")  # the skip's size: an odd one was rounded up
        return self.conv(x) if apart == 1 else dilated(self.conv, x, apart)


class Layers(nn.Sequential):
    """Layers in a row, each given what it takes beside x; size: what an Upsample must reach; wider: of a Downsample;
    apart: of all 3x3 convolutions."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, mask: Tensor | None,  # type: ignore[override]
                patches: Patches = (), size: torch.Size | None = None, images: "Sequence[Seen]" = (),
                wider: int = 1, apart: int = 1) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb, apart)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, mask, patches, images)
            elif isinstance(layer, Upsample):
                x = layer(x, size, apart)
            elif isinstance(layer, Downsample):
                x = layer(x, wider, apart)
            else:
                x = layer(x)
        return x


def _seeing(block: Any, images: "Sequence[Seen]") -> Any:
    """The block, whose cross-attention sees these pictures too."""
    if not images:
        return block
    from ella_kd.models.image_prompts import Seeing

    return Seeing(block, images)


def dilated(conv: Any, x: Tensor, apart: int, stride: int = 1) -> Tensor:
    """A 3x3 convolution whose weights stand so many pixels apart, padded by as many."""
    padding = apart
    if conv.padding_mode != "zeros":  # seamless
        x, padding = F.pad(x, [apart] * 4, conv.padding_mode), 0
    return F.conv2d(x, conv.weight, conv.bias, stride, padding, apart)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """x [B, C, h, w] at the height and width of `like`, bicubic; itself where it has them."""
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, like.shape[2:], mode="bicubic")


def _tokens(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h * w, C]"""
    return rearrange(x, "b c h w -> b (h w) c")


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, h * w, C] -> [B, C, h, w]"""
    return rearrange(tokens, "b (h w) c -> b c h w", h=like.shape[2])
