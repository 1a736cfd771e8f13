"""Rows of tokens of several lengths, as one batch with a mask."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


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
    tokens = torch.cat([F.pad(part.tokens, (0, width - part.tokens.shape[2], 0, longest - part.tokens.shape[1]))
                        for part in parts])
    if all(part.mask is None and part.tokens.shape[1] == longest for part in parts):
        return tokens, None
    return tokens, torch.cat([F.pad(mask_of(part), (0, longest - part.tokens.shape[1])) for part in parts])
