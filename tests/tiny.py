"""Small networks with random weights, and stand-ins that show what they were given."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ella_kd.bound import Branch
from ella_kd.conditioning import levels_of
from ella_kd.denoiser import Condition, Denoiser, LDMDenoiser
from ella_kd.models.patches import Patch
from ella_kd.models.text import TextFeatures
from ella_kd.models.tsc import TSC
from ella_kd.models.unet import UNet, UNetConfig
from ella_kd.samplers import Prediction

WIDTH, FEATURES, LATENTS = 24, 12, 5
M = TypeVar("M", bound=nn.Module)


def randomised(module: M, seed: int, std: float = 0.2) -> M:
    """Every weight drawn anew: fresh networks start with zeros that hide what they do."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * std
    return module.requires_grad_(False)


def tiny_unet(seed: int = 0) -> UNet:
    return randomised(UNet(UNetConfig(4, 4, 32, (1, 2), 1, (True, True), WIDTH, 2)), seed, 0.1)


def sharp_unet() -> UNet:
    """A tiny UNet in fp64 whose attention is not nearly uniform, so that queries matter."""
    unet = tiny_unet().double()
    for place in unet.places:
        attn = unet.get_submodule(place).transformer_blocks[0].attn1  # type: ignore[union-attr, index]
        attn.to_q.weight *= 8
        attn.to_k.weight *= 8
    return unet


def tiny_tsc(seed: int = 1) -> TSC:
    return randomised(TSC(32, 32, WIDTH, 2, 2, LATENTS, FEATURES), seed)


def features(*lengths: int, seed: int = 2, width: int = FEATURES) -> TextFeatures:
    """Prompts of these lengths, padded with garbage to the longest; the mask is None if none is padded."""
    longest = max(lengths)
    tokens = torch.randn(len(lengths), longest, width, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return TextFeatures(torch.where(mask[..., None], tokens, 100.0), None if mask.all() else mask)


def row(of: TextFeatures, i: int) -> TextFeatures:
    """The i-th prompt alone, its padding cut off."""
    kept = of.tokens[i] if of.mask is None else of.tokens[i][of.mask[i]]
    return TextFeatures(kept[None])


def noise(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class PointwiseTSC(nn.Module):
    """Tokens that say which timestep and which prompt they are for; counts its calls and their rows."""

    input_dim = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, tokens: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls.append(len(t))
        t, prompt = torch.broadcast_tensors(t[:, None], tokens[:, :1, 0])
        return torch.stack([t, prompt], 2)


class PointwiseUNet(nn.Module):
    """A smooth function of each value, of t and of the first token; keeps the t and the context of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.t: list[Tensor] = []
        self.context: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        self.t.append(t)
        self.context.append(context)
        shift = (t / 1000).to(x.dtype) + context[:, 0, -1]
        return 0.9 * x + 0.1 * torch.sin(x + shift[:, None, None, None])


def answer(denoiser: LDMDenoiser, x: Tensor, sigma: Tensor, cond: Condition, patch: Patch | None = None) -> Tensor:
    """The denoised of one condition, its rows patched or not, by a call of its own."""
    branch = Branch("cond", patch)
    return denoiser.bind(x, cond=cond)(x, levels_of(sigma), only=branch).denoised


def planned(denoiser: Denoiser, x: Tensor, sigma: Tensor, need_uncond: bool = False, **args: Any) -> Prediction:
    """What one run that knows the sigma of every row beforehand says of each row at its own."""
    bound = denoiser.bind(x, sigma, need_uncond=need_uncond, **args)
    rows = [bound(x, float(level)) for level in sigma.to(x.dtype)]

    def own(name: str) -> Any:
        found = [getattr(prediction, name) for prediction in rows]
        return None if found[0] is None else torch.stack([found[i][i] for i in range(len(x))])

    return Prediction(own("denoised"), own("cond"), own("uncond"))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())
