"""What a network sees beside x and t, as one value, and the algebra of its rows.

A new input of a network is a field of `Context` (or of a subclass of your own), made by `per_row`, and a line in the
network that reads it: how rows are taken, put one under the other and joined is the same for all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ella_kd.models.partial import Box, ForRows, cut, join, rows_of, take


def the_only(what: str, found: list[Tensor]) -> Tensor:
    """The one input that parts of a conditioning have. Raises ValueError if there are several."""
    if len(found) > 1:
        raise ValueError(f"two parts of one conditioning have {what}: give them to the combination as a whole")
    return found[0]


def the_first(what: str, found: list[Tensor]) -> Tensor:
    """The input of the first part of a conditioning that has one."""
    return found[0]


def per_row(what: str, beside: Callable[[str, list[Tensor]], Tensor] = the_only, exact: bool = False) -> Any:
    """A field of a Context: a tensor [B, ...] or None. what: its name in messages ("channels beside x").

    beside: which one holds where several parts of one conditioning have it. exact: its dtype is kept.
    """
    return field(default=None, metadata={"what": what, "beside": beside, "exact": exact})


def for_some(what: str) -> Any:
    """A field of a Context that some rows have and others have not: a tuple of `models.partial.ForRows`, or None."""
    return field(default=None, metadata={"what": what, "some": True, "exact": False})


@dataclass(frozen=True, eq=False)
class Context:
    """What the network takes beside x and t, a row per sample.

    tokens [B, L, D]. mask [B, L]: bool, True at real tokens, or the factors >= 0 by which the tokens' attention is
    multiplied; None: all are plainly seen. channels [B, C, h, w], concatenated to x (InstructPix2Pix, inpainting).

    vector [B, D], added to what is told of t (SDXL: the pooled text). sizes [B, 6], told after it: original height and
    width, crop top and left, target height and width in pixels; None: the size of x, not cropped. score [B]: SDXL's
    refiner's aesthetic score; None: 6. label [B] int64: a class (the x4 upscaler: how noisy its picture is). guidance
    [B]: the guidance scale, of networks that are told it (LCM). Of several parts of one conditioning the first's hold.

    controls: ControlNets and T2I-Adapters with their pictures (`models.controls`). images: image prompts
    (`models.image_prompts`). references: pictures to look at (`models.reference`). Each is for some of the rows; those
    of several parts add up.
    """

    tokens: Tensor
    mask: Tensor | None = None
    channels: Tensor | None = per_row("channels beside x")  # noqa: RUF009
    vector: Tensor | None = per_row("an added vector", the_first)  # noqa: RUF009
    sizes: Tensor | None = per_row("sizes", the_first, exact=True)  # noqa: RUF009
    score: Tensor | None = per_row("a score", the_first, exact=True)  # noqa: RUF009
    label: Tensor | None = per_row("a label", the_first, exact=True)  # noqa: RUF009
    guidance: Tensor | None = per_row("a guidance scale", the_first, exact=True)  # noqa: RUF009
    controls: Any = for_some("a ControlNet or T2I-Adapter")  # noqa: RUF009
    images: Any = for_some("an image prompt")  # noqa: RUF009
    references: Any = for_some("a reference")  # noqa: RUF009

    @classmethod
    def of(cls, seen: "Context | Tensor") -> "Context":
        """A context as it is; bare tokens [B, L, D] as one."""
        return Context(seen) if isinstance(seen, Tensor) else seen

    def take(self, rows: Sequence[int] | Tensor) -> Self:
        """These rows of everything; their numbers are known to the host."""
        numbers = rows.tolist() if isinstance(rows, Tensor) else rows
        return self._with(lambda x: rows_of(x, numbers), lambda some: take(some, numbers))

    def weighed(self, factor: float) -> Self:
        """The same with all that some rows have `factor` times as strong; 0 leaves it out."""
        return self._with(lambda x: x, lambda some: tuple(each.weighed(factor) for each in some) if factor else None)

    def crop(self, box: Box, canvas: tuple[int, int]) -> Self:
        """What is seen of a part of the picture: channels and controls are cut; canvas: the whole's size, in latents.

        Raises ValueError for channels of another size.
        """
        if self.channels is not None and self.channels.shape[2:] != canvas:
            raise ValueError(f"channels must be as large as the latents, {list(canvas)}, got "
                             f"{list(self.channels.shape[2:])}")
        part = self._with(lambda x: x, lambda some: tuple(each.crop(box, canvas) for each in some))
        return replace(part, channels=None if self.channels is None else cut(self.channels, box))

    def to(self, dtype: torch.dtype) -> Self:
        """Everything that is a float in this dtype, but for the mask and numbers like sizes: 1027 is none in bf16."""
        exact = {own.name: getattr(self, own.name) for own in fields(self)[2:] if own.metadata["exact"]}
        cast = self._with(lambda x: x.to(dtype) if x.is_floating_point() else x)
        return replace(cast, mask=self.mask, **exact)

    def _with(self, f: Callable[[Tensor], Tensor], g: Callable[[tuple[ForRows, ...]], Any] = tuple) -> Self:
        """f of everything, g of what some rows have."""
        return replace(self, **{name: f(x) if isinstance(x, Tensor) else g(x) for name, x in vars(self).items()
                                if x is not None})

    def beside_x(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] with the channels after its own."""
        return x if self.channels is None else torch.cat([x, self.channels], 1)

    @staticmethod
    def stack(contexts: "Sequence[Context]") -> "Context":
        """All rows, one context under the other; shorter tokens are padded and the padding is masked.

        Raises ValueError for tokens of several widths, and for an input that some have and others lack.
        """
        if len(contexts) == 1:
            return contexts[0]

        def whole(what: str, found: list[Tensor]) -> Tensor:
            if len(found) < len(contexts):
                raise ValueError(f"one UNet call has {what} for all of its conditionings or for none: give it to each "
                                 "(for channels zeros where there is no image)")
            return torch.cat(found)

        starts = [sum(len(context.tokens) for context in contexts[:i]) for i in range(len(contexts))]
        return _joined(contexts, *pile(contexts), lambda own: whole, starts)

    @staticmethod
    def beside(contexts: "Sequence[Context]") -> "Context":
        """One context of the same rows: the tokens in a row, masks kept; of channels at most one, of vectors the first.

        Raises ValueError for tokens of several widths, and for an input that two have.
        """
        shown = [context for context in contexts if context.tokens.shape[1]] or contexts[:1]
        if len({context.tokens.shape[2] for context in shown}) > 1:
            raise ValueError("conditionings of one UNet need tokens of one width, got "
                             f"{[context.tokens.shape[2] for context in shown]}")
        seen = None if all(c.mask is None for c in shown) else torch.cat([mask_of(c) for c in shown], 1)
        return _joined(contexts, torch.cat([context.tokens for context in shown], 1), seen,
                       lambda own: own.metadata["beside"], [0] * len(contexts))


def _joined(contexts: Sequence[Context], tokens: Tensor, mask: Tensor | None, how: Any,
            starts: Sequence[int]) -> Context:
    """A context of these tokens, every other input joined from those that have it; how: of a field, its way to join.

    starts: the row of the new context where each one's begin.
    """
    kind = max((type(context) for context in contexts), key=lambda kind: len(fields(kind)))
    for other in {type(context) for context in contexts}:
        if not issubclass(kind, other):
            raise TypeError(f"{kind.__name__} and {other.__name__} are two contexts of their own, and one network sees "
                            "one: put the fields of both in one subclass")
    inputs: dict[str, Any] = {}
    for own in fields(kind)[2:]:
        if own.metadata.get("some"):
            inputs[own.name] = join([getattr(context, own.name, None) for context in contexts], starts)
            continue
        found = [x for context in contexts if (x := getattr(context, own.name, None)) is not None]
        if found:
            inputs[own.name] = how(own)(own.metadata["what"], found)
    return kind(tokens, mask, **inputs)


class Tokens(Protocol):
    """What has tokens [B, L, D] and a mask [B, L], bool or floats, None where all are seen: features, contexts."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def mask(self) -> Tensor | None: ...


def mask_of(x: Tokens) -> Tensor:
    """The mask [B, L], all True where it is None."""
    return torch.ones(x.tokens.shape[:2], dtype=torch.bool, device=x.tokens.device) if x.mask is None else x.mask


def pile(parts: Sequence[Tokens]) -> tuple[Tensor, Tensor | None]:
    """All rows, one part under the other, shorter tokens padded and masked; the mask is None if nothing needs one.

    Masked, because an unmasked zero key still takes its share of the softmax.
    """
    widths = {part.tokens.shape[2] for part in parts if part.tokens.shape[1]}
    if len(widths) > 1:
        raise ValueError(f"conditionings of one UNet need tokens of one width, got "
                         f"{[part.tokens.shape[2] for part in parts]}")
    longest, width = max(part.tokens.shape[1] for part in parts), max(widths, default=0)
    if all(part.mask is None and part.tokens.shape[1:] == (longest, width) for part in parts):
        return torch.cat([part.tokens for part in parts]), None
    tokens = torch.cat([F.pad(part.tokens, (0, width - part.tokens.shape[2], 0, longest - part.tokens.shape[1]))
                        for part in parts])
    return tokens, torch.cat([F.pad(mask_of(part), (0, longest - part.tokens.shape[1])) for part in parts])
