"""The conditionings that are not made of others: constant tokens, a prompt seen through ELLA, or found in a plan, and
features that nobody has read yet."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ella_kd.conditioning.base import Conditioning, to_batch
from ella_kd.conditioning.plan import Plan, Table
from ella_kd.models.context import Context
from ella_kd.models.network import Levels
from ella_kd.models.text import TextFeatures, check_features
from ella_kd.models.tsc import TSC


@dataclass(frozen=True, eq=False)
class _OfFeatures(Conditioning):
    """A leaf that holds text features: tokens [rows, L, D], mask [rows, L] or None."""

    features: TextFeatures

    def __post_init__(self) -> None:
        check_features(self.features)

    @property
    def rows(self) -> int:
        return len(self.features.tokens)

    def repeat(self, n: int) -> Self:
        return type(self)(self.features.take(_all_rows(self.features).repeat_interleave(n)))


class Constant(_OfFeatures):
    """The same tokens at every timestep: a CLIP prompt. features: tokens [B, L, D], mask [B, L] or None, and perhaps
    the prompt's vector [B, P], which SDXL sees too."""

    def __call__(self, t: Tensor) -> Context:
        seen = self.features
        tokens, mask, vector = (None if x is None else to_batch(x, len(t))
                                for x in (seen.tokens, seen.mask, seen.vector))
        assert tokens is not None
        return Context(tokens, mask, vector=vector)


@dataclass(frozen=True, eq=False)
class ELLA(Conditioning):
    """A prompt seen through the Timestep-Aware Semantic Connector (arXiv 2403.05135): `tsc(features, t, mask)`.

    features: T5 tokens [P, L, D] of P prompts. prompt [rows], int64: which prompt each row shows; by default one row
    per prompt. However many rows show a prompt, a run computes it once.
    Raises ValueError when the features do not have the connector's width.
    """

    tsc: TSC
    features: TextFeatures
    prompt: Tensor | None = None

    def __post_init__(self) -> None:
        check_features(self.features)
        prompt = self.prompt
        if prompt is not None and (prompt.ndim != 1 or prompt.dtype != torch.int64 or not len(prompt)):
            raise ValueError("prompt must be int64 [rows], which of the features' prompts each row shows, got "
                             f"{prompt.dtype} {list(prompt.shape)}")
        expected, got = self.tsc.input_dim, self.features.tokens.shape[2]
        if got != expected:
            raise ValueError(f"the connector takes features of width {expected}, got {got}: encode prompts with the "
                             "T5 it was trained with, and give CLIP's as Constant(features)")

    @property
    def rows(self) -> int:
        return len(self.features.tokens if self.prompt is None else self.prompt)

    @property
    def prompts(self) -> Tensor:
        """[rows], int64: which prompt each row shows."""
        return _all_rows(self.features) if self.prompt is None else self.prompt

    def __call__(self, t: Tensor) -> Context:
        shown = self.features.take(to_batch(self.prompts, len(t)))
        return Context(self.tsc(shown.tokens, t, shown.mask))

    def repeat(self, n: int) -> "ELLA":
        return ELLA(self.tsc, self.features, self.prompts.repeat_interleave(n))

    def planned(self, plan: Plan) -> "Planned":
        table = plan.table(self.tsc)
        return Planned(self, table, table.add(self.features))


@dataclass(frozen=True, eq=False)
class Planned(Conditioning):
    """A prompt that is evaluated with the others of its table; at a noise level of the plan it is constant tokens."""

    leaf: ELLA
    table: Table
    part: slice

    @property
    def rows(self) -> int:
        return self.leaf.rows

    @property
    def varies(self) -> bool:
        return True

    def at(self, levels: Levels) -> Conditioning:
        if len(levels) > 1:  # rows at several levels: no table has them side by side
            return self.leaf
        tokens = self.table.tokens(levels[0])[self.part]
        return Shown(tokens if self.leaf.prompt is None else tokens[self.leaf.prompt])

    def __call__(self, t: Tensor) -> Context:
        raise ValueError("a planned prompt is found by sigma: call conditioning.at((sigma,))(t), as a denoiser does")

    def repeat(self, n: int) -> "Planned":
        return Planned(self.leaf.repeat(n), self.table, self.part)


@dataclass(frozen=True, eq=False)
class Shown(Conditioning):
    """Tokens [rows, L, D] at one noise level."""

    tokens: Tensor

    @property
    def rows(self) -> int:
        return len(self.tokens)

    def __call__(self, t: Tensor) -> Context:
        return Context(to_batch(self.tokens, len(t)))

    def repeat(self, n: int) -> "Shown":
        return Shown(self.tokens.repeat_interleave(n, 0))


class Features(_OfFeatures):
    """Text features, or bare tokens, that nobody has said how to read: each denoiser has its own way, `lift`."""

    def __call__(self, t: Tensor) -> Context:
        raise TypeError("features are read by a denoiser: make a conditioning of them, ELLA(tsc, features), or "
                        "Constant(features) for CLIP's")

    def lifted(self, read: Callable[[TextFeatures], Conditioning]) -> Conditioning:
        return read(self.features)


def as_conditioning(cond: object) -> Conditioning:
    """What a script may pass as a condition: a Conditioning, text features, or tokens [B, L, D].

    Raises TypeError for anything else, above all for text that is not encoded yet.
    """
    if isinstance(cond, Conditioning):
        return cond
    if isinstance(cond, Tensor):
        return Features(TextFeatures(cond, None))
    if isinstance(cond, TextFeatures):
        return Features(cond)
    raise TypeError(f"a condition is a Conditioning, text features or a tensor [B, L, D]; got {type(cond).__name__}: "
                    "encode prompts first, cond=t5(prompt)")


def _all_rows(features: TextFeatures) -> Tensor:
    return torch.arange(len(features.tokens), device=features.tokens.device)
