"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): a copy of the UNet's way down that reads a picture beside x."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ella_kd.models.context import Context
from ella_kd.models.controls import Residuals
from ella_kd.models.encoder import Encoder
from ella_kd.models.parameters import zero_init
from ella_kd.models.unet import UNet, UNetConfig

if TYPE_CHECKING:
    from pathlib import Path

WIDTHS = (16, 32, 96, 256)  # of the layers that read the picture: LDM's
COPIED = ("time_embed", "label_emb", "input_blocks", "middle_block")  # of the UNet
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}  # by the width of their tokens


class ControlNet(Encoder):
    """LDM's `control_model`: what it makes of x, t, tokens and a picture is added to the UNet's skips and middle.

    config: that of the UNet it was made for, whose way up it lacks. widths: of the layers that read the picture. name:
    what errors call it. pooled: its outputs are averaged over the picture (shuffle), and the uncond goes without.
    """

    def __init__(self, config: UNetConfig, widths: Sequence[int] = WIDTHS, name: str = "",
                 pooled: bool = False) -> None:
        super().__init__(config)
        self.name, self.pooled = name, pooled
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for width, wider in pairwise(widths):
            layers += [nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                       nn.SiLU(), nn.Conv2d(width, wider, 3, padding=1, stride=2)]
        layers += [nn.SiLU(), zero_init(nn.Conv2d(widths[-1], config.model_channels, 3, padding=1))]
        self.input_hint_block = nn.Sequential(*layers)
        self.zero_convs = nn.ModuleList(nn.Sequential(zero_init(nn.Conv2d(ch, ch, 1))) for ch in self.skips)
        self.middle_block_out = nn.Sequential(zero_init(nn.Conv2d(self.skips[-1], self.skips[-1], 1)))

    @classmethod
    def of(cls, unet: UNet, name: str = "", widths: Sequence[int] = WIDTHS) -> "ControlNet":
        """One to be trained for a UNet: its way down and middle are copied, what is added starts at zero."""
        net = cls(unet.config, widths, name).to(next(unet.parameters()))
        weights = unet.state_dict()
        missing = [key for key in net.state_dict() if key.partition(".")[0] in COPIED and key not in weights]
        if missing:
            raise ValueError(f"the UNet has no {missing[0]}: copy a plain one, from before fast_on_cpu")
        net.load_state_dict({key: weights.get(key, x) for key, x in net.state_dict().items()})
        return net

    @classmethod
    def load(cls, path: "str | Path", *, base: nn.Module | None = None, pooled: bool | None = None,
             dtype: "str | torch.dtype | None" = None, device: "str | torch.device" = "cpu") -> "ControlNet":
        """Read one from a file or folder: `models.addons.control_files.load_controlnet`."""
        from ella_kd.models.addons.control_files import load_controlnet

        net: Any = load_controlnet(path, base=base, pooled=pooled, dtype=dtype, device=device)
        return net

    def save(self, path: "str | Path") -> None:
        """Write it as a .safetensors file in LDM's names: `models.addons.control_files.save_controlnet`."""
        from ella_kd.models.addons.control_files import save_controlnet

        net: Any = self
        save_controlnet(path, net)

    def check(self, unet: UNetConfig) -> None:
        own = self.config
        alike = ["model_channels", "channel_mult", "num_res_blocks", "vector_dim"]
        alike += ["context_dim"] if own.context_dim else []  # one without transformers sees no text
        other = [name for name in alike if getattr(own, name) != getattr(unet, name)]
        if other:
            kinds = [FAMILIES.get(each.context_dim, "another family") for each in (own, unet)]
            said = ", ".join(f"{name} {getattr(own, name)} against {getattr(unet, name)}" for name in other)
            raise ValueError(f"the ControlNet {self.name} is one for {kinds[0]} and the UNet is of {kinds[1]} "
                             f"({said}): take one that was made for this UNet")

    def reading(self) -> list[Tensor]:
        return list(self.input_hint_block.parameters())

    def read(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return (self.input_hint_block(pictures),)

    def residuals(self, x: Tensor, t: Tensor, seen: Context, read: Sequence[Tensor], unet: UNetConfig,
                  stages: int | None = None) -> Residuals:
        """Its outputs for x [n, 4, h, w], or with the context's channels where it was trained on those."""
        return self(x, t, seen, read[0], stages)

    def forward(self, x: Tensor, t: Tensor, seen: Context, guided: Tensor, stages: int | None = None) -> Residuals:
        """x [n, C, h, w], t [n], tokens [n, L, D], guided [n, model_channels, h, w], what `read` gives."""
        config = self.config
        if x.shape[1] != config.in_channels:
            x = seen.beside_x(x)
        known = {"label": config.classes, "guidance": config.guidance_dim}
        told: dict[str, Any] = {name: None for name, size in known.items() if size is None}  # the UNet's alone
        seen = replace(seen, **told)
        self._check(x, t, seen.tokens, seen.mask)
        emb = self._embedding(x, t, seen)
        skips: dict[int, Tensor] = {}
        for i, (stage, out) in enumerate(zip(self.input_blocks[:stages], self.zero_convs)):
            x = stage(x, emb, seen.tokens, seen.mask)
            x = x + guided if i == 0 else x
            skips[i] = out(x)
        if stages is not None:
            return Residuals(skips=skips)
        x = self.middle_block(x, emb, seen.tokens, seen.mask)
        return Residuals(skips=skips, middle=self.middle_block_out(x))
