"""The half of the UNet that ControlNet has a copy of: what is told of t, the way down and the middle."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ella_kd.models.added import NEEDED, added_vector, refuse
from ella_kd.models.attention import check_mask
from ella_kd.models.blocks import Downsample, Layers, ResBlock, SpatialTransformer
from ella_kd.models.context import Context
from ella_kd.models.timestep import guidance_embedding, timestep_embedding


class TimeEmbed(nn.Sequential):
    """The sinusoid of t through two layers; what the guidance scale is told by is added to it first."""

    def __init__(self, channels: int, emb: int, guidance_dim: int | None) -> None:
        super().__init__(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if guidance_dim is not None:
            self.cond_proj = nn.Linear(guidance_dim, channels, bias=False)

    def forward(self, sinusoid: Tensor, guidance: Tensor | None = None) -> Tensor:
        if guidance is not None:
            sinusoid = sinusoid + self.cond_proj(guidance)
        return self[2](F.silu(self[0](sinusoid)))


class Encoder(nn.Module):
    """time_embed, label_emb, input_blocks and middle_block of a UNet; skips: the channels after each input block."""

    def __init__(self, config: Any) -> None:  # a UNetConfig, whose file imports this one
        super().__init__()
        self.config = config
        channels = config.model_channels
        emb = channels * 4
        down, _ = config.depths

        self.time_embed = TimeEmbed(channels, emb, config.guidance_dim)
        if config.vector_dim is not None:
            self.label_emb: nn.Module = nn.Sequential(nn.Sequential(
                nn.Linear(config.vector_dim, emb), nn.SiLU(), nn.Linear(emb, emb)))
        elif config.classes is not None:
            self.label_emb = nn.Embedding(config.classes, emb)

        self.input_blocks = nn.ModuleList([Layers(nn.Conv2d(config.in_channels, channels, 3, padding=1))])
        skips = [channels]
        ch = channels
        for level, mult in enumerate(config.channel_mult):
            if level:
                self.input_blocks.append(Layers(Downsample(ch)))
                skips.append(ch)
            for depth in down[level]:
                block = ResBlock(ch, mult * channels, emb)
                ch = mult * channels
                self.input_blocks.append(Layers(block, *transformer(config, ch, depth, config.cross_only[level])))
                skips.append(ch)

        middle = transformer(config, ch, config.middle_depth)
        self.middle_block = Layers(ResBlock(ch, ch, emb), *middle, *(ResBlock(ch, ch, emb) for _ in middle))
        self.skips = tuple(skips)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _embedding(self, x: Tensor, t: Tensor, seen: Context) -> Tensor:
        """[B, 4 * model_channels], what each res block adds: t, the guidance scale, the added vector or the label."""
        config = self.config
        known = {"vector": config.vector_dim, "label": config.classes, "guidance": config.guidance_dim}
        for name, size in known.items():
            given = getattr(seen, name)
            if size is None:
                refuse("this UNet does not know", {name: given})
            elif given is None:
                raise ValueError(f"this UNet needs {NEEDED[name]}: give it beside the tokens, With(cond, {name}=...)")
            elif name != "vector" and given.shape != t.shape:
                raise ValueError(f"{name} must be [{len(t)}], one per sample, got {list(given.shape)}")
        guidance = seen.guidance
        if guidance is not None:
            guidance = guidance_embedding(guidance, config.guidance_dim or 0).to(self.dtype)
        emb = self.time_embed(timestep_embedding(t, config.model_channels).to(self.dtype), guidance)
        if config.vector_dim is not None:
            return emb + self.label_emb(added_vector(seen, x, config.vector_dim).to(self.dtype))
        refuse("this UNet does not know", {"sizes": seen.sizes, "score": seen.score})
        return emb if seen.label is None else emb + self.label_emb(seen.label)

    def _check(self, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise ValueError(f"the UNet takes x [B, {config.in_channels}, h, w], got {list(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"the UNet takes one timestep per sample: x has {x.shape[0]}, t has {list(t.shape)}")
        if tokens.ndim != 3 or tokens.shape[0] != x.shape[0] or (
                config.context_dim and tokens.shape[2] != config.context_dim):
            raise ValueError(f"the UNet takes context [{x.shape[0]}, L, {config.context_dim}], "
                             f"got {list(tokens.shape)}")
        check_mask(mask, tokens, read=False)


def transformer(config: Any, channels: int, depth: int, cross_only: bool = False) -> list[SpatialTransformer]:
    """The transformer after a res block, if there is one."""
    heads = config.heads(channels)
    return [SpatialTransformer(channels, config.context_dim, heads, config.linear_proj, depth, cross_only)
            ] if depth else []
