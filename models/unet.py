"""The latent-diffusion UNet of Stable Diffusion 1.x and 2.x, with the tensor names of its LDM checkpoints."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ella_kd.models.layers import Shapes, attend, count_of, shape_of, timestep_embedding, zero_init


@dataclass(frozen=True)
class UNetConfig:
    """What a UNet is made of; the defaults are Stable Diffusion 1.5.

    channel_mult and attention have one entry per level, the finest first. Give `num_heads` (SD1.x: 8 heads at every
    level) or `head_dim` (SD2.x: heads of 64 channels), the other is None. linear_proj: the transformer's proj_in and
    proj_out are linear layers (SD2.x) instead of 1x1 convolutions. Raises ValueError for a contradiction.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)
    context_dim: int = 768
    num_heads: int | None = 8
    head_dim: int | None = None
    linear_proj: bool = False

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.channel_mult):
            raise ValueError(f"attention needs one entry per level: channel_mult has {len(self.channel_mult)}, "
                             f"attention has {len(self.attention)}")
        if (self.num_heads is None) == (self.head_dim is None):
            raise ValueError(f"give num_heads or head_dim, not both: got {self.num_heads} and {self.head_dim}")
        for mult in self.channel_mult:
            channels = mult * self.model_channels
            if channels % 32 or channels % (self.num_heads or self.head_dim or 1):
                raise ValueError(f"{channels} channels must be a multiple of 32 (GroupNorm) and of the heads "
                                 f"(num_heads={self.num_heads}, head_dim={self.head_dim})")

    def heads(self, channels: int) -> int:
        return self.num_heads or channels // (self.head_dim or channels)

    @classmethod
    def from_shapes(cls, shapes: Shapes, num_heads: int | None = None, head_dim: int | None = None) -> "UNetConfig":
        """The configuration read off a checkpoint's shapes, names without `model.diffusion_model.`.

        The heads are not in the shapes: without an argument, 8 heads if proj_in is a convolution (SD1.x), heads of 64
        channels if it is linear (SD2.x). Raises ValueError naming the tensor that is missing to tell.
        """
        model_channels, in_channels = shape_of(shapes, "input_blocks.0.0.weight", 4)[:2]
        levels: list[list[tuple[int, bool]]] = [[]]  # per level, per res block: channels, followed by attention?
        for n in range(1, count_of(shapes, "input_blocks")):
            if f"input_blocks.{n}.0.op.weight" in shapes or f"input_blocks.{n}.0.op.bias" in shapes:
                levels.append([])
            else:
                channels = shape_of(shapes, f"input_blocks.{n}.0.out_layers.3.weight", 4)[0]
                levels[-1].append((channels, any(name.startswith(f"input_blocks.{n}.1.") for name in shapes)))
        if not all(levels):
            raise ValueError("a level of input_blocks has no res block")
        linear_proj = len(shapes.get("middle_block.1.proj_in.weight", ())) == 2
        if num_heads is None and head_dim is None:
            num_heads, head_dim = (None, 64) if linear_proj else (8, None)
        return cls(in_channels, shape_of(shapes, "out.2.weight", 4)[0], model_channels,
                   tuple(blocks[0][0] // model_channels for blocks in levels), len(levels[0]),
                   tuple(blocks[0][1] for blocks in levels),
                   shape_of(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1],
                   num_heads, head_dim, linear_proj)


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

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Attention from x [B, L, channels] to context [B, M, context_dim]; self-attention if the two are the same."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads, mask))


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, channels * 4), nn.Identity(),  # 1 was a dropout
                                 nn.Linear(channels * 4, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text tokens, feed-forward; each on a LayerNorm, each added."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """One transformer block over the pixels of a feature map [B, C, h, w], which sees the text tokens."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.linear_proj = config.linear_proj
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)  # not 1e-5, as in ResBlock
        self.proj_in = nn.Linear(channels, channels) if config.linear_proj else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([
            TransformerBlock(channels, config.context_dim, config.heads(channels))])
        self.proj_out = zero_init(nn.Linear(channels, channels) if config.linear_proj
                                  else nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        h = self.norm(x)
        h = self.proj_in(_tokens(h)) if self.linear_proj else _tokens(self.proj_in(h))
        h = self.transformer_blocks[0](h, context, mask)
        h = _image(self.proj_out(h), x) if self.linear_proj else self.proj_out(_image(h, x))
        return x + h


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # the skip's size: an odd one was rounded up


class Stage(nn.Sequential):
    """Layers in a row, each given what it takes beside x; size: what an Upsample must reach."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, mask: Tensor | None,  # type: ignore[override]
                size: torch.Size | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, mask)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """The denoising network of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.2).

    `unet(x, t, context, mask=None)`: x [B, in_channels, h, w], any h and w; t [B], the timestep, fractional welcome;
    context [B, L, context_dim], the text tokens; mask [B, L] bool, True at real tokens, None if all are real ->
    [B, out_channels, h, w]. x and context have the network's dtype, t stays fp32.
    Raises ValueError for a wrong shape.
    """

    def __init__(self, config: UNetConfig = UNetConfig()) -> None:
        super().__init__()
        self.config = config
        channels = config.model_channels
        emb = channels * 4
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, channels, 3, padding=1))])
        skips = [channels]
        ch = channels
        for level, mult in enumerate(config.channel_mult):
            if level:
                self.input_blocks.append(Stage(Downsample(ch)))
                skips.append(ch)
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [ResBlock(ch, mult * channels, emb)]
                ch = mult * channels
                if config.attention[level]:
                    layers.append(SpatialTransformer(ch, config))
                self.input_blocks.append(Stage(*layers))
                skips.append(ch)

        self.middle_block = Stage(ResBlock(ch, ch, emb), SpatialTransformer(ch, config), ResBlock(ch, ch, emb))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = [ResBlock(ch + skips.pop(), mult * channels, emb)]
                ch = mult * channels
                if config.attention[level]:
                    layers.append(SpatialTransformer(ch, config))
                if level and i == config.num_res_blocks:
                    layers.append(Upsample(ch))
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(),
                                 zero_init(nn.Conv2d(ch, config.out_channels, 3, padding=1)))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, x: Tensor, t: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        self._check(x, t, context, mask)
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(self.dtype))
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb, context, mask)
            skips.append(x)
        x = self.middle_block(x, emb, context, mask)
        for stage in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, emb, context, mask, skips[-1].shape[2:] if skips else None)
        return self.out(x)

    def _check(self, x: Tensor, t: Tensor, context: Tensor, mask: Tensor | None) -> None:
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise ValueError(f"the UNet takes x [B, {config.in_channels}, h, w], got {list(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"the UNet takes one timestep per sample: x has {x.shape[0]}, t has {list(t.shape)}")
        if context.ndim != 3 or context.shape[0] != x.shape[0] or context.shape[2] != config.context_dim:
            raise ValueError(f"the UNet takes context [{x.shape[0]}, L, {config.context_dim}], "
                             f"got {list(context.shape)}")
        if mask is not None and (mask.shape != context.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(f"mask must be bool {list(context.shape[:2])}, got {mask.dtype} {list(mask.shape)}")


def _tokens(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h * w, C]"""
    return rearrange(x, "b c h w -> b (h w) c")


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, h * w, C] -> [B, C, h, w]"""
    return rearrange(tokens, "b (h w) c -> b c h w", h=like.shape[2])
