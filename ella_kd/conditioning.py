"""Conditionings: functions of the timestep that give the UNet its tokens.

`conditioning(t) -> Context`. A plain prompt is a constant function, an ELLA prompt asks its connector at every t, and
conditionings combine into new ones. They are values: nothing here changes an object after it was made.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ella_kd.models.text import TextFeatures
from ella_kd.models.tsc import TSC


@dataclass(frozen=True, eq=False)
class Context:
    """What the UNet takes beside x and t: tokens [B, L, D]; mask [B, L] bool, True at real tokens, None if all are."""

    tokens: Tensor
    mask: Tensor | None = None


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

    def planned(self, timesteps: Tensor) -> "Conditioning":
        """The same function on timesteps [N] fp32 only, evaluated now in one batched TSC call and later looked up."""
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
        return Context(_to_batch(tokens, len(t)), None if mask is None else _to_batch(mask, len(t)))

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
        expected, got = self.tsc.input_dim, self.features.tokens.shape[2]
        if got != expected:
            raise ValueError(f"the connector takes features of width {expected}, got {got}: encode prompts with the "
                             "T5 it was trained with")

    @property
    def rows(self) -> int:
        return len(self._prompt)

    @property
    def _prompt(self) -> Tensor:
        return _all_rows(self.features) if self.prompt is None else self.prompt

    def __call__(self, t: Tensor) -> Context:
        shown = _take(self.features, _to_batch(self._prompt, len(t)))
        return Context(self.tsc(shown.tokens, t, shown.mask))

    def repeat(self, n: int) -> "ELLA":
        return ELLA(self.tsc, self.features, self._prompt.repeat_interleave(n))


@dataclass(frozen=True, eq=False)
class Planned(Conditioning):
    """An ELLA prompt at the timesteps of a run, already evaluated; made by `planned`.

    timesteps [N] fp32, table [N, P, L, D], prompt [rows]. A t is found by exact equality, without waiting for the
    device; one that was not planned gives NaN tokens, never those of a neighbour.
    """

    timesteps: Tensor
    table: Tensor
    prompt: Tensor

    @property
    def rows(self) -> int:
        return len(self.prompt)

    def __call__(self, t: Tensor) -> Context:
        hit = t[:, None] == self.timesteps  # [B, N]
        tokens = self.table[hit.int().argmax(1), _to_batch(self.prompt, len(t))]
        return Context(torch.where(hit.any(1)[:, None, None], tokens, torch.nan))

    def check_covers(self, timesteps: Tensor) -> None:
        """Raises ValueError if one of timesteps [N] was not planned. Waits for the device: before the loop only."""
        missing = timesteps[~torch.isin(timesteps, self.timesteps)]
        if len(missing):
            raise ValueError(f"this conditioning was planned for other timesteps: it lacks {len(missing)} of "
                             f"{len(timesteps)}, first {missing[0].item():g}; plan the unplanned one for this run")

    def repeat(self, n: int) -> "Planned":
        return Planned(self.timesteps, self.table, self.prompt.repeat_interleave(n))


@dataclass(frozen=True, eq=False)
class Combination(Conditioning):
    """A conditioning made of others, each of one row or of as many as the rest."""

    parts: tuple[Conditioning, ...]

    def __post_init__(self) -> None:
        rows = [part.rows for part in self.parts]
        if not rows or len(set(rows) - {1}) > 1:
            raise ValueError(f"{type(self).__name__} takes conditionings of one row or of equal rows, got rows {rows}")

    @property
    def rows(self) -> int:
        return max(part.rows for part in self.parts)

    def repeat(self, n: int) -> Self:
        return self.map_parts(lambda part: part.repeat(n) if part.rows == self.rows else part)

    def leaves(self) -> list[Conditioning]:
        return [leaf for part in self.parts for leaf in part.leaves()]

    def map_leaves(self, f: Map) -> Self:
        return self.map_parts(lambda part: part.map_leaves(f))

    def map_parts(self, f: Map) -> Self:
        """The same combination of f(part)."""
        return replace(self, parts=tuple(map(f, self.parts)))


class Concat(Combination):
    """The tokens of several conditionings in a row, masks kept: `Concat((ELLA(...), Constant(...)))`, ELLA first."""

    def __call__(self, t: Tensor) -> Context:
        contexts = [part(t) for part in self.parts]
        _check_widths(contexts)
        tokens = torch.cat([context.tokens for context in contexts], 1)
        if all(context.mask is None for context in contexts):
            return Context(tokens)
        return Context(tokens, torch.cat([_mask(context) for context in contexts], 1))


class Stack(Combination):
    """Conditionings one under the other, for one UNet call: n parts share t [n * B], B rows each, in order.

    Shorter tokens are padded and the padding is masked: an unmasked zero key still takes its share of the softmax.
    """

    def __call__(self, t: Tensor) -> Context:
        contexts = [part(rows) for part, rows in zip(self.parts, t.chunk(len(self.parts)), strict=True)]
        _check_widths(contexts)
        return Context(*_stack_rows(contexts))


def plan(conditionings: Sequence[Conditioning], timesteps: Tensor) -> list[Conditioning]:
    """Each conditioning, evaluated at timesteps [N] fp32 in one batched call per connector, then only looked up.

    Prompts of all the conditionings that share a connector go into the same call: N times their number of rows.
    Raises ValueError for a conditioning that was planned before, for other timesteps.
    """
    timesteps = timesteps.unique()
    prompts: dict[TSC, list[ELLA]] = {}
    for leaf in dict.fromkeys(leaf for conditioning in conditionings for leaf in conditioning.leaves()):
        if isinstance(leaf, ELLA):
            prompts.setdefault(leaf.tsc, []).append(leaf)
    planned: dict[Conditioning, Conditioning] = {}
    for tsc, leaves in prompts.items():
        tokens, mask = _stack_rows([leaf.features for leaf in leaves])
        n, p = len(timesteps), len(tokens)
        table = tsc(tokens.repeat(n, 1, 1), timesteps.repeat_interleave(p), None if mask is None else mask.repeat(n, 1))
        tables = table.unflatten(0, (n, p)).split([len(leaf.features.tokens) for leaf in leaves], 1)
        planned |= {leaf: Planned(timesteps, part, leaf._prompt) for leaf, part in zip(leaves, tables, strict=True)}

    def of(leaf: Conditioning) -> Conditioning:
        if isinstance(leaf, Planned):
            leaf.check_covers(timesteps)
        return planned.get(leaf, leaf)

    return [conditioning.map_leaves(of) for conditioning in conditionings]


def _to_batch(x: Tensor, batch: int) -> Tensor:
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
    if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens.shape[:2]):
        raise ValueError(f"the mask of features {list(tokens.shape)} must be bool {list(tokens.shape[:2])}, True at "
                         f"real tokens, got {mask.dtype} {list(mask.shape)}")


def _check_widths(contexts: Sequence[Context]) -> None:
    if len({c.tokens.shape[2] for c in contexts}) > 1:
        raise ValueError("conditionings of one UNet need tokens of one width, got "
                         f"{[c.tokens.shape[2] for c in contexts]}")


def _mask(x: Context | TextFeatures) -> Tensor:
    return torch.ones(x.tokens.shape[:2], dtype=torch.bool, device=x.tokens.device) if x.mask is None else x.mask


def _stack_rows(parts: Sequence[Context] | Sequence[TextFeatures]) -> tuple[Tensor, Tensor | None]:
    """All rows, one part under the other, shorter tokens padded and masked; the mask is None if nothing needs one."""
    longest = max(part.tokens.shape[1] for part in parts)
    tokens = torch.cat([F.pad(part.tokens, (0, 0, 0, longest - part.tokens.shape[1])) for part in parts])
    if all(part.mask is None and part.tokens.shape[1] == longest for part in parts):
        return tokens, None
    return tokens, torch.cat([F.pad(_mask(part), (0, longest - part.tokens.shape[1])) for part in parts])
