"""ELLA's Timestep-Aware Semantic Connector, with the tensor names of the published weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ella_kd.models.attention import attend, check_mask
from ella_kd.models.devices import place_of
from ella_kd.models.shapes import Shapes, count_of, shape_of
from ella_kd.models.timestep import timestep_embedding


class AdaLayerNorm(nn.Module):
    """LayerNorm whose shift and scale come from the timestep; starts as a plain LayerNorm."""

    def __init__(self, width: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(time_embed_dim, width * 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x [B, L, width]; temb [B, time_embed_dim], after its SiLU."""
        shift, scale = self.linear(temb)[:, None].chunk(2, dim=-1)  # this order: DiT's, not diffusers' (scale, shift)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class CrossAttention(nn.Module):
    """Multi-head attention with `torch.nn.MultiheadAttention`'s parameters, and a mask over the keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(width * 3, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(width * 3))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        width = q.shape[-1]
        q_weight, kv_weight = self.in_proj_weight.split([width, 2 * width])
        q_bias, kv_bias = self.in_proj_bias.split([width, 2 * width])
        k, v = F.linear(kv, kv_weight, kv_bias).chunk(2, dim=-1)
        return self.out_proj(attend(F.linear(q, q_weight, q_bias), k, v, self.heads, mask))


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class PerceiverBlock(nn.Module):
    """The latents look at themselves and at the text, then at a feed-forward layer; the text is never changed."""

    def __init__(self, width: int, time_embed_dim: int, heads: int) -> None:
        super().__init__()
        self.attn = CrossAttention(width, heads)
        self.ln_1 = AdaLayerNorm(width, time_embed_dim)
        self.ln_2 = AdaLayerNorm(width, time_embed_dim)
        self.ln_ff = AdaLayerNorm(width, time_embed_dim)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, width * 4))
        self.mlp.add_module("sq_relu", SquaredReLU())
        self.mlp.add_module("c_proj", nn.Linear(width * 4, width))

    def forward(self, latents: Tensor, x: Tensor, temb: Tensor, mask: Tensor | None) -> Tensor:
        q = self.ln_1(latents, temb)
        latents = latents + self.attn(q, torch.cat([q, self.ln_2(x, temb)], dim=1), mask)
        return latents + self.mlp(self.ln_ff(latents, temb))


class Connector(nn.Module):
    """A Perceiver resampler: learned latents, moved by the timestep, read the text in a few blocks."""

    def __init__(self, width: int, time_embed_dim: int, layers: int, heads: int, num_latents: int,
                 input_dim: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, width) * width**-0.5)
        self.time_aware_linear = nn.Linear(time_embed_dim, width)
        self.proj_in = nn.Linear(input_dim, width)
        self.perceiver_blocks = nn.ModuleList([PerceiverBlock(width, time_embed_dim, heads) for _ in range(layers)])

    def forward(self, features: Tensor, temb: Tensor, mask: Tensor | None) -> Tensor:
        latents = self.latents + self.time_aware_linear(temb)[:, None]
        x = self.proj_in(features)
        if mask is not None:  # over the text only: the latents among the keys are always seen
            mask = F.pad(mask, (len(self.latents), 0), value=1)
        for block in self.perceiver_blocks:
            latents = block(latents, x, temb, mask)
        return latents


class TimeEmbedding(nn.Module):
    def __init__(self, time_channel: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(time_channel, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sinusoid: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


class TSC(nn.Module):
    """The Timestep-Aware Semantic Connector: text features and a timestep -> tokens for the UNet.

    ELLA (Hu et al. 2024, arXiv 2403.05135), section 3.1; the defaults are `ella-sd1.5-tsc-t5xl.safetensors`.

    `tsc(features, t, mask=None)`: features [B, L, input_dim], cast to the weights' dtype; t [B], or [1] for all, fp32,
    fractional welcome; mask [B, L] bool, True at real tokens, or floats >= 0, the factor by which a token's attention
    is multiplied in every block (`attend`), None if all are seen (padding included: ELLA's fixed mode)
    -> [B, num_latents, width]. A mask gives exactly what slicing off the padding gives.
    Raises ValueError for a wrong shape, or on a CPU for weights below 0 or NaN.
    """

    def __init__(self, time_channel: int = 320, time_embed_dim: int = 768, width: int = 768, layers: int = 6,
                 heads: int = 8, num_latents: int = 64, input_dim: int = 2048) -> None:
        super().__init__()
        if type(heads) is not int or heads < 1:
            raise ValueError(f"heads must be a whole number of at least 1, got {heads!r}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.time_channel, self.heads, self.input_dim = time_channel, heads, input_dim
        self.time_embedding = TimeEmbedding(time_channel, time_embed_dim)
        self.connector = Connector(width, time_embed_dim, layers, heads, num_latents, input_dim)

    @staticmethod
    def arguments_from_shapes(shapes: Shapes) -> dict[str, int]:
        """TSC's arguments, all but `heads`, read off a file's shapes. Raises ValueError naming a missing tensor."""
        time_embed_dim, time_channel = shape_of(shapes, "time_embedding.linear_1.weight", 2)
        num_latents, width = shape_of(shapes, "connector.latents", 2)
        shape_of(shapes, "connector.perceiver_blocks.0.attn.in_proj_weight", 2)
        return {"time_channel": time_channel, "time_embed_dim": time_embed_dim, "width": width,
                "layers": count_of(shapes, "connector.perceiver_blocks"), "num_latents": num_latents,
                "input_dim": shape_of(shapes, "connector.proj_in.weight", 2)[1]}

    @property
    def dtype(self) -> torch.dtype:
        return self.connector.latents.dtype

    def __repr__(self) -> str:
        tokens, width = self.connector.latents.shape
        return (f"TSC(features of width {self.input_dim} -> {tokens} tokens of width {width}, "
                f"{len(self.connector.perceiver_blocks)} blocks, {place_of(self)})")

    def forward(self, features: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        if features.ndim != 3 or features.shape[2] != self.input_dim:
            raise ValueError(f"the TSC takes features [B, L, {self.input_dim}], got {list(features.shape)}")
        if t.ndim != 1 or len(t) not in (1, len(features)):
            raise ValueError(f"the TSC takes t [{len(features)}], one timestep per sample, got {list(t.shape)}")
        check_mask(mask, features)
        sinusoid = timestep_embedding(t.expand(len(features)), self.time_channel)
        temb = F.silu(self.time_embedding(sinusoid.to(self.dtype)))  # every reader takes SiLU(temb)
        return self.connector(features.to(self.dtype), temb, mask)
