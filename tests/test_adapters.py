from typing import Any, cast

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ella_kd import CFGDenoiser, DiffusersUNet, ELLADenoiser, LDMDenoiser
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


def test_wrong_width(unet: Any) -> None:
    with pytest.raises(ValueError, match="width 24, got 12"):
        LDMDenoiser(DiffusersUNet(unet))(X, SIGMA, features(3))
