"""The latent-diffusion UNet of Stable Diffusion 1.x, 2.x, XL and their relatives, with LDM's tensor names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ella_kd.models.blocks import Layers, ResBlock, SpatialTransformer, TransformerBlock, Upsample, resized
from ella_kd.models.context import Context
from ella_kd.models.encoder import Encoder, transformer
from ella_kd.models.network import Deep, Levels, Patches
from ella_kd.models.parameters import zero_init
from ella_kd.models.patches import for_all
from ella_kd.models.reference import beside_references
from ella_kd.models.shapes import Shapes, count_of, shape_of

if TYPE_CHECKING:
    from ella_kd.models.inside import Change

Depths = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class UNetConfig:
    """What a UNet is made of; the defaults are Stable Diffusion 1.5.

    Levels stand the finest first. depth: per level, how many transformer blocks follow each res block, a number or a
    tuple of one per res block; out_depth: the same on the way up, where a level has one res block more (None: as on
    the way down); middle_depth: in the middle, where 0 leaves a single res block (SSD-1B, Vega).
    Give `num_heads` (SD1.x: 8 heads at every level) or `head_dim` (SD2.x: heads of 64 channels), the other is None.
    linear_proj: the transformers' proj_in and proj_out are linear layers (SD2.x, SDXL) instead of 1x1 convolutions.
    cross_only: the levels without self-attention, where the first attention looks at the text too (the x4 upscaler).
    What is seen beside tokens, None for nothing: vector_dim, the width of SDXL's added vector, sizes included; classes,
    how many labels there are (x4: levels of noise); guidance_dim, the width in which a guidance scale is told (LCM).
    Raises ValueError for a contradiction.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    depth: tuple[int | tuple[int, ...], ...] = (1, 1, 1, 0)
    context_dim: int = 768
    num_heads: int | None = 8
    head_dim: int | None = None
    linear_proj: bool = False
    middle_depth: int = 1
    out_depth: tuple[int | tuple[int, ...], ...] | None = None
    cross_only: tuple[bool, ...] = ()
    vector_dim: int | None = None
    classes: int | None = None
    guidance_dim: int | None = None

    def __post_init__(self) -> None:
        levels = len(self.channel_mult)
        down, up = self.depths
        object.__setattr__(self, "depth", down)
        object.__setattr__(self, "out_depth", None if up == _mirrored(down) else up)  # one way to say it
        object.__setattr__(self, "cross_only", tuple(self.cross_only) or (False,) * levels)
        for level in range(levels):
            if len({depth > 0 for depth in down[level] + up[level]}) > 1:
                raise ValueError("a level has transformers after each of its res blocks or after none: level "
                                 f"{level} has {list(down[level])} on the way down, {list(up[level])} up")
        if len(self.cross_only) != levels:
            raise ValueError(f"cross_only needs one entry per level: channel_mult has {levels}, cross_only has "
                             f"{len(self.cross_only)}")
        if self.vector_dim is not None and self.classes is not None:
            raise ValueError(f"a UNet sees vectors or labels, not both: got {self.vector_dim} and {self.classes}")
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

    @property
    def depths(self) -> tuple[Depths, Depths]:
        """Of the way down and the way up: per level, the transformer blocks after each res block."""
        down = _per_block("depth", self.depth, self.channel_mult, self.num_res_blocks)
        if self.out_depth is not None:
            return down, _per_block("out_depth", self.out_depth, self.channel_mult, self.num_res_blocks + 1)
        if any(len(set(each)) > 1 for each in down):
            raise ValueError(f"depth differs from res block to res block, {self.depth}: give out_depth too")
        return down, _mirrored(down)

    def heads(self, channels: int) -> int:
        return self.num_heads or channels // (self.head_dim or channels)

    @classmethod
    def from_shapes(cls, shapes: Shapes, num_heads: int | None = None, head_dim: int | None = None,
                    whole: bool = True) -> "UNetConfig":
        """The configuration read off a checkpoint's shapes, names without `model.diffusion_model.`; whole: False for a
        ControlNet's, which has no way up, and perhaps no transformer (then context_dim is 0: it sees no text).

        The heads are not in the shapes: without an argument, 8 heads if proj_in is a convolution (SD1.x) or labels are
        seen (the x4 upscaler), else heads of 64 channels. A level is `cross_only` if its first attention takes another
        width than its own. Raises ValueError naming the tensor that is missing to tell.
        """
        def transformers(block: str) -> int:
            return count_of(shapes, f"{block}.1.transformer_blocks")

        def width_of(name: str, side: int) -> int | None:
            return shape_of(shapes, name, 2)[side] if name in shapes else None

        model_channels, in_channels = shape_of(shapes, "input_blocks.0.0.weight", 4)[:2]
        if not model_channels:
            raise ValueError("tensor input_blocks.0.0.weight is empty")
        levels: list[list[str]] = [[]]  # per level the names of its blocks
        for n in range(1, count_of(shapes, "input_blocks")):
            if f"input_blocks.{n}.0.op.weight" in shapes or f"input_blocks.{n}.0.op.bias" in shapes:
                levels.append([])
            else:
                levels[-1].append(f"input_blocks.{n}")
        if not all(levels):
            raise ValueError("a level of input_blocks has no res block")
        widths = [shape_of(shapes, f"{level[0]}.0.out_layers.3.weight", 4)[0] for level in levels]
        down, each = tuple(tuple(map(transformers, level)) for level in levels), len(levels[0]) + 1
        up = [tuple(transformers(f"output_blocks.{each * i + j}") for j in range(each)) for i in range(len(levels))]
        deep = next((level[0] for level in levels if transformers(level[0])), "middle_block")
        keys = f"{deep}.1.transformer_blocks.0.attn2.to_k.weight"
        linear_proj = len(shapes.get(f"{deep}.1.proj_in.weight", ())) == 2
        if num_heads is None and head_dim is None:
            num_heads, head_dim = (None, 64) if linear_proj and "label_emb.weight" not in shapes else (8, None)
        first = [width_of(f"{level[0]}.1.transformer_blocks.0.attn1.to_k.weight", 1) for level in levels]
        return cls(
            in_channels, shape_of(shapes, "out.2.weight", 4)[0] if whole else cls.out_channels, model_channels,
            tuple(width // model_channels for width in widths), len(levels[0]), down,
            shape_of(shapes, keys, 2)[1] if whole or keys in shapes else 0,
            num_heads, head_dim, linear_proj, transformers("middle_block"),
            tuple(reversed(up)) if whole else _mirrored(down),
            tuple(seen not in (None, width) for seen, width in zip(first, widths)),
            width_of("label_emb.0.0.weight", 1), width_of("label_emb.weight", 0),
            width_of("time_embed.cond_proj.weight", 1))


def _mirrored(down: Depths) -> Depths:
    return tuple(each[:1] + each for each in down)


def _per_block(name: str, depth: Sequence[int | Sequence[int]], levels: Sequence[int], blocks: int) -> Depths:
    """One number per level and res block. Raises ValueError for another count, and for what is below 0."""
    if len(depth) != len(levels):
        raise ValueError(f"{name} needs one entry per level: channel_mult has {len(levels)}, {name} has {len(depth)}")
    each = tuple((int(d),) * blocks if isinstance(d, int) else tuple(map(int, d)) for d in depth)
    if any(len(of_level) != blocks or min(of_level) < 0 for of_level in each):
        raise ValueError(f"{name} is a number of at least 0 per level, or one for each of its {blocks} res blocks, got "
                         f"{depth}")
    return each


class UNet(Encoder):
    """The denoising network of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.2).

    `unet(x, t, context, patches=())`, a `models.network.Network`: x [B, in_channels, h, w], less the channels that the
    context has, any h and w; t [B], the timestep, fractional welcome; context, a Context of tokens [B, L, context_dim]
    and what else the configuration says is seen, or bare tokens -> [B, out_channels, h, w]. x and context have the
    network's dtype, t stays fp32.

    patches: what rows of the batch do differently in this one call, `(rows, Patch or None)` in the order of the batch,
    `models.patches`; a patch names its transformers, those in `places`. changes: what all rows do differently,
    `models.inside`; where a row's patch names a place that a change patches too, the row's holds. Nothing of either
    stays behind.
    Raises ValueError for a wrong shape, a place that does not exist, rows that are not the batch, an input that is
    needed and missing, or that this network does not know.
    """

    def __init__(self, config: UNetConfig = UNetConfig()) -> None:
        super().__init__(config)
        channels, up = config.model_channels, config.depths[1]
        ch, emb, skips = config.channel_mult[-1] * channels, channels * 4, list(self.skips)
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i, depth in enumerate(up[level]):
                block = ResBlock(ch + skips.pop(), mult * channels, emb)
                ch = mult * channels
                last = level and i == config.num_res_blocks
                self.output_blocks.append(Layers(block, *transformer(config, ch, depth, config.cross_only[level]),
                                                *([Upsample(ch)] if last else [])))

        self.out = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(),
                                 zero_init(nn.Conv2d(ch, config.out_channels, 3, padding=1)))
        for name, module in self.named_modules():
            if isinstance(module, SpatialTransformer):
                module.place = name
        for number, each in enumerate(self.cross_attentions):
            each.number = number

    @property
    def places(self) -> tuple[str, ...]:
        """The names of the transformers that a patch can replace, from input to output: "middle_block.1", ...

        Those without self-attention (`cross_only`) are none.
        """
        return tuple(module.place for module in self.modules()
                     if isinstance(module, SpatialTransformer) and not module.cross_only)

    @property
    def cross_attentions(self) -> list[TransformerBlock]:
        """The transformer blocks in the order of image prompts' weights: on the way down, on the way up, the middle."""
        ways = (self.input_blocks, self.output_blocks, self.middle_block)
        return [block for way in ways for block in way.modules() if isinstance(block, TransformerBlock)]

    @property
    def in_channels(self) -> int:
        return self.config.in_channels

    @property
    def out_channels(self) -> int:
        return self.config.out_channels

    @property
    def vector_dim(self) -> int | None:
        return self.config.vector_dim

    @property
    def guidance_dim(self) -> int | None:
        return self.config.guidance_dim

    def at(self, levels: Levels) -> "UNet":
        """Itself: it is the same at every noise level."""
        return self

    def forward(self, x: Tensor, t: Tensor, context: Context | Tensor, patches: Patches = (),
                changes: "Sequence[Change]" = (), deep: Deep | None = None) -> Tensor | tuple[Tensor, Tensor]:
        seen = Context.of(context)
        given, cut = (None, -1) if deep is None else (deep.features, self.cut(deep.branch))
        latents, x, tokens, mask = x, seen.beside_x(x), seen.tokens, seen.mask
        self._check(x, t, tokens, mask)
        if seen.references:
            patches = beside_references(self, t, seen, patches, changes)
        patches = for_all(patches, [patch for change in changes for patch in change.patches], len(x))
        if patches:
            self._check_patches(patches, len(x))
        emb = self._embedding(x, t, seen)
        stages = None if given is None or deep is None else deep.branch + 1
        images: Any = ()
        more: Any = None
        if seen.images:
            from ella_kd.models.uncompiled import ready
            images = ready(seen.images, self)
        if seen.controls:
            from ella_kd.models.uncompiled import added
            more = added(seen, latents, t, self.config, stages)
        skips: list[Tensor] = []
        levels, blocks = len(self.config.channel_mult), self.config.num_res_blocks + 1
        for n, stage in enumerate(self.input_blocks[:stages]):
            wider, apart = 1, _apart(changes, "down", max(0, n - 1) // blocks)
            for change in changes:
                wider *= change.wider(n)
            x = stage(x, emb, tokens, mask, patches, None, images, wider, apart)
            x = x if more is None else more.inside(n, x)
            for change in changes:
                x = change.before_skip(n, x)
            skips.append(x)
            for change in changes:
                x = change.after_skip(n, x)
        middle: Any = None if given is not None else self.middle_block(
            x, emb, tokens, mask, patches, None, images, apart=_apart(changes, "middle", levels - 1))
        middle, skips = (middle, skips) if more is None else more.outside(middle, skips)
        x = middle if given is None else given
        features = x
        for n, stage in enumerate(self.output_blocks):
            if given is not None and n < cut:
                continue
            features = x if n == cut else features
            skip = skips.pop()
            x = resized(x, skip)  # where a change made it smaller
            for change in changes:
                x, skip = change.joined(n, x, skip)
            size = skips[-1].shape[2:] if skips else None
            x = stage(torch.cat([x, skip], dim=1), emb, tokens, mask, patches, size, images,
                      apart=_apart(changes, "up", levels - 1 - n // blocks))
        return self.out(x) if deep is None else (self.out(x), features)

    def cut(self, branch: int) -> int:
        """The output block that takes the skip of input_blocks[branch]. ValueError where there is none."""
        last = len(self.output_blocks) - 1
        if not 0 <= branch <= last:
            raise ValueError(f"a branch of this UNet is one of its skips, 0 (the finest) to {last}, got {branch}")
        return last - branch

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


def _apart(changes: "Sequence[Change]", part: str, level: int) -> int:
    """How many pixels apart the weights of convolutions stand, by all changes together."""
    found = 1
    for change in changes:
        found *= change.apart(part, level)
    return found
