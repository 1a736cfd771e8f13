"""A prompt drawn with the attention of another: against the formula written out, and as a rule."""

import pytest
import torch

from ella_kd import CFG
from ella_kd.denoiser import LDMDenoiser
from ella_kd.guidance import GuidedDenoiser
from ella_kd.guidance.branches import Patched
from ella_kd.models.blocks import TransformerBlock
from ella_kd.models.prompt_to_prompt import SourceAttention, aligned
from tiny import features, noise, randomised, sharp_unet

WIDTH, TOKENS = 16, 5


def block() -> TransformerBlock:
    return randomised(TransformerBlock(32, WIDTH, 2), 3, 0.3).double()


@pytest.mark.parametrize("patch", [
    SourceAttention(()), SourceAttention((), tokens=(0, -1, 1, 4, -1)),
    SourceAttention((), weights=(1, 1, 3, 1, 0)), SourceAttention((), weights=(1, 1, 0.5, 1, 1), own=True)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_maps_are_those_of_the_paper(patch: SourceAttention, masked: bool) -> None:
    """Head by head, pixel by pixel: the source's attention, its tokens found, re-weighted; the first row is plain."""
    own, x, context = block(), noise(3, 6, 32).double(), noise(3, TOKENS, WIDTH, seed=5).double()
    mask = torch.tensor([[1, 1, 1, 1, 0]] * 3).bool() if masked else None
    got = patch(own, x, context, mask, (2, 3))
    assert torch.allclose(got[:1], own(x[:1], context[:1], None if mask is None else mask[:1]))

    after = x + own.self_attention(x)
    q, k, v = own.attn2.to_q(own.norm2(after)), own.attn2.to_k(context), own.attn2.to_v(context)
    added = torch.zeros_like(q)
    for row in range(3):
        for head in range(2):
            part = slice(head * 16, head * 16 + 16)

            def shares(row: int, pixel: int, part: slice = part) -> torch.Tensor:
                scores = k[row, :, part] @ q[row, pixel, part] / 4
                return (scores if mask is None else scores.masked_fill(~mask[row], -torch.inf)).softmax(0)

            for pixel in range(6):
                mine, source = shares(row, pixel), shares(0, pixel)
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


def test_the_rule_patches_the_cond_above_its_sigma() -> None:
    """Below it, it is its base; above, the source row is plain, and equal prompts stay equal to themselves."""
    unet = sharp_unet()
    inner, rule = LDMDenoiser(unet), Patched(CFG(3.0), SourceAttention(unet.places), sigma_lo=1.0)
    x, same = noise(2, 4, 8, 8, dtype=torch.float64), features(4, width=24)
    both, uncond = features(4, 4, width=24), features(2, width=24, seed=9)
    for cond in (same, both):
        for level in (0.5, 5.0):
            sigma = torch.full((2,), level).double()
            args = {"cond": cond, "uncond": uncond}
            plain = GuidedDenoiser(inner, CFG(3.0))(x * level, sigma, **args)
            got = GuidedDenoiser(inner, rule)(x * level, sigma, **args)
            assert torch.allclose(got[0], plain[0], rtol=1e-9)
            changed = float((got[1] - plain[1]).abs().max()) > 1e-6
            assert changed == (level > 1)
