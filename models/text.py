"""What a text encoder says about prompts, as one value."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from ella_kd.models.attention import check_mask


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """What a text encoder says about prompts: tokens [B, L, D] and which of them are seen, and how strongly.

    mask [B, L]: bool, True at positions that are seen; or floats >= 0, the factor by which the attention to a position
    is multiplied (0 unseen, 1 plain; see `ella_kd.models.attention.attend`). None: every position is seen.
    vector [B, D]: the prompt as a whole, where the encoder gives it (SDXL's pooled text), or None.
    """

    tokens: Tensor
    mask: Tensor | None = None
    vector: Tensor | None = None

    def take(self, rows: Tensor) -> Self:
        """These prompts, int64 [n]."""
        mask, vector = (None if x is None else x[rows] for x in (self.mask, self.vector))
        return type(self)(self.tokens[rows], mask, vector)

    def __repr__(self) -> str:
        shapes = [f"{name} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
                  for name, x in vars(self).items() if x is not None]
        return f"TextFeatures({', '.join(shapes)})"


def check_features(features: TextFeatures) -> None:
    """Raises ValueError unless tokens are floats [B, L, D], none of the three 0; mask (`check_mask`) and vector fit."""
    tokens = features.tokens
    if tokens.ndim != 3 or 0 in tokens.shape or not tokens.is_floating_point():
        raise ValueError("text features must be floats [B, L, D] with B and L at least 1, got "
                         f"{tokens.dtype} {list(tokens.shape)}")
    check_mask(features.mask, tokens)
    vector = features.vector
    if vector is not None and (vector.ndim != 2 or len(vector) != len(tokens) or not vector.is_floating_point()):
        raise ValueError(f"the vector of text features must be floats [{len(tokens)}, D], got {vector.dtype} "
                         f"{list(vector.shape)}")


def as_list(prompts: str | Sequence[str]) -> list[str]:
    """Prompts, at least one. Raises ValueError for none, TypeError for what is no text."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("at least one prompt is needed, got an empty list")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"prompts must be strings, got {type(text).__name__}")
    return texts
