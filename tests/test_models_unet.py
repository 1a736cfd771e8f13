"""The UNet against diffusers' UNet2DConditionModel with the same random weights, and against the real names."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from torch import Tensor

from benchmarks.speed.ways import as_diffusers
from ella_kd import DiffusersUNet
from ella_kd.models import UNet, UNetConfig
from ella_kd.models.context import Context
from ella_kd.models.timestep import timestep_embedding

DATA = Path(__file__).parent / "data"
PREFIX = "model.diffusion_model."

SD15 = UNetConfig(model_channels=32, context_dim=24)
SD2 = UNetConfig(model_channels=32, context_dim=24, num_heads=None, head_dim=16, linear_proj=True)
MINIATURE = UNetConfig(model_channels=64, channel_mult=(1, 2, 3), num_res_blocks=1, depth=(1, 1, 1),
                       context_dim=16)
INPAINTING = UNetConfig(in_channels=9, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                        depth=(0, 1), context_dim=12)

# The relatives, each of them tiny, with what makes it one: depths, added embeddings, channels.
REFINER = UNetConfig(model_channels=32, depth=(0, 2, 2, 0), context_dim=24, num_heads=None, head_dim=16,
                     linear_proj=True, middle_depth=2, vector_dim=24 + 5 * 256)
SDXL = UNetConfig(model_channels=32, channel_mult=(1, 2, 4), depth=(0, 1, 3), context_dim=24, num_heads=None,
                  head_dim=16, linear_proj=True, middle_depth=3, vector_dim=20 + 6 * 256)
SSD_1B = replace(SDXL, depth=(0, 1, 2), middle_depth=0, out_depth=(0, (2, 1, 1), (2, 2, 3)))
X4 = UNetConfig(in_channels=7, model_channels=32, channel_mult=(1, 2, 2, 4), depth=(0, 1, 1, 1), context_dim=48,
                linear_proj=True, cross_only=(False, True, True, False), classes=11)
LCM = replace(SD15, guidance_dim=16)
CONFIGS = {"sd15": SD15, "sd2": SD2, "miniature": MINIATURE, "inpainting": INPAINTING, "sdxl": SDXL, "refiner": REFINER,
           "ssd-1b": SSD_1B, "x4": X4, "lcm": LCM}

# The published ones, with their tensors and parameters.
XL = UNetConfig(channel_mult=(1, 2, 4), depth=(0, 2, 10), context_dim=2048, num_heads=None, head_dim=64,
                linear_proj=True, middle_depth=10, vector_dim=2816)
PUBLISHED = {
    "sd15": (UNetConfig(), 686, 859_520_964),
    "sd15-inpainting": (UNetConfig(in_channels=9), 686, 859_535_364),
    "sd2": (UNetConfig(context_dim=1024, num_heads=None, head_dim=64, linear_proj=True), 686, 865_910_724),
    "sdxl": (XL, 1680, 2_567_463_684),
    "refiner": (UNetConfig(model_channels=384, depth=(0, 4, 4, 0), context_dim=1280, num_heads=None, head_dim=64,
                           linear_proj=True, middle_depth=4, vector_dim=2560), 1220, 2_259_526_660),
    "ssd-1b": (replace(XL, depth=(0, 2, 4), middle_depth=0, out_depth=(0, (2, 1, 1), (4, 4, 10))),
               944, 1_331_334_404),
    "vega": (replace(XL, depth=(0, 1, 2), middle_depth=0), 564, 745_225_604),
    "x4": (UNetConfig(in_channels=7, model_channels=256, channel_mult=(1, 2, 2, 4), depth=(0, 1, 1, 1),
                      context_dim=1024, linear_proj=True, cross_only=(False, True, True, False), classes=1000),
           687, 473_398_020),
    "lcm": (UNetConfig(guidance_dim=256), 687, 859_520_964 + 256 * 320),
}


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


def beside(config: UNetConfig, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a kind is told beside the tokens, as ours and as diffusers' arguments."""
    if config.classes:
        label = torch.tensor([3, 10])
        return {"label": label}, {"class_labels": label}
    if config.guidance_dim:
        scale = torch.tensor([7.5, 1.25])
        return {"guidance": scale}, {"timestep_cond": latent_consistency_embedding(scale, config.guidance_dim, dtype)}
    if not config.vector_dim:
        return {}, {}
    sizes = torch.tensor([[128.0, 64, 0, 0, 128, 64], [1027, 515, 3, 17, 1024, 512]])
    ours = {"sizes": sizes, "vector": torch.randn(2, config.vector_dim % 256, dtype=dtype)}
    if config.vector_dim // 256 == 5:  # the refiner
        ours["score"] = torch.tensor([6.0, 2.5])
        sizes = torch.cat([sizes[:, :4], ours["score"][:, None]], 1)
    return ours, {"added_cond_kwargs": {"text_embeds": ours["vector"], "time_ids": sizes}}


def latent_consistency_embedding(scale: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    made = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scale - 1, channels)
    return made.to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name: str, dtype: torch.dtype, tolerance: float) -> None:
    unet = random_unet(CONFIGS[name]).to(dtype)
    x, t, context = inputs(unet.config, dtype)
    ours, theirs = beside(unet.config, dtype)
    twin = as_diffusers(unet)
    got = unet(x, t, Context(context, **ours))
    assert got.std() > 0.1
    assert error(got, twin(x, t, context, **theirs).sample) < tolerance
    assert torch.equal(DiffusersUNet(twin)(x, t, Context(context, **ours)), twin(x, t, context, **theirs).sample)
    for told in ours:  # everything is seen
        other = {**ours, told: ours[told].roll(1, 0)}
        assert error(unet(x, t, Context(context, **other)), got) > 1e-3
    if name == "x4":
        return  # diffusers' first attention does not look at the mask of the text
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    masked = unet(x, t, Context(context, mask, **ours))
    assert error(masked, twin(x, t, context, encoder_attention_mask=mask, **theirs).sample) < tolerance
    assert error(masked[:1], got[:1]) > 1e-3


def test_without_sizes_the_latents_are_told() -> None:
    """The picture is 8 x the latents and not cropped; the refiner is told the score 6."""
    for config in (SDXL, REFINER):
        unet = random_unet(config)
        x, t, context = inputs(config, torch.float32)
        vector = beside(config, torch.float32)[0]["vector"]
        sizes = torch.tensor([[128.0, 64, 0, 0, 128, 64]] * 2)
        got = unet(x, t, Context(context, vector=vector))
        assert torch.equal(got, unet(x, t, Context(context, vector=vector, sizes=sizes)))
        whole = torch.cat([vector, timestep_embedding(sizes.flatten(), 256).view(2, -1)], 1)
        if config is REFINER:
            whole = torch.cat([whole[:, :-512], timestep_embedding(torch.tensor([6.0, 6.0]), 256)], 1)
        assert torch.equal(got, unet(x, t, Context(context, vector=whole)))
        assert error(unet(x, t, Context(context, vector=vector, sizes=sizes / 2)), got) > 1e-3


def test_the_mask_of_the_text_holds_for_every_look_at_it() -> None:
    unet = random_unet(X4).double()
    x, t, context = inputs(X4, torch.float64)
    label, mask = torch.tensor([3, 10]), torch.tensor([[True, True, True, False, False], [True] * 5])
    got = unet(x, t, Context(context, mask, label=label))
    assert error(got[:1], unet(x[:1], t[:1], Context(context[:1, :3], label=label[:1]))) < 1e-13
    assert set(unet.places) == {"input_blocks.10.1", "input_blocks.11.1", "middle_block.1", *(
        f"output_blocks.{i}.1" for i in range(3))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_the_published_networks(name: str) -> None:
    config, tensors, parameters = PUBLISHED[name]
    with torch.device("meta"):
        found = UNet(config).state_dict()
    assert (len(found), sum(x.numel() for x in found.values())) == (tensors, parameters)
    assert UNetConfig.from_shapes({key: x.shape for key, x in found.items()}) == config


@pytest.mark.parametrize(("config", "given", "says"), [
    (SDXL, {}, r"needs a vector \[B, D\] \(SDXL: the pooled text\): give it beside the tokens, With\(cond, vector"),
    (SDXL, {"vector": torch.zeros(2, 21)}, r"vector \[2, D\] with D = 20 .* 276 .* or 1556 \(whole\), got \[2, 21\]"),
    (SDXL, {"vector": torch.zeros(1, 20)}, r"vector \[2, D\] .*, got \[1, 20\]"),
    (SDXL, {"vector": torch.zeros(2, 20), "sizes": torch.zeros(2, 5)}, r"sizes must be \[2, 6\], .*, got \[2, 5\]"),
    (SDXL, {"vector": torch.zeros(2, 20), "score": torch.zeros(2)}, "SDXL's base model has no place for score"),
    (SDXL, {"vector": torch.zeros(2, 1556), "sizes": torch.zeros(2, 6)}, "a whole vector has no place for sizes"),
    (REFINER, {"vector": torch.zeros(2, 24), "score": torch.zeros(1)}, r"score must be \[2\], .*, got \[1\]"),
    (SD15, {"vector": torch.zeros(2, 20)}, "this UNet does not know vector: leave it out"),
    (SD15, {"sizes": torch.zeros(2, 6), "score": torch.zeros(2)}, "does not know sizes and score: leave them out"),
    (SD15, {"label": torch.zeros(2)}, "does not know label"),
    (X4, {}, r"needs a label \[B\], int64"),
    (X4, {"label": torch.zeros(1, dtype=torch.int64)}, r"label must be \[2\], one per sample, got \[1\]"),
    (LCM, {}, r"needs a guidance scale \[B\]"),
    (SD15, {"guidance": torch.ones(2)}, "does not know guidance"),
])
def test_what_is_seen_beside_tokens_must_be_known(config: UNetConfig, given: dict[str, Tensor], says: str) -> None:
    unet = random_unet(config)
    x, t, context = inputs(config, torch.float32)
    with pytest.raises(ValueError, match=says):
        unet(x, t, Context(context, **given))


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


def test_a_half_network_still_sees_whole_sizes() -> None:
    """1025 and 1027 are the same number in bf16; so are guidance scales as LCM is told them, 1000 (w - 1)."""
    x, t, context = inputs(SDXL, torch.bfloat16)
    unet, vector = random_unet(SDXL).bfloat16(), torch.randn(2, 20)
    one, other = (unet(x, t, Context(context, vector=vector, sizes=torch.full((2, 6), size)).to(torch.bfloat16))
                  for size in (1025.0, 1027.0))
    assert one.dtype == torch.bfloat16 and not torch.equal(one, other)
    lcm = random_unet(LCM).bfloat16()
    x, t, context = inputs(LCM, torch.bfloat16)
    one, other = (lcm(x, t, Context(context, guidance=torch.full((2,), scale)).to(torch.bfloat16))
                  for scale in (7.5, 7.501))
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
    ({"context": Context(TOKENS, torch.ones(2, 5, dtype=torch.int64))}, r"\[2, 5\], bool .* got torch.int64"),
    ({"context": Context(TOKENS, torch.ones(2, 4, dtype=torch.bool))}, r"\[2, 5\], bool .* got torch.bool \[2, 4\]"),
])
def test_wrong_input_is_refused(change: dict[str, Any], says: str) -> None:
    unet = UNet(INPAINTING)
    unet(**GOOD)
    unet(GOOD["x"][:, :4], GOOD["t"], Context(TOKENS, channels=GOOD["x"][:, 4:]))
    with pytest.raises(ValueError, match=says):
        unet(**{**GOOD, **change})


@pytest.mark.parametrize(("change", "says"), [
    ({"depth": (1,)}, "depth needs one entry per level"),
    ({"depth": (1, 1, (1, 2), 0)}, "depth differs from res block to res block"),
    ({"depth": (1, 1, (1, 0), 0), "out_depth": (1, 1, 1, 0)}, "level 2 has \\[1, 0\\] on the way down"),
    ({"out_depth": (1, 1, (1, 1), 0)}, "one for each of its 3 res blocks"),
    ({"out_depth": (1, 1, 0, 0)}, "level 2 has"),
    ({"depth": (1, 1, -1, 0)}, "at least 0 per level"),
    ({"cross_only": (True,)}, "cross_only needs one entry per level"),
    ({"vector_dim": 8, "classes": 8}, "vectors or labels, not both"),
    ({"head_dim": 64}, "not both"),
    ({"num_heads": None}, "give num_heads or head_dim"),
    ({"model_channels": 48}, "48 channels must be a multiple of 32"),
    ({"num_heads": 7}, "320 channels must be a multiple of 32"),
])
def test_a_contradictory_configuration_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        UNetConfig(**change)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
@torch.no_grad()
def test_at_full_size_equals_diffusers(name: str) -> None:
    """SDXL's weights are 10 GB; diffusers' network is on the same tensors."""
    config = PUBLISHED[name][0]
    with torch.device("meta"):
        unet = UNet(config)
    unet = unet.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(1_000_003, generator=generator)  # again and again: 2.6 billion would take a minute to draw
    for key, x in unet.state_dict().items():
        if x.ndim > 1:
            x.copy_(numbers.repeat(-(-x.numel() // len(numbers)))[:x.numel()].view_as(x)).mul_(x[0].numel() ** -0.5)
        else:
            x.fill_(float(key.endswith("weight")))
    twin = as_diffusers(unet)
    x = torch.randn(1, 4, 16, 16, generator=generator)
    context = torch.randn(1, 77, config.context_dim, generator=generator)
    t, ours, theirs = torch.tensor([703.0]), dict[str, Tensor](), dict[str, Any]()
    if config.vector_dim:
        ours = {"vector": torch.randn(1, 1280, generator=generator)}
        sizes = torch.tensor([[128.0, 128, 0, 0, 128, 128]])
        theirs = {"added_cond_kwargs": {"text_embeds": ours["vector"], "time_ids": sizes}}
    got = unet(x, t, Context(context, **ours))
    assert got.std() > 0.1
    assert error(got, twin(x, t, context, **theirs).sample) < 2e-5
