"""Guidance away from what a weakened network says: PAG, SEG, SLG, and SAG, which weakens the network's input."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ella_kd.guidance.rule import COND, UNCOND, Answers, Branch, Guidance, is_all
from ella_kd.models.patches import BlurredQueries, IdentityAttention, Patch, SkipBlock, gaussian_blur
from ella_kd.scale import Scale

MIDDLE = ("middle_block.1",)


class _Perturbed(Guidance):
    """`base + scale * (C - C')`, C' the conditional answer with a patch in the UNet; scale 0 does not ask for C'."""

    scales = ("scale",)
    base: Guidance
    scale: Scale

    @abstractmethod
    def perturbation(self) -> Patch:
        """What C' changes in the UNet."""

    @property
    def branches(self) -> tuple[Branch, ...]:
        if is_all(self.scale, 0):
            return self.base.branches
        return (*self.base.branches, COND, Branch("cond", self.perturbation()))

    def __call__(self, answers: Answers) -> Tensor:
        guided = self.base(answers)
        if is_all(self.scale, 0):
            return guided
        return guided + (answers[COND] - answers[Branch("cond", self.perturbation())]) * answers.factor(self.scale)


@dataclass(frozen=True)
class Perturbed(_Perturbed):
    """Guidance away from what the network says with a patch of your own: `base + scale * (C - C')`."""

    base: Guidance
    patch: Patch
    scale: Scale = 3.0

    def perturbation(self) -> Patch:
        return self.patch


class _AtPlaces(_Perturbed):
    places: Sequence[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        places = (self.places,) if isinstance(self.places, str) else tuple(self.places)
        if not places:
            raise ValueError(f"{type(self).__name__} needs the transformer blocks to change, such as {MIDDLE}: "
                             "unet.places lists them")
        object.__setattr__(self, "places", places)


@dataclass(frozen=True)
class PAG(_AtPlaces):
    """Perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377): `base + scale * (C - C')`, where in C' every
    pixel of the UNet's blocks `places` attends to itself alone.

    `PAG(CFG(4.0), 3.0)` is the paper's setting for text prompts, `PAG(CFG(1.0), 3.0)` does without uncond: one UNet
    call of two rows per sample. The middle block is the paper's choice for Stable Diffusion.
    """

    base: Guidance
    scale: Scale = 3.0
    places: Sequence[str] = MIDDLE

    def perturbation(self) -> Patch:
        return IdentityAttention(tuple(self.places))


@dataclass(frozen=True)
class SEG(_AtPlaces):
    """Smoothed energy guidance (Hong 2024, arXiv 2408.00760): `base + scale * (C - C')`, where in C' the queries of the
    self-attention in `places` are blurred.

    The paper keeps scale at 3 and turns sigma, of the Gaussian in pixels of the feature map: 0 is base, inf gives every
    pixel the mean query.
    """

    base: Guidance
    scale: Scale = 3.0
    sigma: float = math.inf
    places: Sequence[str] = MIDDLE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.perturbation()  # refuses a wrong sigma

    def perturbation(self) -> Patch:
        return BlurredQueries(tuple(self.places), self.sigma)


@dataclass(frozen=True)
class SLG(_AtPlaces):
    """Skip-layer guidance (Stability AI 2024, for SD 3.5 medium): `base + scale * (C - C')`, where C' does without the
    blocks `places`.

    There it runs at scale 2.8 in the first fifth of the steps only: `SLG(CFG(4.0), lambda s: 2.8 if s > 5 else 0)`.
    What is left out is the transformer block; the projections around it stay.
    """

    base: Guidance
    scale: Scale = 2.8
    places: Sequence[str] = MIDDLE

    def perturbation(self) -> Patch:
        return SkipBlock(tuple(self.places))


@dataclass(frozen=True)
class SAG(Guidance):
    """Self-attention guidance (Hong et al. 2023, arXiv 2210.00939, eq. 16 and 25): away from what the network says
    where the details it attends to are blurred.

    `base + scale * sigma_t * (eps(x') - eps(x))`: D the answer that is examined, uncond's if base asks for it, else
    cond's; D' = D, blurred where a pixel of the map receives an attention above threshold (of all queries together,
    mean of the heads: 1 is the average); x' = D' + sigma_t * eps(x). As `sigma_t * eps(x') = x' - D(x')`, this is
    `base + scale * (D' - D(x'))`. It takes one more UNet call, after the others.

    sigma: of the blur, in latent pixels (`gaussian_blur`; the authors' code pads without repeating the edge). place:
    the block whose map is read; the map is brought to the latents' size by repeating its pixels.
    Raises ValueError for a wrong sigma, or for two SAGs that watch one answer at different places.
    """

    scales = ("scale",)
    base: Guidance
    scale: Scale = 0.75
    sigma: float = 1.0
    threshold: float = 1.0
    place: str = MIDDLE[0]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma >= 0:
            raise ValueError(f"SAG's blur needs sigma >= 0, in latent pixels, inf for the mean; got {self.sigma}")

    @property
    def examined(self) -> Branch:
        return UNCOND if UNCOND in self.base.branches else COND

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.base.branches if is_all(self.scale, 0) else (*self.base.branches, self.examined)

    @property
    def watched(self) -> Mapping[Branch, str]:
        inner = super().watched
        if is_all(self.scale, 0):
            return inner
        if inner.get(self.examined, self.place) != self.place:
            raise ValueError(f"two SAGs watch {self.examined.cond} at {inner[self.examined]} and at {self.place}: one "
                             "answer is watched at one place")
        return {**inner, self.examined: self.place}

    def __call__(self, answers: Answers) -> Tensor:
        guided = self.base(answers)
        if is_all(self.scale, 0):
            return guided
        denoised = answers[self.examined]
        attended = attended_pixels(answers.attention(self.examined), denoised, self.threshold)
        degraded = torch.where(attended, gaussian_blur(denoised, self.sigma), denoised)
        again = answers.evaluate(degraded + (answers.x - denoised), self.examined)
        return guided + (degraded - again) * answers.factor(self.scale)


def attended_pixels(received: Tensor, latents: Tensor, threshold: float) -> Tensor:
    """Where a pixel receives more attention than threshold: SAG's mask, [B, 1, h, w] bool.

    received [B, 1, h', w'], of a map of any size; latents [B, C, h, w].
    """
    if len(received) != len(latents):
        raise ValueError(f"the attention of {len(received)} rows came for a batch of {len(latents)}: SAG looks at one "
                         "plain condition's, not at that of a composition")
    return F.interpolate((received > threshold).to(latents.dtype), latents.shape[2:], mode="nearest") > 0
