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
