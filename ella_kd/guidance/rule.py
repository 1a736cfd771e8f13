"""What a guidance rule is: a value that says which answers of the network it wants, and what to make of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from ella_kd.bound import COND, UNCOND, Branch
from ella_kd.conditioning import Levels
from ella_kd.models.devices import upload
from ella_kd.models.network import check_window, within
from ella_kd.scale import Scale, check_scale, resolve


@dataclass(frozen=True, eq=False)
class Answers:
    """What the network answered, for a rule to combine: `answers[branch]` is a denoised [B, C, h, w].

    x [B, C, h, w]; sigma [B, 1, 1, 1]. `attention(branch)` [B, 1, h', w'] is how much self-attention each pixel
    receives in a branch that the rule watches, 1 on average (`models.patches.Recorder`); `evaluate(x, branch)` asks the
    network once more, at another x and the same sigma.
    """

    x: Tensor
    sigma: Tensor
    denoised: Mapping[Branch, Tensor]
    evaluate: Callable[[Tensor, Branch], Tensor]
    maps: Mapping[Branch, Tensor]

    def __getitem__(self, branch: Branch) -> Tensor:
        return self.denoised[branch]

    def attention(self, branch: Branch) -> Tensor:
        return self.maps[branch]

    def factor(self, scale: Scale) -> float | Tensor:
        """A resolved scale, to multiply with: a number, or [B, 1, 1, 1]."""
        if isinstance(scale, float):
            return scale
        assert not callable(scale), "a rule is resolved by at() before it is called"
        return upload(torch.tensor(scale, dtype=self.x.dtype), self.x.device).view(-1, 1, 1, 1)


class Guidance(ABC):
    """A guidance rule: a frozen value, called with the answers it asks for, gives the guided denoised.

    Rules that modify another have it as their field `base`: `Rescale(CFG(7), 0.7)` is read from the inside out. A rule
    is a function of x and sigma alone: it keeps nothing between calls, so any sampler may evaluate it in any order.
    To write one, subclass as a frozen dataclass and define `branches` and `__call__`; name its fields of type Scale in
    `scales`.
    """

    scales: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in self.scales:
            checked = check_scale(f"{type(self).__name__}'s {name}", getattr(self, name))
            object.__setattr__(self, name, checked)
        base = getattr(self, "base", self)
        if not isinstance(base, Guidance):
            raise TypeError(f"{type(self).__name__} wraps a guidance rule, such as CFG(7), got {base!r}")

    @property
    @abstractmethod
    def branches(self) -> tuple[Branch, ...]:
        """The answers it needs; asked of a resolved rule only (see `at`)."""

    @abstractmethod
    def __call__(self, answers: Answers) -> Tensor:
        """The guided denoised [B, C, h, w]."""

    @property
    def watched(self) -> Mapping[Branch, str]:
        """Branches without a patch whose self-attention it looks at, and where in the UNet ("middle_block.1")."""
        return {name: place for rule in self._inner() for name, place in rule.watched.items()}

    @property
    def guided(self) -> tuple[bool, ...]:
        """Of a resolved rule: whether it guides at all, for all rows or for each; CFG++ walks on cond where not."""
        return next((rule.guided for rule in self._inner()), (True,))

    @property
    def varies(self) -> bool:
        """Whether it depends on sigma, so that `at` has something to decide."""
        own = type(self).at is not Guidance.at or any(callable(getattr(self, name)) for name in self.scales)
        return own or any(rule.varies for rule in self._inner())

    def at(self, levels: Levels) -> "Guidance":
        """The rule at these noise levels, one for the whole batch or one per row: no scale is a function any more."""
        changes: dict[str, object] = {name: resolve(getattr(self, name), levels) for name in self.scales}
        changes |= {f.name: rule.at(levels) for f in fields(self)  # type: ignore[arg-type]
                    if isinstance(rule := getattr(self, f.name), Guidance)}
        return replace(self, **changes)  # type: ignore[type-var]

    def check_rows(self, rows: int) -> None:
        """Raises ValueError for scales of samples that are neither one nor one per row of the batch."""
        for name in self.scales:
            scale = getattr(self, name)
            if isinstance(scale, tuple) and len(scale) not in (1, rows):
                raise ValueError(f"{type(self).__name__} has {len(scale)} scales for a batch of {rows}: give one, or "
                                 "one per sample")
        for rule in self._inner():
            rule.check_rows(rows)

    def _inner(self) -> list["Guidance"]:
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return [value for value in values if isinstance(value, Guidance)]


@dataclass(frozen=True)
class CFG(Guidance):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, eq. 6): `U + scale * (C - U)`.

    Scale 1 is the plain conditional answer and asks for no uncond.
    """

    scales = ("scale",)
    scale: Scale

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (COND,) if is_all(self.scale, 1) else (COND, UNCOND)

    def __call__(self, answers: Answers) -> Tensor:
        if is_all(self.scale, 1):
            return answers[COND]
        guided = answers[UNCOND] + (answers[COND] - answers[UNCOND]) * (scale := answers.factor(self.scale))
        if isinstance(scale, Tensor):  # a row at scale 1 is the plain answer, bit for bit, as it is alone
            guided = torch.where(scale == 1, answers[COND], guided)
        return guided


@dataclass(frozen=True)
class Interval(Guidance):
    """Guidance in an interval of noise levels (Kynkäänniemi et al. 2024, arXiv 2404.07724, eq. 6): base for
    sigma_lo < sigma <= sigma_hi, the plain conditional answer and no other evaluation elsewhere.

    `Interval(CFG(7), sigma_lo=1.5)` is also the web UI's "negative guidance minimum sigma" for all steps.
    """

    base: Guidance
    sigma_lo: float = 0.0
    sigma_hi: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.sigma_lo, self.sigma_hi)

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.base.branches

    @property
    def varies(self) -> bool:
        return True

    def at(self, levels: Levels) -> Guidance:
        inside = tuple(within(level, self.sigma_lo, self.sigma_hi) for level in levels)
        if not any(inside):
            return _Rows(CFG(1.0), (False,))
        base = self.base.at(levels)
        return base if all(inside) else _Rows(base, inside)

    def __call__(self, answers: Answers) -> Tensor:
        return self.base(answers)


@dataclass(frozen=True)
class _Rows(Guidance):
    """base for some rows, the plain conditional answer for the others."""

    base: Guidance
    inside: tuple[bool, ...]

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (*self.base.branches, COND)

    @property
    def guided(self) -> tuple[bool, ...]:
        return tuple(inside and base for inside, base in zip_rows(self.inside, self.base.guided))

    def __call__(self, answers: Answers) -> Tensor:
        return where_rows(self.inside, self.base(answers), answers[COND]) if any(self.inside) else answers[COND]


def zip_rows(a: tuple[bool, ...], b: tuple[bool, ...]) -> list[tuple[bool, bool]]:
    """Two tuples side by side, each of one value for all rows or of one per row."""
    n = max(len(a), len(b))
    return list(zip(a * (n // len(a)), b * (n // len(b)), strict=True))


def where_rows(rows: tuple[bool, ...], a: Tensor, b: Tensor) -> Tensor:
    """The rows of a where True, those of b elsewhere: [B, C, h, w]."""
    return torch.where(upload(torch.tensor(rows), a.device).view(-1, 1, 1, 1), a, b)


def is_all(scale: Scale, value: float) -> bool:
    """Whether a resolved scale is this number for every sample."""
    return scale == value if isinstance(scale, float) else not callable(scale) and all(s == value for s in scale)
