"""The latent-diffusion UNet of Stable Diffusion 1.x and 2.x, with the tensor names of its LDM checkpoints."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ella_kd.models.blocks import Downsample, ResBlock, SpatialTransformer, Stage, Upsample
from ella_kd.models.context import Context
from ella_kd.models.network import Levels, Patches
from ella_kd.models.parameters import zero_init
from ella_kd.models.shapes import Shapes, count_of, shape_of
from ella_kd.models.timestep import timestep_embedding


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
        heads = self.num_heads if self.head_dim is None else self.head_dim
        if type(heads) is not int or heads < 1:
            raise ValueError(f"num_heads and head_dim are whole numbers of at least 1, got {heads!r}")
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


class UNet(nn.Module):
    """The denoising network of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.2).

    `unet(x, t, context, patches=())`, a `models.network.Network`: x [B, in_channels, h, w], less the channels that the
    context has, any h and w; t [B], the timestep, fractional welcome; context, a Context of tokens [B, L, context_dim]
    and perhaps a mask, or bare tokens -> [B, out_channels, h, w]. x and context have the network's dtype, t stays fp32.

    patches: what rows of the batch do differently in this one call, `(rows, Patch or None)` in the order of the batch,
    `models.patches`; a patch names its transformer blocks, those in `places`. Nothing of it stays behind.
    Raises ValueError for a wrong shape, a place that does not exist, and rows that are not the batch.
    """

    def __init__(self, config: UNetConfig = UNetConfig()) -> None:
        super().__init__()
        self.config = config
        channels = config.model_channels
        emb = channels * 4

        def transformer(ch: int) -> SpatialTransformer:
            return SpatialTransformer(ch, config.context_dim, config.heads(ch), config.linear_proj)

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
                    layers.append(transformer(ch))
                self.input_blocks.append(Stage(*layers))
                skips.append(ch)

        self.middle_block = Stage(ResBlock(ch, ch, emb), transformer(ch), ResBlock(ch, ch, emb))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = [ResBlock(ch + skips.pop(), mult * channels, emb)]
                ch = mult * channels
                if config.attention[level]:
                    layers.append(transformer(ch))
                if level and i == config.num_res_blocks:
                    layers.append(Upsample(ch))
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(),
                                 zero_init(nn.Conv2d(ch, config.out_channels, 3, padding=1)))
        for name, module in self.named_modules():
            if isinstance(module, SpatialTransformer):
                module.place = name

    @property
    def places(self) -> tuple[str, ...]:
        """The names of the transformer blocks that a patch can replace, from input to output: "middle_block.1", ..."""
        return tuple(module.place for module in self.modules() if isinstance(module, SpatialTransformer))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def in_channels(self) -> int:
        return self.config.in_channels

    @property
    def out_channels(self) -> int:
        return self.config.out_channels

    def at(self, levels: Levels) -> "UNet":
        """Itself: it is the same at every noise level."""
        return self

    def forward(self, x: Tensor, t: Tensor, context: Context | Tensor, patches: Patches = ()) -> Tensor:
        seen = Context.of(context)
        x, tokens, mask = seen.beside_x(x), seen.tokens, seen.mask
        self._check(x, t, tokens, mask)
        if patches:
            self._check_patches(patches, len(x))
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(self.dtype))
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb, tokens, mask, patches)
            skips.append(x)
        x = self.middle_block(x, emb, tokens, mask, patches)
        for stage in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, emb, tokens, mask, patches, skips[-1].shape[2:] if skips else None)
        return self.out(x)

    def _check(self, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise ValueError(f"the UNet takes x [B, {config.in_channels}, h, w], got {list(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"the UNet takes one timestep per sample: x has {x.shape[0]}, t has {list(t.shape)}")
        if tokens.ndim != 3 or tokens.shape[0] != x.shape[0] or tokens.shape[2] != config.context_dim:
            raise ValueError(f"the UNet takes context [{x.shape[0]}, L, {config.context_dim}], "
                             f"got {list(tokens.shape)}")
        if mask is not None and (mask.shape != tokens.shape[:2]
                                 or not (mask.dtype == torch.bool or mask.is_floating_point())):
            raise ValueError(f"mask must be bool or float {list(tokens.shape[:2])}, got {mask.dtype} "
                             f"{list(mask.shape)}")

    def _check_patches(self, patches: Patches, batch: int) -> None:
        rows = [n for n, _ in patches]
        if sum(rows) != batch or min(rows) < 0:
            raise ValueError(f"patches must say what each of the {batch} rows does, [(rows, Patch or None), ...]; got "
                             f"rows {rows}")
        places = self.places
        unknown = [place for _, patch in patches if patch is not None for place in patch.places if place not in places]
        if unknown:
            raise ValueError(f"this UNet has no transformer block {', '.join(map(repr, unknown))}: choose from "
                             f"{', '.join(places)}")
