"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721): pictures as prompts, seen by cross-attentions of their own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ella_kd.models.addons.control_files import ControlPart
from ella_kd.models.addons.image_encoder import ImageEncoder
from ella_kd.models.addons.preprocessing import Picture
from ella_kd.models.attention import attend
from ella_kd.models.devices import check_device, check_dtype
from ella_kd.models.files.building import build, check_dtypes, fill
from ella_kd.models.files.kinds import hint, kind_of_path
from ella_kd.models.files.layout import Part
from ella_kd.models.files.names import Source
from ella_kd.models.files.weights import Weights
from ella_kd.models.shapes import count_of, shape_of
from ella_kd.models.unet import UNet

HEAD = 64  # channels of a head of the resampler


class Projection(nn.Module):
    """The base adapter's: the encoder's embedding [P, E] -> tokens [P, n, D]. From nothing: from zeros."""

    whole = False  # it reads the embedding, not the encoder's last hidden state but one

    def __init__(self, width: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.dim = dim
        self.proj = nn.Linear(width, dim * tokens)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).unflatten(-1, (-1, self.dim)))


class FullProjection(nn.Module):
    """The full-face adapter's: every hidden state [P, L, E] becomes a token [P, L, D]."""

    whole = True

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim), nn.LayerNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Perceiver(nn.Module):
    """Latents attend to the picture and to themselves."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.heads = inner // HEAD
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat([x, latents], 1)).chunk(2, -1)
        return self.to_out(attend(self.to_q(latents), k, v, self.heads))


class Resampler(nn.Module):
    """The plus adapters': hidden states [P, L, E] -> tokens [P, n, D], by queries that attend to them."""

    whole = True

    def __init__(self, width: int, inner: int, dim: int, tokens: int, depth: int, heads_dim: int, wide: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, inner) / inner**0.5)
        self.proj_in, self.proj_out = nn.Linear(width, inner), nn.Linear(inner, dim)
        self.norm_out = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(nn.ModuleList([Perceiver(inner, heads_dim), nn.Sequential(
            nn.LayerNorm(inner), nn.Linear(inner, wide, bias=False), nn.GELU(),
            nn.Linear(wide, inner, bias=False))]) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        latents, x = self.latents.expand(len(x), -1, -1), self.proj_in(x)
        layers: Any = self.layers
        for attention, forward in layers:
            latents = latents + attention(x, latents)
            latents = latents + forward(latents)
        return self.norm_out(self.proj_out(latents))


class KeysAndValues(nn.Module):
    """Of one cross-attention, for pictures."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(dim, channels, bias=False)
        self.to_v_ip = nn.Linear(dim, channels, bias=False)


class IPAdapter(nn.Module):
    """What makes tokens of pictures, and the keys and values of each of the UNet's cross-attentions for them.

    widths: of the cross-attentions on the way down, up and in the middle, by their numbers in files, 1, 3, 5, ...
    encoder: CLIP's image encoder, which belongs to the adapter.
    """

    def __init__(self, image_proj: nn.Module, dim: int, widths: Sequence[int], name: str = "") -> None:
        super().__init__()
        self.name = name
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict({str(2 * i + 1): KeysAndValues(dim, width) for i, width in enumerate(widths)})
        self.encoder: ImageEncoder | None = None

    @classmethod
    def load(cls, path: str | Path, *, image_encoder: "str | Path | nn.Module | None" = None,
             dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu") -> "IPAdapter":
        """Read one, base, plus or full-face, for SD or SDXL, and its image encoder.

        image_encoder: transformers' folder or file of a CLIPVisionModelWithProjection (IP-Adapter's
        `models/image_encoder`, for most SDXL ones `sdxl_models/image_encoder`), or the model; None: the folder
        image_encoder beside the file. dtype None: fp32 on a CPU, fp16 elsewhere. Raises FileNotFoundError, or
        ValueError naming what is missing, misshapen or extra, for a FaceID adapter, for a file of another kind and for
        an encoder of another width.
        """
        device = check_device(device)
        dtype, path = check_dtype(dtype, device), Path(path)
        weights = Weights(path)
        told = f"{path} is not an IP-Adapter"
        if any("lora" in name or "perceiver_resampler" in name for name in weights) or (
                "image_proj.norm.weight" in weights and "image_proj.proj.2.weight" in weights):
            raise ValueError(f"{path} is an IP-Adapter FaceID, which needs insightface and is not read: take a base, "
                             "plus or full-face one")
        if not any(name.startswith("ip_adapter.") for name in weights):
            raise ValueError(f"{told}{hint(kind_of_path(path))}: expected ip_adapter.1.to_k_ip.weight and so on")
        part = ControlPart("unet", weights, {name: Source(name, tuple(shape)) for name, shape in
                                             weights.shapes.items()})
        net = build(_of_shapes, part, told, path.stem)
        check_dtypes(part)
        net = fill(net, part, told, dtype, device)
        image_encoder = image_encoder or path.parent / "image_encoder"
        if isinstance(image_encoder, (str, Path)) and not Path(image_encoder).exists():
            raise FileNotFoundError(f"no image encoder at {image_encoder}: the IP-Adapter {path} needs the one it was "
                                    "trained with, give its folder or file as image_encoder, or lay it there")
        encoder = ImageEncoder.load(image_encoder, dtype=dtype, device=device)
        wanted, has = net.width, encoder.width(bool(net.image_proj.whole))
        if wanted != has:
            raise ValueError(f"the adapter {path} reads {wanted} numbers of an image encoder and this one gives {has}: "
                             "take the encoder that it was trained with (ViT-H for most, ViT-bigG for ip-adapter_sdxl)")
        net.encoder = encoder
        return net

    @property
    def width(self) -> int:
        """Of what the projection reads."""
        first: Any = self.image_proj
        layer: Any = first.proj_in if isinstance(first, Resampler) else (
            first.proj[0] if isinstance(first, FullProjection) else first.proj)
        width: int = layer.in_features
        return width

    def of_block(self, number: int) -> Any:
        return self.ip_adapter[str(2 * number + 1)]

    def check(self, unet: UNet) -> None:
        layers: list[Any] = list(self.ip_adapter.values())
        wanted = [tuple(block.attn2.to_k.weight.shape) for block in unet.cross_attentions]
        got = [tuple(layer.to_k_ip.weight.shape) for layer in layers]
        if wanted != got:
            raise ValueError(f"the IP-Adapter {self.name} has keys for {len(got)} cross-attentions, the first "
                             f"{list(got[0])}, and this UNet has {len(wanted)}, the first {list(wanted[0])}: take one "
                             "that was made for this UNet")

    @torch.no_grad()
    def tokens(self, pictures: Sequence[Picture] | None) -> Tensor:
        """What the UNet sees of pictures, [L, D], one after another; None: of no picture, for the uncond."""
        if self.encoder is None:
            raise ValueError("this IPAdapter has no image encoder: load it, IPAdapter.load(file, image_encoder=...)")
        whole = bool(self.image_proj.whole)
        weight = next(self.image_proj.parameters())
        if pictures is None and not whole:
            seen = weight.new_zeros(1, self.width)
        else:
            seen = self.encoder(pictures, whole).to(weight.dtype)
        return self.image_proj(seen).flatten(0, 1)


def _of_shapes(part: Part, name: str) -> IPAdapter:
    shapes = part.shapes
    numbers = sorted({int(n) for key in shapes if key.startswith("ip_adapter.") and
                      (n := key.split(".")[1]).isdecimal()})
    if numbers != list(range(1, 2 * len(numbers), 2)):
        raise ValueError(f"its cross-attentions are numbered {numbers[:4]}..., expected 1, 3, 5, ...")
    widths = [shape_of(shapes, f"ip_adapter.{n}.to_k_ip.weight", 2)[0] for n in numbers]
    dim = shape_of(shapes, "ip_adapter.1.to_k_ip.weight", 2)[1]
    return IPAdapter(_projection(part, dim), dim, widths, name)


def _projection(part: Part, dim: int) -> nn.Module:
    shapes = part.shapes
    if "image_proj.latents" in shapes:
        tokens, inner = shape_of(shapes, "image_proj.latents", 3)[1:]
        return Resampler(shape_of(shapes, "image_proj.proj_in.weight", 2)[1], inner, dim, tokens,
                         count_of(shapes, "image_proj.layers"),
                         shape_of(shapes, "image_proj.layers.0.0.to_q.weight", 2)[0],
                         shape_of(shapes, "image_proj.layers.0.1.1.weight", 2)[0])
    if "image_proj.proj.0.weight" in shapes:
        return FullProjection(shape_of(shapes, "image_proj.proj.0.weight", 2)[1], dim)
    wide, width = shape_of(shapes, "image_proj.proj.weight", 2)
    return Projection(width, dim, wide // dim)
