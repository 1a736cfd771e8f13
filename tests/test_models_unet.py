"""The UNet against diffusers' UNet2DConditionModel with the same random weights, and against the real names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed.ways import as_diffusers
from ella_kd.models import UNet, UNetConfig
from ella_kd.models.context import Context

DATA = Path(__file__).parent / "data"
PREFIX = "model.diffusion_model."

SD15 = UNetConfig(model_channels=32, context_dim=24)
SD2 = UNetConfig(model_channels=32, context_dim=24, num_heads=None, head_dim=16, linear_proj=True)
MINIATURE = UNetConfig(model_channels=64, channel_mult=(1, 2, 3), num_res_blocks=1, attention=(True, True, True),
                       context_dim=16)
INPAINTING = UNetConfig(in_channels=9, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                        attention=(False, True), context_dim=12)
CONFIGS = {"sd15": SD15, "sd2": SD2, "miniature": MINIATURE, "inpainting": INPAINTING}


def random_unet(config: UNetConfig, seed: int = 0) -> UNet:
    """A UNet whose every parameter is random, those that start at zero or one too."""
    torch.manual_seed(seed)
    unet = UNet(config)
    for name, parameter in unet.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return unet.requires_grad_(False)


def inputs(config: UNetConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, 16, 8, generator=generator, dtype=dtype)
    context = torch.randn(2, 5, config.context_dim, generator=generator, dtype=dtype)
    return x, torch.tensor([961.73, 3.25]), context


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name: str, dtype: torch.dtype, tolerance: float) -> None:
    unet = random_unet(CONFIGS[name]).to(dtype)
    x, t, context = inputs(unet.config, dtype)
    twin = as_diffusers(unet)
    got = unet(x, t, context)
    assert got.std() > 0.1
    assert error(got, twin(x, t, context).sample) < tolerance
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    masked = unet(x, t, Context(context, mask))
    assert error(masked, twin(x, t, context, encoder_attention_mask=mask).sample) < tolerance
    assert error(masked[:1], got[:1]) > 1e-3


@pytest.mark.parametrize("size", [(7, 5), (9, 8), (8, 11), (1, 3)])
def test_any_size_equals_diffusers(size: tuple[int, int]) -> None:
    unet = random_unet(MINIATURE).double()
    _, t, context = inputs(unet.config, torch.float64)
    x = torch.randn(2, unet.config.in_channels, *size, dtype=torch.float64)
    got = unet(x, t, context)
    assert got.shape == x.shape
    assert error(got, as_diffusers(unet)(x, t, context).sample) < 1e-12


def test_a_mask_equals_slicing() -> None:
    unet = random_unet(MINIATURE).double()
    x, t, context = inputs(unet.config, torch.float64)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    got = unet(x, t, Context(context, mask))
    assert error(got[:1], unet(x[:1], t[:1], context[:1, :3])) < 1e-13
    assert error(got[1:], unet(x[1:], t[1:], context[1:])) < 1e-13


def test_a_mask_of_weights_counts_tokens_again() -> None:
    """Weight 2 is the same token twice, weight 0 none: a key's factor in the softmax."""
    unet = random_unet(MINIATURE).double()
    x, t, context = inputs(unet.config, torch.float64)
    weights = torch.tensor([[1.0, 2.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 2.0, 1.0]], dtype=torch.float64)
    got = unet(x, t, Context(context, weights))
    assert error(got[:1], unet(x[:1], t[:1], context[:1, [0, 1, 1, 2]])) < 1e-13
    assert error(got[1:], unet(x[1:], t[1:], context[1:, [1, 2, 3, 3, 4]])) < 1e-13


@pytest.mark.parametrize("name", CONFIGS)
def test_the_architecture_is_read_off_the_shapes(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        shapes = {key: x.shape for key, x in UNet(config).state_dict().items()}
    # heads are not in the shapes: as told, or 8 for the SD1.x kind and 64 channels each for the SD2.x kind
    assert UNetConfig.from_shapes(shapes, config.num_heads, config.head_dim) == config


def test_the_kind_tells_the_heads_if_nothing_else_does() -> None:
    for config in (UNetConfig(), UNetConfig(context_dim=1024, num_heads=None, head_dim=64, linear_proj=True)):
        with torch.device("meta"):
            shapes = {key: x.shape for key, x in UNet(config).state_dict().items()}
        assert UNetConfig.from_shapes(shapes) == config


def test_has_the_names_and_shapes_of_sd15() -> None:
    names = json.loads((DATA / "sd15_ldm_keys.json").read_text())
    want = {name.removeprefix(PREFIX): shape for name, shape in names.items() if name.startswith(PREFIX)}
    with torch.device("meta"):
        unet = UNet()
    assert {name: list(x.shape) for name, x in unet.state_dict().items()} == want
    assert len(want) == 686
    assert UNetConfig.from_shapes(want) == UNetConfig()


def test_a_half_network_still_sees_the_timestep_in_float32() -> None:
    unet = random_unet(INPAINTING).bfloat16()
    x, _, context = inputs(unet.config, torch.bfloat16)
    one, other = (unet(x, torch.tensor([t, t]), context) for t in (961.0, 963.0))  # the same number in bf16
    assert one.dtype == torch.bfloat16
    assert not torch.equal(one, other)


def test_a_fresh_network_predicts_zero() -> None:
    """The last convolution starts at zero, and every residual branch does too."""
    unet = UNet(MINIATURE)
    x, t, context = inputs(unet.config, torch.float32)
    assert not unet(x, t, context).any()
    ends = ("out.2.weight", ".out_layers.3.weight", ".proj_out.weight")
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            assert bool(parameter.any()) != name.endswith(ends), name


TOKENS = torch.zeros(2, 5, 12)
GOOD = {"x": torch.zeros(2, 9, 8, 4), "t": torch.zeros(2), "context": TOKENS}


@pytest.mark.parametrize(("change", "says"), [
    ({"x": torch.zeros(2, 4, 8, 4)}, r"x \[B, 9, h, w\], got \[2, 4, 8, 4\]"),
    ({"x": torch.zeros(9, 8, 4)}, r"x \[B, 9, h, w\], got \[9, 8, 4\]"),
    ({"t": torch.zeros(1)}, r"one timestep per sample: x has 2, t has \[1\]"),
    ({"context": torch.zeros(2, 5, 13)}, r"context \[2, L, 12\], got \[2, 5, 13\]"),
    ({"context": torch.zeros(1, 5, 12)}, r"context \[2, L, 12\], got \[1, 5, 12\]"),
    ({"context": Context(TOKENS, torch.ones(2, 5, dtype=torch.int64))}, r"bool or float \[2, 5\], got torch.int64"),
    ({"context": Context(TOKENS, torch.ones(2, 4, dtype=torch.bool))}, r"float \[2, 5\], got torch.bool \[2, 4\]"),
])
def test_wrong_input_is_refused(change: dict[str, Any], says: str) -> None:
    unet = UNet(INPAINTING)
    unet(**GOOD)
    unet(GOOD["x"][:, :4], GOOD["t"], Context(TOKENS, channels=GOOD["x"][:, 4:]))
    with pytest.raises(ValueError, match=says):
        unet(**{**GOOD, **change})


@pytest.mark.parametrize(("change", "says"), [
    ({"attention": (True,)}, "one entry per level"),
    ({"head_dim": 64}, "not both"),
    ({"num_heads": None}, "give num_heads or head_dim"),
    ({"model_channels": 48}, "48 channels must be a multiple of 32"),
    ({"num_heads": 7}, "320 channels must be a multiple of 32"),
])
def test_a_contradictory_configuration_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        UNetConfig(**change)  # type: ignore[arg-type]
