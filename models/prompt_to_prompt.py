"""Prompt-to-prompt (Hertz et al. 2022, arXiv 2208.01626): a prompt drawn with the attention of another, as a patch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from einops import rearrange
from torch import Tensor

from ella_kd.models.attention import attend, log_weights
from ella_kd.models.blocks import TransformerBlock
from ella_kd.models.patches import Patch


@dataclass(frozen=True)
class SourceAttention(Patch):
    """Where the first row of a batch looks in its text, and in itself, the others look in theirs; the first stays as it
    is.

    tokens: of each token of the other rows, which of the first row's it stands for, -1 for none: it keeps its own
    attention (the paper's refinement, equation 4; `aligned` finds them). None: each for the one at its place
    (replacement; ELLA's tokens are no words, and stand for each other so). weights: a factor for the attention to each
    token, 1 plain, 0 unseen (equation 5). own: keep their own attention to the text, re-weighted alone. pixels: their
    self-attention is the first row's too where the feature map has at most so many, which holds the composition; the
    paper's code has 16 * 16, a later one of its authors 32 * 32.
    Raises ValueError for rows whose tokens differ in number from these.
    """

    places: tuple[str, ...]
    tokens: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    own: bool = False
    pixels: int = 0

    @property
    def plain(self) -> bool:
        """Whether it changes nothing."""
        return not self.places or (self.own and self.weights is None and not self.pixels)

    def __call__(self, block: TransformerBlock, x: Tensor, context: Tensor, mask: Tensor | None,
                 size: tuple[int, int]) -> Tensor:
        x = x + (self._of_the_source(block, x) if size[0] * size[1] <= self.pixels else block.self_attention(x))
        attn = block.attn2
        queries = attn.to_q(block.norm2(x))
        q, k, v = (rearrange(y, "b l (h d) -> b h l d", h=attn.heads) for y in
                   (queries, attn.to_k(context), attn.to_v(context)))
        precise = torch.promote_types(x.dtype, torch.float32)
        scores = q.to(precise) @ k.to(precise).mT / math.sqrt(q.shape[-1])
        if mask is not None:
            seen = mask.to(precise) if mask.dtype == torch.bool else mask
            scores = scores + log_weights(seen, precise)[:, None, None]
        maps = torch.cat([scores[:1].softmax(-1), self._edited(scores.softmax(-1))])
        x = x + attn.finish(queries, rearrange(maps.to(v.dtype) @ v, "b h l d -> b l (h d)"))
        return x + block.feed_forward(x)

    @staticmethod
    def _of_the_source(block: TransformerBlock, x: Tensor) -> Tensor:
        """Self-attention with the first row's maps: each pixel gets its own row's values from where the first looks."""
        attn, normed = block.attn1, block.norm1(x)
        q, k = (to(normed[:1]).expand(len(x), -1, -1) for to in (attn.to_q, attn.to_k))
        return attn.to_out(attend(q, k, attn.to_v(normed), attn.heads))

    def _edited(self, maps: Tensor) -> Tensor:
        """maps [b, heads, h * w, L] -> those of the rows after the first."""
        count = maps.shape[-1]
        for given, what in ((self.tokens, "tokens"), (self.weights, "weights")):
            if given is not None and len(given) != count:
                raise ValueError(f"SourceAttention has {len(given)} {what} for prompts of {count} tokens")
        edited = maps[1:]
        if not self.own:
            source = maps[:1].expand_as(edited)
            if self.tokens is not None:
                index = torch.tensor(self.tokens, device=maps.device)
                source = torch.where(index >= 0, source[..., index.clamp(min=0)], edited)
            edited = source
        return edited if self.weights is None else edited * edited.new_tensor(self.weights)


def aligned(source: Sequence[int], edit: Sequence[int]) -> tuple[int, ...]:
    """Of each token of `edit`, its place among those of `source` where both say the same, -1 where they do not."""
    found = [-1] * len(edit)
    for match in SequenceMatcher(None, list(source), list(edit), autojunk=False).get_matching_blocks():
        for i in range(match.size):
            found[match.b + i] = match.a + i
    return tuple(found)
