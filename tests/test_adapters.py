from copy import deepcopy
from typing import Any, cast

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ella_kd import CFGDenoiser, DiffusersUNet, ELLADenoiser, LDMDenoiser
from ella_kd.adapters import _Bias
from ella_kd.models.context import Context
from ella_kd.models.text import TextFeatures
from tiny import WIDTH, features, noise, randomised, relative, row, tiny_tsc

X, SIGMA = noise(2, 4, 8, 8) * 3, torch.tensor([2.0, 7.0])


@pytest.fixture(scope="module")
def unet() -> Any:
    return randomised(cast(nn.Module, UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))), 0, 0.1)


def test_equals_diffusers_own_call(unet: Any) -> None:
    denoiser, text = LDMDenoiser(DiffusersUNet(unet)), features(5, 5, width=WIDTH)
    eps = unet(X / (SIGMA[:, None, None, None]**2 + 1).sqrt(), denoiser.sigma_to_t(SIGMA), text.tokens).sample
    assert relative(denoiser(X, SIGMA, text), X - SIGMA[:, None, None, None] * eps) < 1e-6


def test_the_mask_hides_padding(unet: Any) -> None:
    denoiser, text = LDMDenoiser(DiffusersUNet(unet)), features(6, 2, width=WIDTH)
    batch = denoiser(X, SIGMA, text)
    for i in range(2):
        assert relative(batch[i:i + 1], denoiser(X[i:i + 1], SIGMA[i:i + 1], row(text, i))) < 1e-5
    assert relative(denoiser(X, SIGMA, TextFeatures(text.tokens)), batch) > 1e-3


def test_ella_and_guidance_around_it(unet: Any) -> None:
    inner = ELLADenoiser(DiffusersUNet(unet), tiny_tsc())
    cond, uncond = features(6, 2), features(9, width=WIDTH)
    c, u = inner(X, SIGMA, cond), inner(X, SIGMA, LDMDenoiser(unet).lift(uncond))
    got = CFGDenoiser(inner)(X, SIGMA, cond=cond, uncond=LDMDenoiser(unet).lift(uncond), cond_scale=3.0)
    assert relative(got, u + 3 * (c - u)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weighted_token_is_a_repeated_token(unet: Any, dtype: torch.dtype) -> None:
    """Sent as a number through diffusers' own formula, log 20 would become 4.9 in fp16, and 0 in bf16."""
    net, x, t = deepcopy(unet).to(dtype), X[:1].to(dtype), torch.tensor([500.0])
    tokens, weights = 4 * features(5, width=WIDTH).tokens.to(dtype), torch.tensor([[20.0, 1, 0, 1, 1]])
    got = DiffusersUNet(net)(x, t, Context(tokens, weights))
    want = DiffusersUNet(net)(x, t, tokens[:, [*20 * [0], 1, 3, 4]])
    assert got.dtype == dtype
    effect = relative(DiffusersUNet(net)(x, t, Context(tokens, weights > 0)), want)
    assert effect > 0.02
    assert relative(got, want) < effect * {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]


def test_weights_of_one_are_no_mask(unet: Any) -> None:
    text, t = features(5, 2, width=WIDTH), torch.tensor([500.0, 20.0])
    plain = DiffusersUNet(unet)(X, t, text.tokens)
    assert relative(DiffusersUNet(unet)(X, t, Context(text.tokens, torch.ones(2, 5))), plain) < 1e-6


def test_a_mask_that_does_not_fit(unet: Any) -> None:
    tokens, t = features(5, width=WIDTH).tokens, torch.tensor([500.0])
    for mask in (torch.ones(1, 4), torch.ones(1, 5).int(), -torch.ones(1, 5)):
        with pytest.raises(ValueError, match="mask"):
            DiffusersUNet(unet)(X[:1], t, Context(tokens, mask))
    for other in (lambda m: 2 - m, lambda m: (1 - m) * -9.0, lambda m: m * 1.0):
        with pytest.raises(TypeError, match="this diffusers does not"):
            other(_Bias(torch.zeros(1, 5)))


def test_wrong_width(unet: Any) -> None:
    with pytest.raises(ValueError, match="width 24, got 12"):
        LDMDenoiser(DiffusersUNet(unet))(X, SIGMA, features(3))
