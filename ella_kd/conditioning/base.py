"""What a conditioning is: one tree of values, whose leaves give tokens and whose branches combine them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any, Self

from torch import Tensor

from ella_kd.conditioning.plan import Plan
from ella_kd.models.context import Context
from ella_kd.models.network import Levels
from ella_kd.models.text import TextFeatures

Weight = float | Tensor
"""How much an answer counts: a number, or on the CPU float64 [h, w], [B, 1, 1, 1] or [B, 1, h, w]."""
Term = tuple["Conditioning | None", Weight]
"""A conditioning, None for the uncond, and its weight."""


class Conditioning(ABC):
    """A function of the timestep: `conditioning(t)` takes t [B] fp32 and gives a Context of B rows.

    One row broadcasts to any B; otherwise the rows must equal B, or ValueError says so. It is a value: nothing changes
    it after it was made. A leaf defines `rows`, `__call__` and `repeat`; what is made of others is a `Combination`.
    """

    parts: "tuple[Conditioning, ...]" = ()
    of_answers = False  # whether it combines what the network answers, rather than tokens

    @property
    def rows(self) -> int:
        """The number of samples it speaks of; 1 fits every batch."""
        return max(part.rows for part in self.parts)

    @property
    def varies(self) -> bool:
        """Whether it depends on sigma beyond t, so that `at` has something to decide."""
        return any(part.varies for part in self.parts)

    @property
    def weights_vary(self) -> bool:
        """Whether the weights of its `terms` depend on sigma."""
        return any(part.weights_vary for part in self.parts)

    @abstractmethod
    def __call__(self, t: Tensor) -> Context:
        """t [B] fp32 -> Context of B rows."""

    def at(self, levels: Levels) -> "Conditioning":
        """The same at these noise levels, with every switch decided."""
        return self._with_parts(lambda part: part.at(levels)) if self.varies else self

    def repeat(self, n: int) -> "Conditioning":
        """n samples per row, side by side: rows a, b become a, a, b, b for n = 2."""
        return self._with_parts(lambda part: part.repeat(n) if part.rows == self.rows else part)

    def leaves(self) -> "list[Conditioning]":
        """The conditionings this one is made of that are not themselves made of others."""
        return [leaf for part in self.parts for leaf in part.leaves()] if self.parts else [self]

    def map(self, f: "Callable[[Conditioning], Conditioning]") -> "Conditioning":
        """The same combination of f(leaf); itself where f changes nothing."""
        return self._with_parts(lambda part: part.map(f)) if self.parts else f(self)

    def terms(self, h: int, w: int, levels: Levels) -> list[Term]:
        """What the network is asked for latents of h x w, and how much each answer counts; the weights sum to 1."""
        return [(self, 1.0)]

    def lifted(self, read: "Callable[[TextFeatures], Conditioning]") -> "Conditioning":
        """Of a leaf: itself, or `read(features)` where it is features that a denoiser has yet to read."""
        return self

    def planned(self, plan: Plan) -> "Conditioning":
        """Of a leaf: the same function at the plan's noise levels only, evaluated with others in few large calls."""
        return self

    def with_control(self, network: Any, picture: Any, strength: Any = 1.0, **how: Any) -> "Conditioning":
        """The same with a ControlNet or T2I-Adapter that is shown a picture; several add up.

        network: on the device of the latents, in any dtype; it stays as it was loaded when a pipeline is moved.
        picture: a file, a PIL image, or numbers [3, H, W] (floats in [0, 1]), stretched to the canvas; or a list or
        [B, 3, H, W], one per row. strength: a number, one per row, or a function of sigma; 0 is off, bitwise. Of a
        composition (And, Regions) every part is steered. In `how`, all optional:
        window: (hi, lo), where it acts: lo < sigma <= hi. guess: "ldm" or "diffusers", guess mode, weaker for the finer
        features; then, and for a network that is pooled (shuffle), leave the uncond without. pooled: average the
        network's outputs over the picture; None: as the network says. tokens: a conditioning that the network sees in
        place of this one's, such as `sd.encode(prompt, "clip")`. preprocess: "canny", "depth" or a callable that makes
        of a picture what the network was trained on.
        Raises ValueError where the network meets a UNet of another kind, or latents on another device.
        """
        from ella_kd.conditioning.control import with_control

        return with_control(self, network, picture, strength, **how)

    def with_image(self, adapter: Any, pictures: Any, weight: Any = 1.0, **how: Any) -> "Conditioning":
        """The same with pictures as prompts, by an IPAdapter: a picture, or several that are seen together.

        Several calls add up, each with its weight: a number, one per row, or a function of sigma; 0 is off, bitwise.
        pictures None: what the adapter makes of no picture, for the uncond, which needs it beside a cond with one.
        window: (hi, lo), where it acts: lo < sigma <= hi. Of a composition (And, Regions) every part sees them.
        Raises ValueError where the adapter meets a UNet of another kind, or on another device.
        """
        from ella_kd.conditioning.control import with_image

        return with_image(self, adapter, pictures, weight, **how)

    def with_reference(self, latents: Tensor, weight: Any = 1.0, **how: Any) -> "Conditioning":
        """The same, looking at another picture too: reference-only, where self-attention sees that picture's pixels.

        latents: the picture's, [1, C, h, w] or one per row, of any size. weight: how much the answer with the picture
        counts, a number, one per row, or a function of sigma; 0 is off, bitwise. With `cond.with_reference(z)` and
        `uncond.with_reference(z, 1 - f)` f is the style fidelity, .5 in most use; 0 steers both alike. In `how`, all
        optional: window: (hi, lo), where it acts, lo < sigma <= hi; seed: of the noise that hides the picture, the same
        at every sigma; sigma_data: that of an EDM schedule. The UNet runs once more for these rows, and what else
        changes self-attention (ToMe) leaves them as they are.
        """
        from ella_kd.conditioning.reference import with_reference

        return with_reference(self, latents, weight, **how)

    def _with_parts(self, f: "Callable[[Conditioning], Conditioning]") -> "Conditioning":
        parts = tuple(map(f, self.parts))
        return self if all(new is old for new, old in zip(parts, self.parts)) else self.of(parts)

    def of(self, parts: "tuple[Any, ...]") -> Self:
        """The same combination of other parts."""
        raise TypeError(f"{type(self).__name__} is made of no others")


class Combination(Conditioning):
    """A conditioning made of others, each of one row or of as many as the rest."""

    def __init__(self, *parts: Conditioning) -> None:
        for part in parts:
            self._check_part(part)
        self._set(parts=parts)
        self._check_rows([part.rows for part in parts])

    def _check_part(self, part: object) -> None:
        if not isinstance(part, Conditioning):
            raise TypeError(f"{type(self).__name__} takes conditionings, got {type(part).__name__}: features become "
                            "one as ELLA(tsc, features), or as Constant(features) for CLIP's")
        if part.of_answers:
            raise TypeError(f"{type(self).__name__} combines tokens, and {type(part).__name__} what the network "
                            f"answers: put {type(part).__name__} outermost")

    def _check_rows(self, rows: list[int]) -> None:
        if not rows or len(set(rows) - {1}) > 1:
            raise ValueError(f"{type(self).__name__} takes conditionings of one row or of equal rows, got rows {rows}")

    def _set(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"conditionings are values: {name} cannot be set; make a new one")

    @abstractmethod
    def of(self, parts: tuple[Any, ...]) -> Self: ...


def levels_of(sigma: Tensor) -> Levels:
    """The noise levels of a call, read from its sigma [B]: each once if they are all the same."""
    levels = tuple(sigma.tolist())
    return levels[:1] if len(set(levels)) == 1 else levels


def to_batch(x: Tensor, batch: int) -> Tensor:
    """One row expanded to a batch; as many rows as the batch has, as they are. ValueError for any other number."""
    if len(x) == batch:
        return x
    if len(x) != 1:
        raise ValueError(f"the conditioning has {len(x)} rows and the batch {batch}: give one row, or one per sample "
                         "(conditioning.repeat(n) makes n samples of each prompt)")
    return x.expand(batch, *x.shape[1:])
