"""What a conditioning is, and the two that are not made of others: constant tokens, and a prompt seen through ELLA."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ella_kd.models.text import TextFeatures
from ella_kd.models.tsc import TSC

Levels = tuple[float, ...]
"""The sigmas of a call, known to the host: one for the whole batch, or one per row."""


@dataclass(frozen=True, eq=False)
class Context:
    """What the UNet takes beside x and t.

    tokens [B, L, D]. mask [B, L]: bool, True at real tokens, or the factors >= 0 by which the tokens' attention is
    multiplied; None: all are plainly seen. channels [B, C, h, w], concatenated to x (InstructPix2Pix, inpainting), or
    None.
    """

    tokens: Tensor
    mask: Tensor | None = None
    channels: Tensor | None = None


class Conditioning(ABC):
    """A function of the timestep: `conditioning(t)` takes t [B] fp32 and gives a Context of B rows.

    One row broadcasts to any B; otherwise the rows must equal B, or ValueError says so.
    """

    @property
    @abstractmethod
    def rows(self) -> int:
        """The number of samples it speaks of; 1 fits every batch."""

    @abstractmethod
    def __call__(self, t: Tensor) -> Context:
        """t [B] fp32 -> Context of B rows."""

    @abstractmethod
    def repeat(self, n: int) -> "Conditioning":
        """n samples per row, side by side: rows a, b become a, a, b, b for n = 2."""

    @property
    def varies(self) -> bool:
        """Whether it switches with sigma, so that `at` has something to decide."""
        return False

    def at(self, levels: Levels) -> "Conditioning":
        """The same at these noise levels, with every switch decided."""
        return self

    def planned(self, timesteps: Tensor) -> "Conditioning":
        """The same function on timesteps [N] fp32 only, evaluated now in one batched TSC call and later looked up."""
        from ella_kd.conditioning.plan import plan

        return plan([self], timesteps)[0]

    def leaves(self) -> "list[Conditioning]":
        """The conditionings this one is made of that are not themselves made of others."""
        return [self]

    def map_leaves(self, f: "Map") -> "Conditioning":
        """The same combination of f(leaf)."""
        return f(self)


Map = Callable[[Conditioning], Conditioning]


@dataclass(frozen=True, eq=False)
class Constant(Conditioning):
    """The same tokens at every timestep: a CLIP prompt. features: tokens [B, L, D], mask [B, L] or None."""

    features: TextFeatures

    def __post_init__(self) -> None:
        _check_features(self.features)

    @property
    def rows(self) -> int:
        return len(self.features.tokens)

    def __call__(self, t: Tensor) -> Context:
        tokens, mask = self.features.tokens, self.features.mask
        return Context(to_batch(tokens, len(t)), None if mask is None else to_batch(mask, len(t)))

    def repeat(self, n: int) -> "Constant":
        return Constant(_take(self.features, _all_rows(self.features).repeat_interleave(n)))


@dataclass(frozen=True, eq=False)
class ELLA(Conditioning):
    """A prompt seen through the Timestep-Aware Semantic Connector (arXiv 2403.05135): `tsc(features, t, mask)`.

    features: T5 tokens [P, L, D] of P prompts. prompt [rows], int64: which prompt each row shows; by default one row
    per prompt. However many rows show a prompt, a plan computes it once.
    Raises ValueError when the features do not have the connector's width.
    """

    tsc: TSC
    features: TextFeatures
    prompt: Tensor | None = None

    def __post_init__(self) -> None:
        _check_features(self.features)
        if self.prompt is not None and (self.prompt.ndim != 1 or self.prompt.dtype != torch.int64
                                        or not len(self.prompt)):
            raise ValueError("prompt must be int64 [rows], which of the features' prompts each row shows, got "
                             f"{self.prompt.dtype} {list(self.prompt.shape)}")
        expected, got = self.tsc.input_dim, self.features.tokens.shape[2]
        if got != expected:
            raise ValueError(f"the connector takes features of width {expected}, got {got}: encode prompts with the "
                             "T5 it was trained with, and give CLIP's as Constant(features)")

    @property
    def rows(self) -> int:
        return len(self.prompts)

    @property
    def prompts(self) -> Tensor:
        """[rows], int64: which prompt each row shows."""
        return _all_rows(self.features) if self.prompt is None else self.prompt

    def __call__(self, t: Tensor) -> Context:
        shown = _take(self.features, to_batch(self.prompts, len(t)))
        return Context(self.tsc(shown.tokens, t, shown.mask))

    def repeat(self, n: int) -> "ELLA":
        return ELLA(self.tsc, self.features, self.prompts.repeat_interleave(n))


def levels_of(sigma: Tensor, level: float | None = None) -> Levels:
    """The noise levels of a call for `at`, each once if they are all the same.

    sigma [B]; level: the sigma of all rows where the caller knows it, which spares reading it back from the device.
    """
    if level is not None:
        return (level if sigma.dtype == torch.float64 else float(np.float32(level)),)  # rounded as sigma was
    levels = tuple(sigma.tolist())
    return levels[:1] if len(set(levels)) == 1 else levels


def above(level: float, boundary: float) -> bool:
    """level > boundary, both in fp32: a boundary written 0.1 is hit by the 0.1 of an fp32 run and of an fp64 one."""
    return bool(np.float32(level) > np.float32(boundary))


def to_batch(x: Tensor, batch: int) -> Tensor:
    """One row expanded to a batch; as many rows as the batch has, as they are. ValueError for any other number."""
    if len(x) not in (1, batch):
        raise ValueError(f"the conditioning has {len(x)} rows and the batch {batch}: give one row, or one per sample "
                         "(conditioning.repeat(n) makes n samples of each prompt)")
    return x.expand(batch, *x.shape[1:])


def _all_rows(features: TextFeatures) -> Tensor:
    return torch.arange(len(features.tokens), device=features.tokens.device)


def _take(features: TextFeatures, rows: Tensor) -> TextFeatures:
    return TextFeatures(features.tokens[rows], None if features.mask is None else features.mask[rows])


def _check_features(features: TextFeatures) -> None:
    tokens, mask = features.tokens, features.mask
    if tokens.ndim != 3 or 0 in tokens.shape or not tokens.is_floating_point():
        raise ValueError(f"text features must be floats [B, L, D] with B and L at least 1, got {tokens.dtype} "
                         f"{list(tokens.shape)}")
    if mask is not None and (not (mask.dtype == torch.bool or mask.is_floating_point())
                             or mask.shape != tokens.shape[:2]):
        raise ValueError(f"the mask of features {list(tokens.shape)} must be bool {list(tokens.shape[:2])}, True at "
                         f"real tokens, or floats, the factors of their attention; got {mask.dtype} "
                         f"{list(mask.shape)}")
