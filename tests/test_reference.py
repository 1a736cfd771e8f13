"""Reference-only against the published pipeline's blocks, written down again; per row, by sigma, with every rule."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd import CFG, PAG, CFGDenoiser, Constant, GuidedDenoiser, LDMDenoiser
from ella_kd.conditioning.reference import Noised, with_reference
from ella_kd.models import TextFeatures, UNet
from ella_kd.models.inside import Inside
from ella_kd.models.tome import ToMe
from ella_kd.samplers import sample_dpmpp_2m
from tiny import WIDTH, noise, relative, sharp_unet, tiny_unet

SIGMA = 2.5


def prompt(seed: int, rows: int = 1, length: int = 7) -> Constant:
    return Constant(TextFeatures(noise(rows, length, WIDTH, seed=seed, dtype=torch.float64)))


def published(unet: UNet, x: Tensor, ref: Tensor, t: Tensor, tokens: Tensor, uncond: Tensor, fidelity: float) -> Tensor:
    """The community pipeline's two runs, with hooks in its way: rows of the reference are written down, then read.

    uncond [B] bool: the rows that answer the negative prompt.
    """
    bank: dict[Any, Tensor] = {}
    reading = False

    def forward(block: Any) -> Any:
        def block_forward(h: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
            normed = block.norm1(h)
            if not reading:
                bank[block] = normed
                attended = block.attn1(normed, normed)
            else:
                both = block.attn1(normed, torch.cat([normed, bank[block]], 1))
                plain = both.clone()
                plain[uncond] = block.attn1(normed[uncond], normed[uncond])
                attended = fidelity * plain + (1 - fidelity) * both
            h = h + attended
            h = h + block.cross_attention(h, context, mask)
            return h + block.feed_forward(h)
        return block_forward

    blocks = [block for place in unet.places for block in unet.get_submodule(place).transformer_blocks]  # type: ignore[union-attr]
    for block in blocks:
        block.forward = forward(block)
    unet(ref, t, tokens)
    reading = True
    out = unet(x, t, tokens)
    for block in blocks:
        del block.forward
    return out


@pytest.mark.parametrize("fidelity", [0.0, 0.4, 1.0])
def test_equals_the_published_pipeline(fidelity: float) -> None:
    unet = sharp_unet()
    denoiser = CFGDenoiser(LDMDenoiser(unet))
    x, latents = noise(2, 4, 12, 9, dtype=torch.float64) * SIGMA, noise(1, 4, 12, 9, seed=8, dtype=torch.float64)
    cond, uncond = prompt(4), prompt(5)
    sigma = torch.full((2,), SIGMA, dtype=torch.float64)
    looking = with_reference(cond, latents, seed=3)
    got = denoiser(x, sigma, cond=looking, uncond=uncond.with_reference(latents, 1 - fidelity, seed=3), cond_scale=4.0)
    t, c_in = denoiser.sigma_to_t(sigma), (1 + SIGMA**2) ** -0.5
    shown = looking.at((SIGMA,))(t).references[0].latents
    hidden = (shown[:1] / c_in - latents) / SIGMA
    assert hidden.std() == pytest.approx(1, abs=0.1) and relative(hidden, noise(1, 4, 12, 9, seed=3)) > 1
    tokens = torch.cat([c.features.tokens.expand(2, -1, -1) for c in (uncond, cond)])
    eps = published(unet, (x * c_in).repeat(2, 1, 1, 1), shown[:1].expand(4, -1, -1, -1), t.repeat(2), tokens,
                    torch.tensor([True, True, False, False]), fidelity)
    u, c = (x - SIGMA * part for part in eps.chunk(2))
    assert relative(got, u + 4 * (c - u)) < 1e-12
    assert relative(got, denoiser(x, sigma, cond=cond, uncond=uncond, cond_scale=4.0)) > 1e-4


def test_batches_equal_singles_rows_without_share_the_call_and_off_is_off() -> None:
    unet = sharp_unet()
    denoiser = LDMDenoiser(unet)
    x, sigma = noise(3, 4, 8, 8, dtype=torch.float64), torch.tensor([9.0, SIGMA, SIGMA], dtype=torch.float64)
    latents = noise(3, 4, 6, 10, seed=8, dtype=torch.float64)  # of another size
    cond = prompt(4, rows=3)
    looking = cond.with_reference(latents, (1.0, 0.3, 0.0), window=(5.0, 1.0))
    got, plain = denoiser(x, sigma, cond=looking), denoiser(x, sigma, cond=cond)
    assert relative(got[[0, 2]], plain[[0, 2]]) < 1e-14, "above the window, and of weight 0"
    assert relative(got[1], plain[1]) > 1e-5
    own = Constant(TextFeatures(cond.features.tokens[1:2])).with_reference(latents[1:2], 0.3)
    assert relative(got[1:2], denoiser(x[1:2], sigma[1:2], cond=own)) < 1e-12
    for off in (cond.with_reference(latents, 0.0), cond.with_reference(latents, window=(0.5, 0.1))):
        assert torch.equal(denoiser(x, sigma, cond=off), plain)
    calls = []
    unet.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
    denoiser(x, sigma, cond=looking)
    assert calls == [1, 3], "the reference runs for the row that looks at it"


def test_with_guidance_that_patches_tokens_merged_and_any_sampler() -> None:
    unet = sharp_unet()
    network = Inside(unet, ToMe(0.5))
    latents, x = noise(1, 4, 8, 8, seed=8, dtype=torch.float64), noise(2, 4, 8, 8, dtype=torch.float64)
    args = {"cond": prompt(4).with_reference(latents), "uncond": prompt(5).with_reference(latents, 0.5)}
    rule = GuidedDenoiser(LDMDenoiser(network), PAG(CFG(4.0), 3.0))
    sigmas = torch.tensor([9.0, SIGMA, 0.8, 0.0], dtype=torch.float64)
    whole = sample_dpmpp_2m(rule, x * 9, sigmas, extra_args=args, disable=True)
    apart = GuidedDenoiser(LDMDenoiser(network), PAG(CFG(4.0), 3.0), together=False)
    assert relative(sample_dpmpp_2m(apart, x * 9, sigmas, extra_args=args, disable=True), whole) < 1e-10
    one = sample_dpmpp_2m(rule, x[1:] * 9, sigmas, extra_args=args, disable=True)
    assert relative(one, whole[1:]) < 1e-10
    without = {"cond": prompt(4), "uncond": prompt(5)}
    assert relative(sample_dpmpp_2m(rule, x * 9, sigmas, extra_args=without, disable=True), whole) > 1e-4


def test_it_is_the_same_noise_at_every_sigma_and_what_cannot_be() -> None:
    cond, latents = prompt(4), noise(1, 4, 8, 8)
    looking = cond.with_reference(latents, seed=7)
    t = torch.tensor([500.0])
    near, far = (looking.at((s,))(t).references[0].latents * (1 + s * s) ** 0.5 for s in (1.0, 2.0))
    assert relative(2 * near - far, latents) < 1e-5
    assert Noised(latents, latents).at(1.0, 0.5).shape == latents.shape
    with pytest.raises(ValueError, match="noised by sigma"):
        looking(t)
    with pytest.raises(ValueError, match=r"latents \[B, C, h, w\]"):
        cond.with_reference(latents[0])
    both = looking.with_reference(latents)
    with pytest.raises(ValueError, match="one reference, and here at two"):
        LDMDenoiser(tiny_unet().double())(noise(1, 4, 8, 8, dtype=torch.float64), torch.ones(1).double(), both)
