"""The miniature's autoencoder: f = 8; its encoder learns to write the code of a scene, its decoder to draw it."""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.miniature.latents import codes
from benchmarks.miniature.loop import Stage
from benchmarks.miniature.scenes import Scene, parse, random_scene, render, to_pictures, to_tensor
from ella_kd.models import AutoencoderKL, VAEConfig

CONFIG = VAEConfig(channels=32, channel_mult=(1, 1, 2, 3), num_res_blocks=1)
NOISE = 0.15  # the largest standard deviation of what the decoder must bear: sampled latents are not quite codes
SPREAD = 0.02  # standard deviation of the encoder's Gaussian, in scaled latents


def _round_trip(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.decode(vae.encode(part)) for part in images.split(64)])


class Autoencoder(Stage):
    name = "vae"

    def __init__(self) -> None:
        super().__init__()
        self.vae = AutoencoderKL(CONFIG)

    def forward(self, rng: random.Random, step: int, batch: int, progress: float) -> Tensor:
        device = self.vae.quant_conv.weight.device
        scenes = [random_scene(rng, rng.randint(0, 9)) for _ in range(batch)]
        latents, images = codes(scenes).to(device), to_tensor([render(scene) for scene in scenes]).to(device)
        noise = NOISE * torch.rand(batch, 1, 1, 1, device=device) * torch.randn_like(latents)
        decoded = self.vae.decode(latents + noise).float()
        written = self.vae.encode(images[::2]).float()  # the easier half of the task: half a batch is enough
        return F.l1_loss(decoded, images) + 4 * F.mse_loss(decoded, images) + F.mse_loss(written, latents[::2])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The share of held-out scenes that parse exactly: drawn from their code, and after encode and decode."""
        device = self.vae.quant_conv.weight.device
        rng = random.Random(1)
        scenes = [random_scene(rng, 1 + n % 4, unseen=True) for n in range(128)]
        images, latents = to_tensor([render(scene) for scene in scenes]).to(device), codes(scenes).to(device)

        def exact(decoded: Tensor) -> float:
            found = [parse(picture) for picture in to_pictures(decoded)]
            return sum(map(Scene.__eq__, found, scenes)) / len(scenes)

        error = self.vae.encode(images) - latents
        drawn, again = self.vae.decode(latents), _round_trip(self.vae, images)
        noisy = self.vae.decode(latents + 0.1 * torch.randn_like(latents))
        return {"drawn": exact(drawn), "round_trip": exact(again), "noisy": exact(noisy),
                "latent_rms": error.square().mean().sqrt().item(),
                "grey_levels": 127.5 * (again.clamp(-1, 1) - images).abs().mean().item()}  # fmt: skip

    @torch.no_grad()
    def model(self) -> AutoencoderKL:
        """The autoencoder, its encoder's Gaussian of the same small width everywhere."""
        channels = CONFIG.latent_channels
        weight, bias = self.vae.quant_conv.parameters()  # the first half gives the mean, the second the log variance
        weight[channels:], bias[channels:] = 0.0, 2 * math.log(SPREAD / CONFIG.scale)
        return self.vae
