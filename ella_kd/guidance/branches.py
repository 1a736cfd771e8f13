"""Rules with other branches than cond and uncond: a second, weaker model; an image to edit; a patched cond."""

from dataclasses import dataclass, replace
from itertools import repeat

from torch import Tensor

from ella_kd.conditioning import Levels, above
from ella_kd.denoiser import LDMDenoiser
from ella_kd.guidance.projections import plus
from ella_kd.guidance.rule import COND, UNCOND, Answers, Branch, Guidance, is_all
from ella_kd.models.patches import Patch
from ella_kd.models.prompt_to_prompt import SourceAttention
from ella_kd.scale import Scale

IMAGE = Branch("image")


@dataclass(frozen=True)
class AutoGuidance(Guidance):
    """Guidance away from a weaker version of the model itself (Karras et al. 2024, arXiv 2406.02507).

    base + (scale - 1) * (D1 - D0): D1 is the model's conditional answer and D0 that of `weak`, a denoiser with a
    smaller or less trained network, to the same condition. AutoGuidance(CFG(1), weak, scale) is the paper's D0 + scale
    * (D1 - D0); with another base both kinds of guidance add up. It helps as far as the weak model's errors are the
    model's own, only larger. Both see the same tokens, those of the guided model's connector. Scale 1 asks nothing of
    the weak model. Raises TypeError if weak is not a denoiser.
    """

    scales = ("scale",)
    base: Guidance
    weak: LDMDenoiser
    scale: Scale = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.weak, LDMDenoiser):
            raise TypeError(f"weak must be a denoiser, such as ELLADenoiser(unet, tsc), got {type(self.weak).__name__}")

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.base.branches if is_all(self.scale, 1) else (*self.base.branches, COND, self._weak)

    @property
    def _weak(self) -> Branch:
        return Branch("cond", model=self.weak)

    def __call__(self, answers: Answers) -> Tensor:
        guided = self.base(answers)
        if is_all(self.scale, 1):
            return guided
        return guided + answers.factor(plus(self.scale, -1)) * (answers[COND] - answers[self._weak])


@dataclass(frozen=True)
class InstructPix2Pix(Guidance):
    """Guidance by an instruction and by the image to edit, each with its scale (Brooks et al. 2022, arXiv 2211.09800).

    Equation 3, U + image * (I - U) + text * (C - I), of the conditions `cond` (instruction and image), `image` (the
    image alone) and `uncond` (neither): any three conditions of which each says more than the last. An answer whose
    weight is 0 is not asked for: image scale 1 needs no U, equal scales need no I.
    """

    scales = ("text", "image")
    text: Scale = 7.5
    image: Scale = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.text, tuple) and isinstance(self.image, tuple) and len(self.text) != len(self.image):
            raise ValueError(f"text and image must have as many scales, got {len(self.text)} and {len(self.image)}")

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(branch for branch, weight in self._weights() if not is_all(weight, 0))

    def __call__(self, answers: Answers) -> Tensor:
        # Only weights of 0 are left out, in a fixed order: a row's bits do not depend on its batch.
        terms = [answers[b] * answers.factor(w) for b, w in self._weights() if not is_all(w, 0)]
        return sum(terms[1:], terms[0])

    def _weights(self) -> tuple[tuple[Branch, Scale], ...]:
        text, image = self.text, self.image
        assert not callable(text) and not callable(image)
        if isinstance(text, float) and isinstance(image, float):
            return (UNCOND, 1 - image), (IMAGE, image - text), (COND, text)
        pairs = list(zip(repeat(text) if isinstance(text, float) else text,
                         repeat(image) if isinstance(image, float) else image))
        return ((UNCOND, tuple(1 - i for _, i in pairs)), (IMAGE, tuple(i - t for t, i in pairs)),
                (COND, tuple(t for t, _ in pairs)))


@dataclass(frozen=True)
class Patched(Guidance):
    """base, of a conditional answer with a patch in the UNet, where sigma > sigma_lo.

    Where the rows of a call stand at several noise levels, one above sigma_lo patches all.
    """

    base: Guidance
    patch: Patch
    sigma_lo: float = 0.0

    @property
    def varies(self) -> bool:
        return True

    def at(self, levels: Levels) -> Guidance:
        base = self.base.at(levels)
        return Patched(base, self.patch) if any(above(level, self.sigma_lo) for level in levels) else base

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(self._own if branch == COND else branch for branch in self.base.branches)

    @property
    def _own(self) -> Branch:
        return Branch("cond", self.patch)

    def __call__(self, answers: Answers) -> Tensor:
        return self.base(replace(answers, denoised={**answers.denoised, COND: answers[self._own]}))


@dataclass(frozen=True)
class PromptToPrompt(Guidance):
    """base, of a batch whose first row is the source: the conditional answers of the others look at their text where
    the first looks at its own, while sigma > cross_lo, and at themselves as it does, while sigma > self_lo (Hertz et
    al. 2022, arXiv 2208.01626).

    `PromptToPrompt(CFG(7), SourceAttention(unet.places, pixels=256), self_lo=2.3)`, with equal seeds for all rows. The
    paper's .8 and .4 of the steps of DDIM end at sigma .57 and 2.3 of Stable Diffusion.
    Where the rows of a call stand at several noise levels, one above a bound is enough.
    """

    base: Guidance
    patch: SourceAttention
    cross_lo: float = 0.0
    self_lo: float = 0.0

    @property
    def varies(self) -> bool:
        return True

    def at(self, levels: Levels) -> Guidance:
        cross, itself = (any(above(level, lo) for level in levels) for lo in (self.cross_lo, self.self_lo))
        patch = self.patch if cross else replace(self.patch, tokens=None, weights=None, own=True)
        if not itself:
            patch = replace(patch, pixels=0)
        base = self.base.at(levels)
        return base if patch.plain else Patched(base, patch)

    @property
    def branches(self) -> tuple[Branch, ...]:
        raise AssertionError("a rule is resolved by at() before it is asked")

    def __call__(self, answers: Answers) -> Tensor:
        raise AssertionError("a rule is resolved by at() before it is called")
