"""A text encoder that reads every text of a shard once."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import torch

from ella_kd.addon_words import without_prefix
from ella_kd.models import TextFeatures
from ella_kd.models.context import pile
from ella_kd.pipeline import FIXED_LENGTH, Pipeline
from ella_kd.prompt_editing import edits
from ella_kd.prompts import split_and
from ella_kd.request import Request

AT_ONCE = 16  # texts that T5 reads together
Said = tuple[str, int | None, bool]  # a text, the length it is padded to, whether its weights count


def remembering(pipeline: Pipeline, requests: Sequence[Request]) -> Pipeline:
    """The pipeline for a shard of these requests, each text of which T5 reads once."""
    return pipeline if pipeline.t5 is None else replace(pipeline, t5=cast(Any, Remembered(pipeline.t5, requests)))


class Remembered:
    """T5 for a shard: `Remembered(t5, requests)` reads all that they say at once, and answers from memory.

    What T5 says of a text depends by rounding on the texts beside it: these are always the same for a shard, so that
    one that is taken up again gets the same features. Texts that nobody foresaw are read alone.
    """

    def __init__(self, t5: Any, requests: Iterable[Request]) -> None:
        self.t5 = t5
        self._known: dict[Said, TextFeatures] = {}
        ways: dict[tuple[int | None, bool], set[str]] = {}
        for text, length, weighted in (each for request in requests for each in texts_of(request)):
            ways.setdefault((length, weighted), set()).add(text)
        for (length, weighted), found in ways.items():
            texts = sorted(found, key=lambda text: (len(text), text))  # of like length together: less padding
            for start in range(0, len(texts), AT_ONCE):
                with suppress(Exception):  # asked for alone, the one that cannot be read says so
                    self._learn(texts[start : start + AT_ONCE], length, weighted)

    def __call__(self, prompts: str | Sequence[str], max_length: int | None = None) -> TextFeatures:
        """Prompts -> features, as `T5TextEncoder` gives them."""
        return self._read(prompts, max_length, weighted=False)

    def weighted(self, prompts: str | Sequence[str], max_length: int | None = None) -> TextFeatures:
        """Prompts with weights -> features, as `T5TextEncoder.weighted` gives them."""
        return self._read(prompts, max_length, weighted=True)

    def release(self, rest: torch.device | None = None) -> None:
        self.t5.release(rest)

    def _read(self, prompts: str | Sequence[str], length: int | None, weighted: bool) -> TextFeatures:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        for text in texts:
            if (text, length, weighted) not in self._known:
                self._learn([text], length, weighted)
        return TextFeatures(*pile([self._known[text, length, weighted] for text in texts]))

    def _learn(self, texts: list[str], length: int | None, weighted: bool) -> None:
        features = (self.t5.weighted if weighted else self.t5)(texts, length)
        for i, text in enumerate(texts):
            tokens, mask = features.tokens[i : i + 1], None if features.mask is None else features.mask[i : i + 1]
            if mask is not None and length is None:  # without the padding to the longest beside it
                end = int(mask[0].nonzero().max()) + 1
                tokens, mask = tokens[:, :end], mask[:, :end]
            self._known[text, length, weighted] = TextFeatures(tokens, mask)


def texts_of(request: Request) -> Iterator[Said]:
    """What T5 will be asked about a request, in its own words and for its second pass."""
    for asked in (request, request.second_pass()) if request.hires is not None else (request,):
        prompts = [text for text, _ in split_and(asked.text)] if asked.syntax else [asked.text]
        for texts, mode in ((prompts, asked.mode), ([asked.negative], asked.negative_mode or asked.mode)):
            for text in () if mode == "clip" else texts:
                for said in dict.fromkeys(edits(text, asked.steps)) if asked.syntax else (text,):
                    yield without_prefix(said), FIXED_LENGTH if mode == "fixed" else None, asked.syntax
