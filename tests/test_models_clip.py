"""CLIP with a tiny model: padding, truncation, layers, weights, and prompts of any length in chunks."""

import warnings
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ella_kd.models import CLIPTextEncoder
from ella_kd.models.emphasis import parse
from test_models_text import WORDS, error, word_tokenizer


@pytest.fixture(scope="module")
def clip() -> CLIPTextEncoder:
    torch.manual_seed(0)
    config = CLIPTextConfig(vocab_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                            num_attention_heads=2, max_position_embeddings=6, bos_token_id=2, eos_token_id=1)
    model = CLIPTextModel(config).eval()
    torch.nn.init.normal_(getattr(model, "text_model", model).final_layer_norm.bias, 0.1)  # real ones have a mean
    return CLIPTextEncoder(model, word_tokenizer(["<pad>", "<end>", "<start>", "<unk>"], "<start> $A <end>"))


def final_norm(clip: CLIPTextEncoder) -> nn.LayerNorm:
    found = getattr(clip.model, "text_model", clip.model).final_layer_norm
    assert isinstance(found, nn.LayerNorm)
    return found


def hidden(clip: CLIPTextEncoder, *ids: int) -> Tensor:
    """The hidden states of one chunk, given its tokens; <start> 2, <end> 1, <pad> 0, room for 4."""
    with torch.no_grad():
        return clip.model(torch.tensor([[2, *ids, 1, *[0] * (4 - len(ids))]])).last_hidden_state


A, RED, BLUE, SQUARE, CIRCLE, COMMA = 4, 5, 6, 7, 8, 12


def test_clip_scales_the_hidden_states_and_restores_the_mean(clip: CLIPTextEncoder) -> None:
    h = hidden(clip, A, RED, CIRCLE)
    z = h * torch.tensor([1, 1, 1.5, 1 / 1.1, 1, 1])[:, None]
    got = clip.weighted("a (red:1.5) [circle]")
    assert got.mask is None
    assert error(got.tokens, z * (h.mean() / z.mean())) < 1e-5
    assert torch.equal(clip.weighted("a (red:1) circle").tokens, clip("a red circle").tokens)


@pytest.mark.parametrize(("prompt", "want"), [
    ("a red blue square", [[A, RED, BLUE, SQUARE]]),
    ("a red blue square circle", [[A, RED, BLUE, SQUARE], [CIRCLE]]),
    ("a red blue square , circle", [[A, RED, BLUE, SQUARE], [COMMA, CIRCLE]]),
    ("a red , square circle", [[A, RED, COMMA], [SQUARE, CIRCLE]]),
    ("a , red , square circle", [[A, COMMA, RED, COMMA], [SQUARE, CIRCLE]]),
    ("a , red , square , a , red circle", [[A, COMMA, RED, COMMA], [SQUARE, COMMA, A, COMMA], [RED, CIRCLE]]),
    ("a , red blue , circle", [[A, COMMA, RED, BLUE], [COMMA, CIRCLE]]),
    ("a BREAK red circle", [[A], [RED, CIRCLE]]),
    ("BREAK a red blue square circle BREAK", [[], [A, RED, BLUE, SQUARE], [CIRCLE]]),
    ("", [[]]),
])
def test_long_clip_prompts_are_cut_into_chunks(clip: CLIPTextEncoder, prompt: str, want: list[list[int]]) -> None:
    got = clip.weighted(prompt).tokens
    assert error(got, torch.cat([hidden(clip, *ids) for ids in want], 1)) < 1e-6
    assert got.shape[1] == 6 * len(want)


def test_clip_pads_to_its_positions_and_sees_them_all(clip: CLIPTextEncoder) -> None:
    features = clip(["a circle", ""])
    assert features.tokens.shape == (2, 6, 32)
    assert features.mask is None
    ids = torch.tensor([[2, 4, 8, 1, 0, 0], [2, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        want = clip.model(ids).last_hidden_state  # no attention mask, after the final layer norm
    assert torch.equal(features.tokens, want)
    norm = final_norm(clip)
    assert torch.allclose((features.tokens - norm.bias).var(-1, correction=0), torch.ones(2, 6), atol=1e-3)


def test_clip_truncates_with_a_warning(clip: CLIPTextEncoder) -> None:
    with pytest.warns(UserWarning, match="10 tokens and 6 are read: what follows is lost, from 'a red square"):
        features = clip(["a circle", "a red square left of the blue circle"])
    assert torch.equal(features.tokens[1:], clip("a red square left").tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip("a red square left")


def test_clip_skip_counts_from_the_last_layer(clip: CLIPTextEncoder) -> None:
    ids = torch.tensor([[2, A, CIRCLE, 1, 0, 0]])
    with torch.no_grad():
        states = clip.model(ids, output_hidden_states=True).hidden_states
        norm = final_norm(clip)
        for skip in (1, 2):
            want = norm(states[-skip])  # diffusers: hidden_states[-(clip_skip + 1)], so its clip_skip is one less
            assert error(clip("a circle", clip_skip=skip).tokens, want) < 1e-6
            assert error(clip.weighted("a circle", clip_skip=skip).tokens, want) < 1e-6
    assert error(clip("a circle", clip_skip=2).tokens, clip("a circle").tokens) > 1e-2
    for skip in (0, 3, -1):
        with pytest.raises(ValueError, match=r"clip_skip must be from 1 \(the layer that the UNet knows\) to 2"):
            clip("a", clip_skip=skip)


def test_clip_features_without_a_mean_are_scaled_only(clip: CLIPTextEncoder) -> None:
    """0 / 0 otherwise: a LayerNorm without affine, as in a fresh CLIP, has the mean 0."""
    flat = CLIPTextEncoder(deepcopy(clip.model), clip.tokenizer)
    torch.nn.init.zeros_(final_norm(flat).bias)
    want = flat("a red circle").tokens * torch.tensor([1, 1, 1.5, 1, 1, 1])[:, None]
    assert error(flat.weighted("a (red:1.5) circle").tokens, want) < 1e-6


def test_a_batch_of_weighted_clip_prompts_equals_singles(clip: CLIPTextEncoder) -> None:
    prompts = ["a (red:1.5) circle", "a red circle", "a blue BREAK a (square:3)", "[a]"]
    batch = clip.weighted(prompts)
    assert batch.tokens.shape == (4, 12, 32)
    assert batch.mask is not None
    assert batch.mask.sum(1).tolist() == [6, 6, 12, 6]
    for row, prompt in enumerate(prompts):
        alone = clip.weighted(prompt)
        assert alone.mask is None
        length = alone.tokens.shape[1]
        assert batch.mask[row, :length].all()
        assert error(batch.tokens[row, :length], alone.tokens[0]) < 1e-6


def test_the_comma_must_be_near_the_end(clip: CLIPTextEncoder) -> None:
    """A1111: the last comma counts among the last 20 of 75 tokens."""
    torch.manual_seed(0)
    big = CLIPTextEncoder(CLIPTextModel(CLIPTextConfig(
        vocab_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=2, eos_token_id=1)).eval(), clip.tokenizer)
    for before, first in ((54, 75), (55, 56), (74, 75)):
        parts = big._split([("red " * before + ", " + "blue " * (100 - before), 1.0)])
        assert [len(part) for part in parts] == [first, 101 - first]
    assert big.weighted("red " * 200).tokens.shape == (1, 231, 32)


@given(st.lists(st.sampled_from([*WORDS[:9], "BREAK", "(red:2)", "((a)"]), max_size=15).map(" ".join))
def test_no_token_of_a_clip_prompt_is_lost(clip: CLIPTextEncoder, prompt: str) -> None:
    parts = clip._chunks(prompt)
    assert all(len(part) == 6 for part in parts)
    want = [token for text, _ in parse(prompt) for token in clip.tokenizer(text, add_special_tokens=False).input_ids]
    assert [token for part in parts for token, _ in part if token > 2] == want
    assert clip.weighted(prompt).tokens.isfinite().all()


@pytest.mark.parametrize(("prompts", "kind"), [([], ValueError), (["a", 3], TypeError), ([None], TypeError)])
def test_wrong_prompts_are_refused(clip: CLIPTextEncoder, prompts: list[str], kind: type[Exception]) -> None:
    for call in (clip, clip.weighted):
        with pytest.raises(kind, match="prompt"):
            call(prompts)
