"""Conditionings that change with sigma: one prompt early and another late, a prompt in a window of noise levels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from ella_kd.conditioning.base import Combination, Conditioning
from ella_kd.models.context import Context
from ella_kd.models.network import Levels, above, check_window


class Switch(Combination):
    """One conditioning after another as the noise falls: `Switch(early, late, at=5.0)`.

    at: the sigmas between the parts, falling, one less than there are parts; the first part holds above at[0], the next
    for at[1] < sigma <= at[0], and so on. A denoiser decides by its sigma (`conditioning.at`): the part that holds is
    evaluated alone, and rows at different sigmas each get their own.
    Raises ValueError for boundaries that do not fall or are not one less than the parts.
    """

    boundaries: tuple[float, ...]

    def __init__(self, *parts: Conditioning, at: float | Sequence[float] | Tensor) -> None:
        at = at.tolist() if isinstance(at, Tensor) else at
        boundaries = (float(at),) if isinstance(at, (int, float)) else tuple(map(float, at))
        falling = all(a > b for a, b in pairwise((math.inf, *boundaries, -math.inf)))
        if len(boundaries) != len(parts) - 1 or not falling:
            raise ValueError(f"a switch between {len(parts)} conditionings needs {len(parts) - 1} falling sigmas, got "
                             f"{list(boundaries)}")
        self._set(boundaries=boundaries)
        super().__init__(*parts)

    def of(self, parts: tuple[Conditioning, ...]) -> Self:
        return type(self)(*parts, at=self.boundaries)

    @property
    def varies(self) -> bool:
        return True

    def at(self, levels: Levels) -> Conditioning:
        which = [sum(not above(level, boundary) for boundary in self.boundaries) for level in levels]
        if len(set(which)) == 1:
            return self.parts[which[0]].at(levels)
        return _Chosen(tuple(part.at(levels) for part in self.parts), tuple(which))

    def __call__(self, t: Tensor) -> Context:
        raise ValueError("a switch is decided by sigma, and t does not tell it: call conditioning.at((sigma,))(t), as "
                         "a denoiser does")


class _Chosen(Combination):
    """Of several conditionings, one for each row."""

    which: tuple[int, ...]

    def __init__(self, parts: tuple[Conditioning, ...], which: tuple[int, ...]) -> None:
        self._set(which=which)
        super().__init__(*parts)

    def of(self, parts: tuple[Conditioning, ...]) -> Self:
        return type(self)(parts, self.which)

    @property
    def rows(self) -> int:
        return len(self.which)

    def repeat(self, n: int) -> Self:
        of_samples = super().repeat(n)
        return type(self)(of_samples.parts, tuple(part for part in self.which for _ in range(n)))

    def __call__(self, t: Tensor) -> Context:
        if len(t) != self.rows:
            raise ValueError(f"a switch was decided for {self.rows} rows, and the batch has {len(t)}")
        used = sorted(set(self.which))
        rows = [used.index(part) * len(t) + row for row, part in enumerate(self.which)]
        return Context.stack([self.parts[part](t) for part in used]).take(rows)


@dataclass(frozen=True, eq=False)
class Nothing(Conditioning):
    """No tokens at all: what a window leaves of a `Concat` where it is closed."""

    rows: int = 1

    def __call__(self, t: Tensor) -> Context:
        return Context(torch.zeros(len(t), 0, 0, device=t.device))

    def repeat(self, n: int) -> "Nothing":
        return Nothing(self.rows * n)


def window(conditioning: Conditioning, sigma_hi: float = math.inf, sigma_lo: float = 0.0,
           otherwise: Conditioning | None = None) -> Switch:
    """A conditioning for sigma_lo < sigma <= sigma_hi, and `otherwise` elsewhere.

    Without `otherwise` there are no tokens elsewhere, which only makes sense beside others:
    `Concat(ella, window(clip, sigma_lo=5))` is ELLA with CLIP's tokens above sigma 5.
    Raises ValueError unless 0 <= sigma_lo < sigma_hi.
    """
    check_window(sigma_lo, sigma_hi)
    rest = Nothing() if otherwise is None else otherwise
    if sigma_hi == math.inf:
        return Switch(conditioning, rest, at=sigma_lo)
    if sigma_lo == 0:
        return Switch(rest, conditioning, at=sigma_hi)
    return Switch(rest, conditioning, rest, at=(sigma_hi, sigma_lo))
