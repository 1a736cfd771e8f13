"""The miniature's autoencoder: f = 4, trained to give every sprite back exactly, then whitened for SD's scale."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.miniature.loop import Stage
from benchmarks.miniature.scenes import Scene, parse, random_scene, render, to_pictures, to_tensor
from ella_kd.models import AutoencoderKL, VAEConfig

CONFIG = VAEConfig(channels=32, channel_mult=(1, 2, 2), num_res_blocks=1)
KL_WEIGHT = 1e-6
SCALE = 0.18215


def scenes_of(rng: random.Random, batch: int, most: int = 3) -> list[Scene]:
    return [random_scene(rng, rng.randint(1, most)) for _ in range(batch)]


class Autoencoder(Stage):
    name = "vae"

    def __init__(self) -> None:
        super().__init__()
        self.vae = AutoencoderKL(CONFIG)

    def forward(self, rng: random.Random, batch: int, progress: float) -> Tensor:
        device = next(self.parameters()).device
        images = to_tensor([render(scene) for scene in scenes_of(rng, batch, most=6)]).to(device)
        mean, logvar = self.vae.moments(images)
        latents = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        decoded = self.vae.decode(latents * SCALE)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + KL_WEIGHT * kl

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The share of held-out scenes that parse exactly after encode and decode."""
        device = next(self.parameters()).device
        rng = random.Random(1)
        scenes = [random_scene(rng, rng.randint(1, 3), unseen=True) for _ in range(512)]
        images = to_tensor([render(scene) for scene in scenes]).to(device)
        decoded = torch.cat([self.vae.decode(self.vae.encode(part)) for part in images.split(64)])
        exact = [parse(picture) == scene for picture, scene in zip(to_pictures(decoded), scenes, strict=True)]
        return {"exact": sum(exact) / len(exact), "l1": F.l1_loss(decoded, images).item()}

    @torch.no_grad()
    def whitened(self) -> AutoencoderKL:
        """The autoencoder with a whitening of the latents folded into its two 1x1 convolutions, exactly.

        Its latents x 0.18215 have mean 0 and unit covariance: the files use Stable Diffusion's own scale, and the UNet
        meets decorrelated channels.
        """
        rng = random.Random(2)
        images = to_tensor([render(scene) for scene in scenes_of(rng, 1024)])
        means = torch.cat([self.vae.moments(part)[0] for part in images.split(64)])
        flat = means.permute(0, 2, 3, 1).reshape(-1, means.shape[1]).double()
        centre, channels = flat.mean(0), flat.shape[1]
        values, vectors = torch.linalg.eigh(torch.cov(flat.T))
        whitening = vectors @ torch.diag(values.rsqrt()) @ vectors.T / SCALE

        weight, bias = self.vae.quant_conv.parameters()  # the first half gives the mean, the second the log variance
        bias[:channels] = whitening @ (bias[:channels].double() - centre)
        weight[:channels] = (whitening @ weight[:channels].double().flatten(1))[..., None, None]
        bias[channels:] += 2 * whitening.diagonal().log()
        weight, bias = self.vae.post_quant_conv.parameters()
        matrix = weight.double().flatten(1)
        bias.copy_(bias.double() + matrix @ centre)
        weight.copy_((matrix @ torch.linalg.inv(whitening))[..., None, None])
        return self.vae
