"""The autoencoder of latent diffusion, with the tensor names of its LDM checkpoints."""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from ella_kd.models.attention import attend
from ella_kd.models.devices import place_of
from ella_kd.models.pictures import Images, to_pixels
from ella_kd.models.shapes import Shapes, count_of, shape_of
from ella_kd.models.vae_strips import HELD, InStrips

AT_ONCE = 512 * 512  # pixels of the pictures that are computed together
WHOLE = 1024 * 1024  # pixels of the largest picture that is computed whole


@dataclass(frozen=True)
class VAEConfig:
    """What an autoencoder is made of; the defaults are Stable Diffusion 1.5.

    channel_mult has one entry per level, the finest first; each level but the last halves the size. Latents leave
    `encode` as (z - mean) * scale / std, so that the UNet sees values of about unit variance: mean and std have one
    number per channel (Playground v2.5; a shift is the same mean in all), None for 0 and 1.
    """

    in_channels: int = 3
    latent_channels: int = 4
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    scale: float = 0.18215
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if any(mult * self.channels % 32 for mult in self.channel_mult):
            raise ValueError(f"channels must be multiples of 32 (GroupNorm) at every level, got {self.channels} times "
                             f"{self.channel_mult}")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != self.latent_channels:
                raise ValueError(f"{name} needs one number per channel of the latents, {self.latent_channels}, got "
                                 f"{len(numbers)}")

    @classmethod
    def from_shapes(cls, shapes: Shapes, scale: float = 0.18215) -> "VAEConfig":
        """The configuration read off a checkpoint's shapes, names without `first_stage_model.`.

        Raises ValueError naming the tensor that is missing to tell.
        """
        channels, in_channels = shape_of(shapes, "encoder.conv_in.weight", 4)[:2]
        mult = tuple(shape_of(shapes, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] // channels
                     for level in range(count_of(shapes, "encoder.down")))
        return cls(in_channels, shape_of(shapes, "post_quant_conv.weight", 4)[0], channels, mult,
                   count_of(shapes, "encoder.down.0.block"), scale)


class VAEResBlock(nn.Module):
    """Two normalised 3x3 convolutions and a skip connection."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention with one head over the pixels of a feature map; its projections are 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b (h w) c") for layer in (self.q, self.k, self.v))
        seen = attend(q, k, v, heads=1)
        return x + self.proj_out(rearrange(seen, "b (h w) c -> b c h w", h=x.shape[2]))


class Mid(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = VAEResBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = VAEResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class VAEDownsample(nn.Module):
    padding = "constant"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1), self.padding))  # padded on the right and bottom only


class VAEUpsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The res blocks of one resolution, and the layer that leaves it."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, down: bool = False, up: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList([VAEResBlock(in_channels if i == 0 else out_channels, out_channels)
                                    for i in range(blocks)])
        if down:
            self.downsample = VAEDownsample(out_channels)
        if up:
            self.upsample = VAEUpsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [mult * config.channels for mult in config.channel_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList([
            Level(inner, outer, config.num_res_blocks, down=level < len(widths) - 1)
            for level, (inner, outer) in enumerate(zip([config.channels, *widths], widths, strict=False))])
        self.mid = Mid(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels * 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [mult * config.channels for mult in config.channel_mult]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1])
        self.up = nn.ModuleList([  # up.0 is the finest level and runs last
            Level(coarser, width, config.num_res_blocks + 1, up=level > 0)
            for level, (coarser, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))])
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """The variational autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.1).

    Images are [B, 3, H, W] in [-1, 1], latents [B, 4, H / factor, W / factor]; both have the network's dtype. What is
    encoded may also be a PIL image, or uint8 in 0..255: `ella_kd.models.pictures.to_pixels`.
    """

    def __init__(self, config: VAEConfig = VAEConfig()) -> None:
        super().__init__()
        self.config = config
        self._told = False  # that float16 overflows
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels * 2, config.latent_channels * 2, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def factor(self) -> int:
        """Pixels per latent, along one side: 8 for Stable Diffusion."""
        return 2 ** (len(self.config.channel_mult) - 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def __repr__(self) -> str:
        config = self.config
        return f"AutoencoderKL(1 latent for {self.factor} x {self.factor} px, scale {config.scale:g}, {place_of(self)})"

    def moments(self, images: Images) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents' Gaussian, both unscaled [B, 4, H / factor, W / factor].

        Raises ValueError if H and W are no multiples of `factor`, ValueError or TypeError for what is no picture.
        """
        f = self.factor
        x = to_pixels(images, self.config.in_channels, self.quant_conv.weight)
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"the autoencoder takes images [B, {self.config.in_channels}, H, W] with H and W "
                             f"multiples of {f}, got {list(x.shape)}")
        mean, logvar = self._exactly(x, self.encoder, self.quant_conv).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, images: Images, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Images -> latents, scaled by `config.scale`: the mean, or with `sample` a draw from the Gaussian.

        images: floats [B, 3, H, W] in [-1, 1], a PIL image, or uint8 [B, 3, H, W] or [H, W, 3] in 0..255 (a tensor or
        an array). Raises ValueError or TypeError for anything else, floats in 0..255 among it.
        """
        mean, logvar = self.moments(images)
        if sample:
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype,
                                device=generator.device if generator is not None else mean.device)
            mean = mean + (logvar / 2).exp() * noise.to(mean.device)
        shift, scale = self._scaling(mean)
        return (mean - shift) * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> images, about [-1, 1], not clamped. Raises ValueError for a wrong shape."""
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(f"the autoencoder decodes latents [B, {self.config.latent_channels}, h, w], "
                             f"got {list(latents.shape)}")
        shift, scale = self._scaling(latents)
        return self._exactly(latents / scale + shift, self.post_quant_conv, self.decoder)

    def scratch(self, width: int, height: int) -> int:
        """How many bytes of a temporary file it takes to decode a picture: 0 where it is decoded whole or off the CPU,
        else those of the maps at the finest level, what comes up to it and what its first block makes of that."""
        if width * height <= WHOLE or self.quant_conv.weight.device.type != "cpu":
            return 0
        finest, *rest = (mult * self.config.channels for mult in self.config.channel_mult)
        held = (2 * finest + (rest or [finest])[0]) * width * height * self.quant_conv.weight.element_size()
        return held if held > HELD else 0

    def _scaling(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Shift and scale of `(z - shift) * scale`: numbers, or [C, 1, 1]."""
        config = self.config
        shift, std = (default if numbers is None else torch.tensor(numbers, dtype=torch.float64).to(like)[:, None, None]
                      for numbers, default in ((config.mean, 0.0), (config.std, 1.0)))
        return shift, config.scale / std

    def _exactly(self, x: Tensor, *layers: nn.Module) -> Tensor:
        """The layers' answer, computed for as many pictures at once as make `AT_ONCE` pixels, and for one of more than
        `WHOLE` in strips: neither a batch nor a large picture takes more memory. Not where gradients are wanted."""
        side = 1 if layers[0] is self.encoder else self.factor
        pixels = max(x.shape[2] * x.shape[3] * side * side, 1)
        wanted = torch.is_grad_enabled() and (x.requires_grad or self.quant_conv.weight.requires_grad)
        network = (nn.Sequential if pixels <= WHOLE or wanted else InStrips)(*layers)
        n = max(AT_ONCE // pixels, 1)
        if len(x) <= n:
            return self._some(x, network)
        return torch.cat([self._some(part, network) for part in x.split(n)])

    def _some(self, x: Tensor, network: nn.Module) -> Tensor:
        """The layers' answer; pictures that overflow in float16 are computed again in float32, which is told once."""
        y = network(x)
        if y.dtype != torch.float16:
            return y
        lost = ~y.isfinite().flatten(1).all(1)
        if not bool(lost.any()):
            return y
        if not self._told:
            self._told = True
            warnings.warn("the autoencoder overflows in float16, as SDXL's does: such pictures are computed again in "
                          "float32; sdxl-vae-fp16-fix is the same one made for float16", stacklevel=3)
        wide = {name: w.float() for name, w in network.state_dict().items()}
        y[lost] = functional_call(network, wide, x[lost].float()).to(y.dtype)
        return y


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)
