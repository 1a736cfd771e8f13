"""How a network is told the timestep."""

import math

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """The sinusoid of a diffusion timestep, `[cos | sin]`, max period 10,000 (LDM, and ELLA's flip_sin_to_cos).

    t [B], fractional values welcome -> [B, channels] fp32, always: near t = 1000 fp16 steps by 0.5. The frequencies
    are fp32 too, as the published models were trained: float64 ones move the result by 6e-5 at t = 999.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_embedding(scale: Tensor, channels: int) -> Tensor:
    """The sinusoid of a guidance scale, as networks distilled with it are told: 1000 (scale - 1), `[sin | cos]`.

    scale [B] -> [B, channels] fp32 (LCM, Luo et al. 2023, arXiv 2310.04378; the last frequency is 1 / 10,000).
    """
    half = channels // 2
    step = -math.log(10000) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=scale.device) * step)
    angles = ((scale.float() - 1) * 1000)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
