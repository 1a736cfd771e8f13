"""The miniature's diffusion: first a plain Stable Diffusion on web captions, then ELLA's connector on dense ones.

As in ELLA (arXiv 2403.05135, section 3) the connector is all that learns in the second stage: UNet and T5 are frozen.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.miniature import captions
from benchmarks.miniature.captions import Word
from benchmarks.miniature.loop import Stage
from benchmarks.miniature.questions import ask, summary
from benchmarks.miniature.scenes import Scene, parse, random_scene, render, to_pictures, to_tensor
from benchmarks.miniature.text import PARAGRAPH, WIDTH, CLIPReader, T5Reader
from ella_kd import CFGDenoiser, ELLADenoiser, LDMDenoiser
from ella_kd.models import (
    TSC,
    AutoencoderKL,
    NoiseSchedule,
    TextFeatures,
    UNet,
    UNetConfig,
)
from ella_kd.samplers import get_sigmas_karras, sample_dpmpp_2m

Writer = Callable[[Scene, random.Random], list[Word]]

LATENTS = 8
UNET = UNetConfig(
    model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=1, depth=(0, 1, 0), context_dim=WIDTH
)
CONNECTOR = {
    "time_channel": 64, "time_embed_dim": WIDTH, "width": WIDTH, "layers": 4, "heads": 8, "num_latents": 24,
    "input_dim": WIDTH,
}  # fmt: skip
POOL = 4096
NO_PROMPT = 0.1  # how often the caption is empty, for classifier-free guidance


@dataclass(frozen=True)
class Curriculum:
    """How many things a training scene has: one at first, then up to `most`, the larger numbers more often."""

    most: int = 2
    alone_until: float = 0.12

    def count(self, rng: random.Random, progress: float) -> int:
        if progress < self.alone_until:
            return 1
        counts = range(1, self.most + 1)
        return rng.choices(counts, weights=counts)[0]


class Pool:
    """Scenes with their latents; a part of it is renewed at every draw, so the world never runs out."""

    def __init__(self, vae: AutoencoderKL, curriculum: Curriculum) -> None:
        self.vae, self.curriculum = vae, curriculum
        self.scenes: list[Scene] = []
        self.latents = torch.empty(0)
        self.next = 0

    @torch.no_grad()
    def _make(self, rng: random.Random, count: int, progress: float) -> tuple[list[Scene], Tensor]:
        scenes = [random_scene(rng, self.curriculum.count(rng, progress)) for _ in range(count)]
        images = to_tensor([render(scene) for scene in scenes]).to(self.vae.quant_conv.weight.device)
        return scenes, torch.cat([self.vae.encode(part) for part in images.split(256)])

    def draw(self, rng: random.Random, batch: int, progress: float) -> tuple[list[Scene], Tensor]:
        if not self.scenes:
            self.scenes, self.latents = self._make(rng, POOL, progress)
        count = max(1, batch // 8)
        fresh, latents = self._make(rng, count, progress)
        for scene, latent in zip(fresh, latents, strict=True):
            self.scenes[self.next], self.latents[self.next] = scene, latent
            self.next = (self.next + 1) % POOL
        chosen = [rng.randrange(POOL) for _ in range(batch)]
        return [self.scenes[i] for i in chosen], self.latents[chosen]


def draw_timesteps(batch: int, device: torch.device) -> Tensor:
    """Uniform timesteps, 70 % of them from the upper part where the layout of a scene is decided."""
    low = torch.where(torch.rand(batch, device=device) < 0.7, 550.0, 0.0)
    return low + torch.rand(batch, device=device) * (999.0 - low)


def loss_weight(sigma: Tensor) -> Tensor:
    """Min-SNR-5 (arXiv 2303.09556) for eps, times clamp(SNR^-0.5, 1, 12).

    Where a thing stands is decided at the highest noise, where x0 is under 1 % of the eps loss: with min-SNR alone the
    place words never get a gradient.
    """
    snr = sigma**-2
    return snr.clamp(max=5.0) / snr * sigma.clamp(1.0, 12.0)


def _captions(scenes: list[Scene], write: Writer, rng: random.Random) -> list[str]:
    return ["" if rng.random() < NO_PROMPT else captions.text(write(scene, rng)) for scene in scenes]


class DiffusionStage(Stage):
    """What the two stages share: the pool, the weighted `denoiser.loss`, and a look at held-out scenes."""

    denoiser: LDMDenoiser
    encode: Callable[..., TextFeatures]

    def __init__(self, vae: AutoencoderKL, curriculum: Curriculum) -> None:
        super().__init__()
        self.vae, self.curriculum = vae, curriculum
        self.pool = Pool(vae, curriculum)

    @abstractmethod
    def features(self, scenes: list[Scene], rng: random.Random) -> TextFeatures:
        ...

    @abstractmethod
    def prompts(self, scenes: list[Scene], rng: random.Random) -> list[str]:
        """The complete captions that this stage is scored on."""

    def forward(self, rng: random.Random, batch: int, progress: float) -> Tensor:
        scenes, latents = self.pool.draw(rng, batch, progress)
        sigma = self.denoiser.t_to_sigma(draw_timesteps(batch, latents.device))
        losses = self.denoiser.loss(latents, torch.randn_like(latents), sigma, self.features(scenes, rng))
        return (loss_weight(sigma) * losses).mean()

    @torch.no_grad()
    def evaluate(self, each: int = 48, steps: int = 12, scale: float = 4.0) -> dict[str, Any]:
        """Scores on held-out scenes of one, two (and three) things; every scene has an unseen combination."""
        names = ("one", "two", "three")[: self.curriculum.most]
        result: dict[str, Any] = {}
        for count, name in enumerate(names, start=1):
            rng = random.Random(f"held out {count}")
            scenes = [random_scene(rng, count, unseen=True) for _ in range(each)]
            found = self.sample(self.prompts(scenes, rng), steps, scale)
            result[name] = summary([ask(wanted, got) for wanted, got in zip(scenes, found, strict=True)])
        return result

    def sample(self, prompts: list[str], steps: int, scale: float) -> list[Scene]:
        """What the parser finds in a picture for each prompt."""
        device = self.vae.quant_conv.weight.device
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(prompts), 4, LATENTS, LATENTS, generator=generator).to(device)
        guided = CFGDenoiser(self.denoiser)
        sigmas = get_sigmas_karras(steps, guided.sigma_min, guided.sigma_max)
        extra_args = {"cond": self.encode(prompts), "uncond": self.encode([""]), "cond_scale": scale}
        latents = sample_dpmpp_2m(guided, noise * sigmas[0], sigmas, extra_args=extra_args, disable=True)
        return [parse(picture) for picture in to_pictures(self.vae.decode(latents))]


class PlainDiffusion(DiffusionStage):
    """Stable Diffusion in small: the UNet learns from a frozen CLIP-style encoder and web captions."""

    name = "unet"

    def __init__(self, vae: AutoencoderKL, clip: CLIPReader, curriculum: Curriculum) -> None:
        super().__init__(vae, curriculum)
        self.clip, self.encode = clip, clip.text_encoder()
        self.unet = UNet(UNET)
        self.denoiser = LDMDenoiser(self.unet, NoiseSchedule.sd15())

    def trained(self) -> nn.Module:
        return self.unet

    def features(self, scenes: list[Scene], rng: random.Random) -> TextFeatures:
        return self.encode(_captions(scenes, self.clip.write, rng))

    def prompts(self, scenes: list[Scene], rng: random.Random) -> list[str]:
        return [captions.text(self.clip.write_all(scene, rng)) for scene in scenes]


class ConnectorDiffusion(DiffusionStage):
    """ELLA in small: the connector learns from a frozen T5 and dense captions; the UNet stays as it is.

    Half of the batches are in fixed mode (128 positions, padding seen), half in flexible mode (real tokens only).
    """

    name = "tsc"

    def __init__(self, vae: AutoencoderKL, t5: T5Reader, unet: UNet, curriculum: Curriculum) -> None:
        super().__init__(vae, curriculum)
        self.t5, self.encode = t5, t5.text_encoder()
        self.tsc = TSC(**CONNECTOR)
        self.unet = unet
        self.denoiser = ELLADenoiser(unet, self.tsc, NoiseSchedule.sd15())

    def trained(self) -> nn.Module:
        return self.tsc

    def features(self, scenes: list[Scene], rng: random.Random) -> TextFeatures:
        prompts = _captions(scenes, self.t5.write, rng)
        return self.encode(prompts, max_length=PARAGRAPH if rng.random() < 0.5 else None)

    def prompts(self, scenes: list[Scene], rng: random.Random) -> list[str]:
        return [captions.text(self.t5.write_all(scene, rng)) for scene in scenes]
