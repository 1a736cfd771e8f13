"""`(word:1.3)` for T5: weights reach the tokens of their words, with every kind of tokenizer."""

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

from ella_kd.models import T5TextEncoder
from ella_kd.models.emphasis import escape
from ella_kd.models.t5 import _token_weight
from test_models_text import WORDS, t5, t5_config, t5_folder

__all__ = ["t5", "t5_config", "t5_folder"]  # fixtures


def test_weights_reach_the_tokens_of_their_words(t5: T5TextEncoder) -> None:
    plain, got = t5(["a red square left", "a circle"]), t5.weighted(["a (red:1.3) [square] left", "(a:0) circle"])
    assert torch.equal(got.tokens, plain.tokens)
    assert got.mask is not None
    assert got.mask.dtype == torch.float32
    assert torch.equal(got.mask, torch.tensor([[1, 1.3, 1 / 1.1, 1, 1], [0, 1, 1, 0, 0]]))
    fixed = t5.weighted(["a (red:1.3)", "a"], max_length=5)
    assert torch.equal(fixed.tokens, t5(["a red", "a"], max_length=5).tokens)
    assert fixed.mask is not None
    assert torch.equal(fixed.mask, torch.tensor([[1, 1.3, 1, 1, 1], [1, 1, 1, 1, 1]]))
    with pytest.warns(UserWarning, match="4 tokens and 3 are read"):
        cut = t5.weighted("a (red circle:2)", max_length=3).mask
    assert cut is not None
    assert cut.tolist() == [[1, 2, 1]]


@pytest.mark.parametrize("max_length", [None, 9])
def test_weights_of_one_change_nothing(t5: T5TextEncoder, max_length: int | None) -> None:
    got, want = t5.weighted(["a (red:1.0) circle", r"a BREAK ([square])"], max_length), t5(["a red circle", "a square"],
                                                                                          max_length)
    assert torch.equal(got.tokens, want.tokens)
    if max_length is None:
        assert got.mask is not None and want.mask is not None
        assert torch.equal(got.mask, want.mask)
        assert got.mask.dtype == torch.bool
    else:
        assert got.mask is None
    assert torch.equal(t5.weighted(escape("( red")).tokens, t5("( red").tokens)


@given(st.lists(st.tuples(st.sampled_from(WORDS[:8]), st.sampled_from([0.0, 0.5, 1.0, 2.5])), min_size=1, max_size=6))
def test_each_word_has_its_weight(t5: T5TextEncoder, words: list[tuple[str, float]]) -> None:
    got = t5.weighted(" ".join(f"({word}:{weight})" for word, weight in words))
    assert torch.equal(got.tokens, t5(" ".join(word for word, _ in words)).tokens)
    assert got.mask is not None
    assert got.mask[0].tolist() == [*(weight for _, weight in words), 1]


def test_a_token_of_two_weights_has_the_mean_of_its_characters(t5: T5TextEncoder) -> None:
    mask = t5.weighted("(squ:3)are (a red:2)").mask
    assert mask is not None
    assert mask.tolist() == [[2, 2, 2, 1]]
    assert _token_weight(0, 3, [(" ", 9.0), ("a", 2.0), ("b", 4.0)]) == 3  # "_ab" with the space before it
    assert _token_weight(0, 1, [(" ", 9.0), ("a", 2.0)]) == 9
    assert _token_weight(2, 2, [(" ", 9.0), ("a", 2.0)]) == 1


def test_weights_that_t5_cannot_have_are_refused(t5: T5TextEncoder) -> None:
    with pytest.raises(ValueError, match="at least 0, 'red' has -1"):
        t5.weighted("a (red:-1) circle")
    with pytest.raises(ValueError, match="edits the prompt"):
        t5.weighted("a [red:blue:0.5] circle")

    class Slow:
        is_fast = False

        def __call__(self, *args: Any, return_offsets_mapping: bool = False, **kwargs: Any) -> Any:
            assert not return_offsets_mapping
            batch = t5.tokenizer(*args, **kwargs)
            return BatchEncoding(dict(batch))

    slow = T5TextEncoder(t5.model, cast(PreTrainedTokenizerFast, Slow()))
    assert torch.equal(slow("a red").tokens, t5("a red").tokens)
    assert torch.equal(slow.weighted("a (red:1)").tokens, t5("a red").tokens)
    with pytest.raises(ValueError, match="use a T5 folder with a tokenizer"):
        slow.weighted("a (red:2)")


@pytest.mark.parametrize("split", [False, True])
def test_weights_reach_sentencepiece_tokens(t5: T5TextEncoder, split: bool) -> None:
    """T5's own kind of tokenizer: pieces of words, a mark for the space before a word, and a normaliser."""
    pieces = [*"<pad> </s> <unk> \u2581 \u2581a \u2581red dish \u2581fi \u2581, , \u2581square".split(), " "]
    unigram = Tokenizer(models.Unigram([(piece, -float(len(pieces) - len(piece))) for piece in pieces], 2))
    unigram.normalizer = normalizers.NFKC()
    split_first = [pre_tokenizers.WhitespaceSplit()] if split else []
    unigram.pre_tokenizer = pre_tokenizers.Sequence([*split_first, pre_tokenizers.Metaspace()])
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    encoder = T5TextEncoder(t5.model, PreTrainedTokenizerFast(tokenizer_object=unigram, pad_token="<pad>",
                                                              eos_token="</s>", unk_token="<unk>"))
    words = encoder.tokenizer.tokenize("a reddish \ufb01 , square")
    assert words == ["\u2581a", "\u2581red", "dish", "\u2581fi", "\u2581,", "\u2581square"]
    got = encoder.weighted(["a (reddish:2) [\ufb01] (,:3) square", "(a red:.5)dish"])
    assert got.mask is not None
    assert got.mask[0].tolist() == pytest.approx([1, 2, 2, 1 / 1.1, 3, 1, 1])
    assert got.mask[1].tolist() == [.5, .5, 1, 1, 0, 0, 0]
    assert torch.equal(got.tokens, encoder(["a reddish \ufb01 , square", "a reddish"]).tokens)
