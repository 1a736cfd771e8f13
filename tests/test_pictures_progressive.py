"""DemoFusion against its published steps, restated in its own coordinates."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ella_kd import CFGDenoiser, LDMDenoiser
from ella_kd.models.context import Context
from ella_kd.models.demofusion import Dilated, LocalAndGlobal
from ella_kd.pictures.progressive import sample_progressively
from ella_kd.pictures.segments import other_seeds
from ella_kd.samplers import randn
from test_models_tiled import Listening
from tiny import WIDTH, noise, relative, tiny_unet

SIDE, SEED = 4, 3
TOKENS = noise(1, 3, WIDTH, seed=6, dtype=torch.float64)


def published(unet: Any, latents: Tensor, timesteps: list[int], noises: dict[int, Tensor], scale: int) -> Tensor:
    """The latents of all phases, for one picture: x sqrt(a) + n sqrt(1 - a), DDIM; windows of SIDE without jitter."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    of = [alphas[t] for t in timesteps] + [torch.tensor(1.0, dtype=torch.float64)]

    def moved(i: int, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """DDIM's step of x by the eps of what is seen."""
        eps = unet(x if seen is None else seen, torch.tensor([float(timesteps[i])]), Context(TOKENS))
        origin = (x - (1 - of[i]).sqrt() * eps) / of[i].sqrt()
        return of[i + 1].sqrt() * origin + (1 - of[i + 1]).sqrt() * eps

    for i in range(len(timesteps)):
        latents = moved(i, latents)
    std, mean = latents.std(), latents.mean()
    for k in range(2, scale + 1):
        latents = F.interpolate(latents, (SIDE * k, SIDE * k), mode="bicubic")
        noisy = [a.sqrt() * latents + (1 - a).sqrt() * noises[k] for a in of[:-1]]
        latents = noisy[0]
        for i, t in enumerate(timesteps):
            c = 0.5 * (1 + math.cos(math.pi * (1000 - t) / 1000))
            latents = latents * (1 - c**3) + noisy[i] * c**3
            local, count = torch.zeros_like(latents), torch.zeros_like(latents)
            for top in range(0, SIDE * k - SIDE + 1, SIDE // 2):
                for left in range(0, SIDE * k - SIDE + 1, SIDE // 2):
                    local[..., top:top + SIDE, left:left + SIDE] += moved(i, latents[..., top:top + SIDE,
                                                                                    left:left + SIDE])
                    count[..., top:top + SIDE, left:left + SIDE] += 1
            whole, places = torch.zeros_like(latents), torch.arange(2 * k - 1) - (k - 1)
            line = torch.exp(-places.double() ** 2 / (2 * (0.99 * c + 0.01) ** 2))
            kernel = torch.outer(line, line) / line.sum() ** 2
            blurred = F.conv2d(latents, kernel.repeat(4, 1, 1, 1), padding=k - 1, groups=4)
            blurred = (blurred - blurred.mean()) / blurred.std() * latents.std() + latents.mean()
            for h in range(k):
                for w in range(k):
                    whole[..., h::k, w::k] = moved(i, latents[..., h::k, w::k], blurred[..., h::k, w::k])
            latents = local / count * (1 - c) + whole * c
        latents = (latents - latents.mean()) / latents.std() * std + mean
    return latents


def test_the_published_steps() -> None:
    unet, timesteps, scale = tiny_unet().double(), [999, 700, 300, 40], 3
    plain = LDMDenoiser(unet)
    sigmas = torch.cat([plain.t_to_sigma(torch.tensor(timesteps, dtype=torch.float64)), torch.zeros(1)])
    start = randn((1, 4, SIDE, SIDE), [SEED], dtype=torch.float64)
    noises = {k: randn((1, 4, SIDE * k, SIDE * k), other_seeds([SEED], k, scale)).double() for k in (2, 3)}
    want = published(unet, start / (1 + sigmas[0] ** 2).sqrt() * sigmas[0], timesteps, noises, scale)
    got = sample_progressively(
        "euler", lambda k: LDMDenoiser(LocalAndGlobal(unet, k, SIDE)) if k > 1 else plain, start * sigmas[0],
        sigmas, {"cond": TOKENS}, scale=scale, seeds=[SEED], disable=True)
    assert relative(got, want) < 1e-7  # t is fp32


def test_rows_are_their_own_and_sizes_need_not_divide() -> None:
    """A batch is its rows one by one; with k = 1 nothing is blurred away, and the network's own answer comes back."""
    unet = tiny_unet().double()
    x, t = noise(3, 4, 7, 11, dtype=torch.float64), torch.tensor([900.0, 500.0, 20.0])
    context = Context(noise(3, 3, WIDTH, seed=4, dtype=torch.float64))
    network = LocalAndGlobal(unet, 2, 6)
    together = network(x, t, context)
    for i in range(3):
        assert relative(network(x[i:i + 1], t[i:i + 1], context.take([i])), together[i:i + 1]) < 1e-12
    assert relative(Dilated(unet, 1)(x, t, context), unet(x, t, context)) < 1e-12


def test_channels_are_taken_apart_with_the_picture() -> None:
    channels = noise(2, 4, 5, 7, seed=2)
    network, x, t = Listening(), noise(2, 4, 5, 7), torch.zeros(2)
    with_them = Dilated(network, 2)(x, t, Context(noise(2, 2, 24), channels=channels))
    without = Dilated(network, 2)(x, t, Context(noise(2, 2, 24)))
    assert relative(with_them - without, channels) < 1e-5


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "dpmpp_2m_cfg_pp"])
def test_any_sampler(sampler: str) -> None:
    """With the same seeds the same latents; others for other seeds."""
    unet = tiny_unet()
    def denoiser_of(k: int) -> CFGDenoiser:
        return CFGDenoiser(LDMDenoiser(LocalAndGlobal(unet, k, 4) if k > 1 else unet))

    sigmas = torch.tensor([14.0, 3.0, 0.5, 0.0])
    args = {"cond": TOKENS.float(), "uncond": TOKENS.float() * 0.5, "cond_scale": 0.5}
    runs = [sample_progressively(sampler, denoiser_of, noise(1, 4, 4, 4) * 14, sigmas, args, scale=2, seeds=[seed],
                                 disable=True) for seed in (1, 1, 2)]
    assert runs[0].shape == (1, 4, 8, 8) and runs[0].isfinite().all()
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    with pytest.raises(ValueError, match="scale is how many times larger"):
        sample_progressively(sampler, denoiser_of, noise(1, 4, 4, 4), sigmas, args, scale=0)
