"""A request's texts as what they are to a pipeline: conditions, weighted, combined and changing on the way."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from ella_kd.addon_words import without_prefix
from ella_kd.conditioning import And, Concat, Conditioning, Switch
from ella_kd.denoiser import Condition
from ella_kd.models.added import NEGATIVE_SCORE, POSITIVE_SCORE
from ella_kd.pipeline import Pipeline
from ella_kd.prompt_editing import edits
from ella_kd.prompts import split_and
from ella_kd.request import Mode, Request


def reader(pipeline: Pipeline, asked: Request,
           levels: Sequence[float] | None) -> Callable[[list[Request]], tuple[Condition, Conditioning]]:
    """What makes of a batch's prompts and negatives what they are to a pipeline."""
    # ELLA's tokens of "" and CLIP's of "" stand against ELLA's and the tags': the same kinds on both sides.
    no_tags = "" if asked.tags is not None and asked.negative_mode is None else None

    def encode(texts: Sequence[str], mode: Mode, extra: str | None, score: float = POSITIVE_SCORE) -> Conditioning:
        texts = texts if mode == "clip" else tuple(map(without_prefix, texts))
        encoded = _over_steps(texts, lambda t: pipeline.encode(t, mode, weighted=asked.syntax, score=score,
                                                               clip_skip=asked.clip_skip), levels)
        return encoded if extra is None else Concat(encoded, encode([extra], "clip", None))

    @lru_cache(1)
    def cond_of(prompts: tuple[str, ...]) -> Condition:
        return _condition(prompts, lambda texts: encode(texts, asked.mode, asked.tags), asked.syntax)

    @lru_cache(1)
    def uncond_of(negatives: tuple[str, ...]) -> Conditioning:
        return encode(negatives, asked.negative_mode or asked.mode, no_tags, NEGATIVE_SCORE)

    def read(batch: list[Request]) -> tuple[Condition, Conditioning]:
        found = cond_of(_one_if_equal(r.text for r in batch)), uncond_of(_one_if_equal(r.negative for r in batch))
        pipeline.rest()
        return found

    return read


def _condition(prompts: Sequence[str], encode: Callable[[Sequence[str]], Conditioning], syntax: bool) -> Condition:
    """Prompts of equal weights, one row each, as what they say: one conditioning, or the AND of several."""
    if not syntax:
        return encode(prompts)
    terms = list(zip(*(split_and(prompt) for prompt in prompts), strict=True))  # term by term, each of all the prompts
    if len(terms) == 1 and terms[0][0][1] == 1:
        return encode([text for text, _ in terms[0]])
    return And(*((encode([text for text, _ in term]), term[0][1]) for term in terms))


def _over_steps(texts: Sequence[str], encode: Callable[[Sequence[str]], Conditioning],
                sigmas: Sequence[float] | None) -> Conditioning:
    """Texts encoded, one row each; with the sigmas of a run, those that change from step to step as a switch."""
    if sigmas is None:
        return encode(texts)
    steps = list(zip(*(edits(text, len(sigmas) - 1) for text in texts), strict=True))
    starts = [i for i, said in enumerate(steps) if i == 0 or said != steps[i - 1]]
    encoded = {said: encode(said) for said in dict.fromkeys(steps)}
    parts = [encoded[steps[i]] for i in starts]
    return parts[0] if len(parts) == 1 else Switch(*parts, at=[sigmas[i] for i in starts[1:]])


def weights(prompt: str) -> tuple[float, ...]:
    return tuple(weight for _, weight in split_and(prompt))


def _one_if_equal(texts: Iterable[str]) -> tuple[str, ...]:
    """All of them, or one for all rows: a batch of another size then asks for the same."""
    found = tuple(texts)
    return found[:1] if len(set(found)) == 1 else found
