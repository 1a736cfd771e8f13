"""A prompt drawn with the attention of another: against the formula written out, and as a rule."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd import CFG, And, Constant
from ella_kd.denoiser import LDMDenoiser
from ella_kd.guidance import Guidance, GuidedDenoiser, Patched, PromptToPrompt
from ella_kd.models.blocks import TransformerBlock
from ella_kd.models.prompt_to_prompt import SourceAttention, aligned
from ella_kd.models.text import TextFeatures
from tiny import features, noise, randomised, relative, sharp_unet

WIDTH, TOKENS = 16, 5


def block() -> TransformerBlock:
    return randomised(TransformerBlock(32, WIDTH, 2), 3, 0.3).double()


@pytest.mark.parametrize("patch", [
    SourceAttention(()), SourceAttention((), tokens=(0, -1, 1, 4, -1)),
    SourceAttention((), weights=(1, 1, 3, 1, 0), pixels=5), SourceAttention((), pixels=6),
    SourceAttention((), weights=(1, 1, 0.5, 1, 1), own=True, pixels=100)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_maps_are_those_of_the_paper(patch: SourceAttention, masked: bool) -> None:
    """Head by head, pixel by pixel: the source's attention, its tokens found, re-weighted, its looks at itself where
    the map (2 x 3) is small enough; the first row is plain."""
    own, x, context = block(), noise(3, 6, 32).double(), noise(3, TOKENS, WIDTH, seed=5).double()
    mask = torch.tensor([[1, 1, 1, 1, 0]] * 3).bool() if masked else None
    got = patch(own, x, context, mask, (2, 3))
    assert torch.allclose(got[:1], own(x[:1], context[:1], None if mask is None else mask[:1]))

    def shares(q: Tensor, k: Tensor, seen: Tensor | None = None) -> Tensor:
        """q [16], k [L, 16] -> where the pixel looks [L]"""
        scores = k @ q / 4
        return (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(0)

    heads = [slice(0, 16), slice(16, 32)]
    normed, looks = own.norm1(x), own.attn1
    q, k, v, added = looks.to_q(normed), looks.to_k(normed), looks.to_v(normed), torch.zeros_like(x)
    for row, pixel, part in product(range(3), range(6), heads):
        source = 0 if patch.pixels >= 6 else row
        added[row, pixel, part] = shares(q[source, pixel, part], k[source, :, part]) @ v[row, :, part]
    after = x + looks.to_out(added)

    q, k, v = own.attn2.to_q(own.norm2(after)), own.attn2.to_k(context), own.attn2.to_v(context)
    for row, pixel, part in product(range(3), range(6), heads):
        mine, source = (shares(q[at, pixel, part], k[at, :, part], None if mask is None else mask[at])
                        for at in (row, 0))
        if row and not patch.own:
            places = patch.tokens or range(TOKENS)
            mine = torch.stack([source[j] if j >= 0 else mine[i] for i, j in enumerate(places)])
        if row and patch.weights:
            mine = mine * torch.tensor(patch.weights).double()
        added[row, pixel, part] = mine @ v[row, :, part]
    after = after + own.attn2.to_out(added)
    assert torch.allclose(got, after + own.feed_forward(after))


def test_alignment() -> None:
    assert aligned([1, 5, 6, 2], [1, 5, 9, 6, 2]) == (0, 1, -1, 2, 3)
    assert aligned([1, 2], [3]) == (-1,)
    with pytest.raises(ValueError, match="3 tokens for prompts of 5"):
        SourceAttention((), (0, 1, 2))(block(), noise(2, 6, 32).double(), noise(2, TOKENS, WIDTH).double(), None,
                                       (2, 3))


UNET = sharp_unet()
INNER, PLACES = LDMDenoiser(UNET), tuple(UNET.places)
X = noise(3, 4, 8, 8, dtype=torch.float64)
SAID, OTHER = (features(n, n, n, width=24, seed=n) for n in (4, 5))


def ask(rule: Guidance, level: float, rows: Sequence[int] = (0, 1, 2), said: Sequence[TextFeatures] = (SAID,),
        planned: bool = False, together: bool = True) -> Tensor:
    """The denoised of these rows of the batch at a noise level; of several prompts at once the mean of the answers."""
    at = list(rows)
    parts = [Constant(TextFeatures(one.tokens[at].double())) for one in said]
    cond = parts[0] if len(parts) == 1 else And(*((part, 0.5) for part in parts))
    model = GuidedDenoiser(INNER, rule, together)
    args: dict[str, Any] = {"cond": cond, "uncond": features(3, width=24, seed=9)}
    if planned:
        return model.bind(X[at] * level, (20.0, level), **args)(X[at] * level, level).denoised
    return model(X[at] * level, torch.full((len(at),), level).double(), **args)


def test_each_attention_has_its_window_of_noise_levels() -> None:
    """Above both sigmas text and self-attention are the source's, between them the text alone, below both nothing is
    done, bit for bit; 8 x 8 pixels are too many, 4 x 4 are not; the first row is plain everywhere."""
    base = CFG(3.0)
    text, both = SourceAttention(PLACES), SourceAttention(PLACES, pixels=16)
    rule, plain = PromptToPrompt(base, both, 1.0, 2.0), {level: ask(base, level) for level in (0.5, 1.5, 5.0)}
    assert torch.equal(ask(rule, 0.5), plain[0.5])
    assert torch.equal(ask(rule, 1.5), ask(Patched(base, text), 1.5))
    assert torch.equal(ask(rule, 5.0), ask(Patched(base, both), 5.0))
    assert torch.equal(ask(replace(rule, cross_lo=9.0), 5.0), ask(Patched(base, replace(both, own=True)), 5.0))
    assert torch.equal(ask(PromptToPrompt(base, SourceAttention(())), 5.0), plain[5.0])
    different = [ask(Patched(base, patch), 5.0) for patch in
                 (text, both, replace(both, own=True), replace(both, pixels=64))]
    for i, one in enumerate(different):
        assert torch.allclose(one[0], plain[5.0][0], rtol=1e-9)
        assert all(relative(one[j], other[j]) > 1e-6 for other in (plain[5.0], *different[:i]) for j in (1, 2))


@pytest.mark.parametrize("said", [(SAID,), (SAID, OTHER)], ids=["one prompt", "AND"])
def test_a_row_depends_on_the_source_and_itself_alone(said: Sequence[TextFeatures]) -> None:
    """A batch is its pairs, planned is unplanned, one call is several; of `AND` each part looks at its own source."""
    rule = PromptToPrompt(CFG(3.0), SourceAttention(PLACES, pixels=16), 1.0, 1.0)
    whole = ask(rule, 5.0, said=said)
    for i in (1, 2):
        assert relative(ask(rule, 5.0, (0, i), said)[1], whole[i]) < 1e-12
    assert relative(ask(rule, 5.0, said=said, planned=True), whole) < 1e-12
    assert relative(ask(rule, 5.0, said=said, together=False), whole) < 1e-12
    assert relative(torch.stack([ask(rule, 5.0, said=(one,)) for one in said]).mean(0), whole) < 1e-12


def test_the_same_picture_by_the_same_prompt_stays_what_it_is() -> None:
    rule = PromptToPrompt(CFG(3.0), SourceAttention(PLACES, pixels=100))
    assert torch.allclose(ask(rule, 5.0, (0, 0, 0)), ask(CFG(3.0), 5.0, (0, 0, 0)), rtol=1e-9)
