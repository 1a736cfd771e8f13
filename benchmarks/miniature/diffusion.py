"""The miniature's diffusion: first a plain Stable Diffusion on web captions, then ELLA's connector on dense ones.

As in ELLA (arXiv 2403.05135, section 3) the connector is all that learns in the second stage: UNet and T5 are frozen.
Latents are the codes of scenes, with the small error that the autoencoder's encoder leaves.
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
from benchmarks.miniature.latents import SIDE, codes, read
from benchmarks.miniature.loop import Stage
from benchmarks.miniature.questions import ask, summary
from benchmarks.miniature.scenes import Scene, random_scene
from benchmarks.miniature.text import PARAGRAPH, WIDTH, CLIPReader, T5Reader
from ella_kd import CFGDenoiser, ELLADenoiser, LDMDenoiser
from ella_kd.models import TSC, NoiseSchedule, TextFeatures, UNet, UNetConfig
from ella_kd.samplers import get_sigmas_karras, sample_dpmpp_2m

Writer = Callable[[Scene, random.Random], list[Word]]

#: Attention at 3x3 latents, one for each place, and in the middle.
UNET = UNetConfig(
    model_channels=64, channel_mult=(1, 3), num_res_blocks=1, depth=(0, 1), context_dim=WIDTH
)
#: Six latents for up to four things of five facts each: what they say at a timestep has to be chosen.
CONNECTOR = {
    "time_channel": 64, "time_embed_dim": WIDTH, "width": WIDTH, "layers": 4, "heads": 8, "num_latents": 6,
    "input_dim": WIDTH,
}  # fmt: skip
NO_PROMPT = 0.1  # how often the caption is empty, for classifier-free guidance
ERROR = 0.03  # standard deviation of what is added to the codes


@dataclass(frozen=True)
class Curriculum:
    """How many things a training scene has: one at first, then up to `most`, each number as often."""

    most: int = 4
    alone_until: float = 0.08

    def count(self, rng: random.Random, progress: float) -> int:
        return 1 if progress < self.alone_until else rng.randint(1, self.most)


def draw_timesteps(batch: int, device: torch.device) -> Tensor:
    """Timesteps in [0, 999]: where a scene is laid out (from 450 on) and where fills and rims are decided (to 300) more
    often than in between."""
    low, high = torch.tensor([[450.0, 0.0, 20.0], [999.0, 999.0, 300.0]], device=device)[:, _parts(batch, device)]
    return low + torch.rand(batch, device=device) * (high - low)


def _parts(batch: int, device: torch.device) -> Tensor:
    return torch.multinomial(torch.tensor([0.45, 0.25, 0.3], device=device), batch, replacement=True)


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
    """What the two stages share: the weighted `denoiser.loss`, and a look at held-out scenes."""

    denoiser: LDMDenoiser
    encode: Callable[..., TextFeatures]

    def __init__(self, curriculum: Curriculum) -> None:
        super().__init__()
        self.curriculum = curriculum

    @abstractmethod
    def features(self, scenes: list[Scene], rng: random.Random) -> TextFeatures:
        ...

    @abstractmethod
    def prompts(self, scenes: list[Scene], rng: random.Random) -> list[str]:
        """The complete captions that this stage is scored on."""

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.inner_model.parameters()).device

    def forward(self, rng: random.Random, step: int, batch: int, progress: float) -> Tensor:
        scenes = [random_scene(rng, self.curriculum.count(rng, progress)) for _ in range(batch)]
        latents = codes(scenes).to(self.device)
        latents = latents + ERROR * torch.randn_like(latents)
        sigma = self.denoiser.t_to_sigma(draw_timesteps(batch, self.device))
        losses = self.denoiser.loss(latents, torch.randn_like(latents), sigma, self.features(scenes, rng))
        return (loss_weight(sigma) * losses.float()).mean()

    @torch.no_grad()
    def evaluate(self, each: int = 24, counts: tuple[int, ...] = (1, 3)) -> dict[str, Any]:
        """Scores on held-out scenes of so many things; every scene has an unseen combination."""
        result: dict[str, Any] = {}
        for count in counts:
            rng = random.Random(f"held out {count}")
            scenes = [random_scene(rng, count, unseen=True) for _ in range(each)]
            found = self.sample(self.prompts(scenes, rng))
            result[str(count)] = summary([ask(wanted, got) for wanted, got in zip(scenes, found, strict=True)])
        return result

    def sample(self, prompts: list[str], steps: int = 12, scale: float = 3.0, seed: int = 0) -> list[Scene]:
        """What is read from the sampled latents of each prompt."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(prompts), 4, SIDE, SIDE, generator=generator).to(self.device)
        guided = CFGDenoiser(self.denoiser)
        sigmas = get_sigmas_karras(steps, guided.sigma_min, guided.sigma_max)
        extra_args = {"cond": self.encode(prompts), "uncond": self.encode([""]), "cond_scale": scale}
        return read(sample_dpmpp_2m(guided, noise * sigmas[0], sigmas, extra_args=extra_args, disable=True))


class PlainDiffusion(DiffusionStage):
    """Stable Diffusion in small: the UNet learns from a frozen CLIP-style encoder and web captions."""

    name = "unet"

    def __init__(self, clip: CLIPReader, curriculum: Curriculum) -> None:
        super().__init__(curriculum)
        self.clip, self.encode = clip, clip.text_encoder()
        self.unet = UNet(UNET)
        self.denoiser = LDMDenoiser(self.unet, NoiseSchedule.sd15())

    def trained(self) -> nn.Module:
        return self.unet

    def features(self, scenes: list[Scene], rng: random.Random) -> TextFeatures:
        return self.encode(_captions(scenes, self.clip.write, rng))

    def prompts(self, scenes: list[Scene], rng: random.Random) -> list[str]:
        return [captions.text(captions.tags(scene, rng, noise=0.0)) for scene in scenes]


class ConnectorDiffusion(DiffusionStage):
    """ELLA in small: the connector learns from a frozen T5 and dense captions; the UNet stays as it is.

    As ELLA was it is trained in fixed mode only: 128 positions, padding seen.
    """

    name = "tsc"

    def __init__(self, t5: T5Reader, unet: UNet, curriculum: Curriculum) -> None:
        super().__init__(curriculum)
        self.t5, self.encode = t5, t5.text_encoder()
        self.tsc = TSC(**CONNECTOR)
        self.unet = unet
        self.denoiser = ELLADenoiser(unet, self.tsc, NoiseSchedule.sd15())

    def trained(self) -> nn.Module:
        return self.tsc

    def features(self, scenes: list[Scene], rng: random.Random) -> TextFeatures:
        return self.encode(_captions(scenes, self.t5.write, rng), max_length=PARAGRAPH)

    def prompts(self, scenes: list[Scene], rng: random.Random) -> list[str]:
        return [captions.text(captions.dense(scene, rng)) for scene in scenes]
