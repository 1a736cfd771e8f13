"""Words that CLIP has learned (textual inversion): which tokens of a text call them, and what stands in their place."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ella_kd.models.parameters import Recipe, sharing
from ella_kd.models.tokenizers import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

M = TypeVar("M", bound=nn.Module)


class Word(NamedTuple):
    """calls: the tokens of its name, none if the tokenizer does not know them; ids: those that stand in their place."""

    name: str
    calls: tuple[int, ...]
    ids: tuple[int, ...]


def word(tokenizer: "PreTrainedTokenizerBase", name: str, ids: Iterable[int]) -> Word:
    calls = tuple(token_ids(tokenizer, name, special=False))
    unknown = tokenizer.unk_token_id in calls and tokenizer.unk_token_id != tokenizer.eos_token_id
    return Word(name, () if unknown else calls, tuple(ids))


def units(tokenizer: "PreTrainedTokenizerBase", text: str, words: Sequence[Word]) -> list[tuple[int, ...]]:
    """The tokens of a text, one by one, but for those of a learned word: they come together.

    A word is called by the tokens of its name, the longest name first, as in A1111's web UI, or by `embedding:name`, as
    in ComfyUI; in any case. A name that the tokenizer does not know is found as text, where it is a word of its own.
    """
    if not words:
        return [(token,) for token in token_ids(tokenizer, text, special=False)]
    found: list[tuple[int, ...]] = []
    named = {each.name.lower(): each for each in words}
    by_length = sorted((each for each in words if each.calls), key=lambda each: -len(each.calls))
    for i, part in enumerate(_spelled(tuple(words)).split(text)):
        if i % 2:
            found.append(named[part.lower().removeprefix("embedding:")].ids)
            continue
        ids, at = tuple(token_ids(tokenizer, part, special=False)), 0
        while at < len(ids):
            called = next((each for each in by_length if ids[at : at + len(each.calls)] == each.calls), None)
            found.append(called.ids if called else ids[at : at + 1])
            at += len(called.calls) if called else 1
    return found


@lru_cache(64)
def _spelled(words: tuple[Word, ...]) -> re.Pattern[str]:
    """What calls a word by its text."""
    names = sorted(words, key=lambda each: -len(each.name))
    spellings = [rf"{'embedding:' if each.calls else '(?:embedding:)?'}{re.escape(each.name)}" for each in names]
    return re.compile(rf"(?<!\w)({'|'.join(spellings)})(?!\w)", re.IGNORECASE)


class LearnedEmbedding(nn.Embedding):
    """Token embeddings, and behind them learned ones: ids from `num_embeddings` on are rows of `learned` [n, D]."""

    learned: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        last = self.num_embeddings - 1
        learned = self.learned[(ids - self.num_embeddings).clamp(min=0)]
        return torch.where((ids > last)[..., None], learned, super().forward(ids.clamp(max=last)))


def with_vectors(model: M, vectors: Tensor) -> M:
    """A twin of a CLIP text model that shares every tensor, and reads the ids behind its vocabulary as vectors [n, D].

    What it learned before stays in front. Its state dict is the model's.
    """
    twin: Any = sharing(model)
    known = twin.get_input_embeddings()
    learned = LearnedEmbedding(known.num_embeddings, known.embedding_dim, device="meta")
    learned.weight = known.weight
    rows = vectors.to(known.weight)
    learned.register_buffer("learned", torch.cat([known.learned, rows]) if hasattr(known, "learned") else rows,
                            persistent=False)
    twin.set_input_embeddings(learned)
    recipe = Recipe.of(model)
    finish: tuple[Callable[[Any], Any], ...] = (*recipe.finish, partial(with_vectors, vectors=vectors))
    found: M = Recipe(recipe.plain, recipe.changes, finish).on(twin)
    return found
