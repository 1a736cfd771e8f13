"""LoRAs by window and by row, and twins through every door of a pipeline."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ella_kd import CFG, PAG, Pipeline, draw
from ella_kd.conditioning import Constant, Stack
from ella_kd.denoiser import LDMDenoiser
from ella_kd.guidance import GuidedDenoiser
from ella_kd.models import fast_on_cpu
from ella_kd.models.addons.lora import LoRA, Strength, with_lora
from ella_kd.models.blocks import FeedForward
from ella_kd.models.freeu import FreeU
from ella_kd.models.inside import Inside
from ella_kd.models.networks import ByRow, BySigma
from ella_kd.placement import Placement
from ella_kd.samplers import sample_euler
from families import family
from test_addons_lora import assert_agree, factors, layers, random, weights
from tiny import features, noise, planned, relative, tiny_unet


def style(network: nn.Module, seed: int, prefix: str = "lora_unet_") -> LoRA:
    """A LoRA of every other layer of a network in our names."""
    tensors: dict[str, Tensor] = {}
    for i, (name, layer) in enumerate(list(layers(network))[seed % 2::2]):
        tensors |= {f"{prefix}{name.replace('.', '_')}.{end}": x for end, x in factors(layer, seed + 10 * i).items()}
    return LoRA.of(tensors, f"style {seed}")


def conds(rows: int) -> dict[str, Any]:
    return {"cond": Constant(features(*[5] * rows, width=24)), "uncond": Constant(features(4, seed=5, width=24))}


def test_off_is_off_and_several_agree_in_any_order() -> None:
    unet = tiny_unet()
    plain = weights(unet)
    a, b = style(unet, 1), style(unet, 2)
    oft = LoRA.of({"lora_unet_middle_block_1_proj_in.oft_blocks": random(8, 8, 8)})
    dora = LoRA.of({f"lora_unet_middle_block_1_proj_in.{end}": x for end, x in (
        *factors(unet.get_submodule("middle_block.1.proj_in"), 4).items(), ("dora_scale", random(64, 1, 1, 1)))})
    every: list[Any] = [(a, 0.8), (b, -0.3), (oft, 0.5), (dora, 1.0)]
    twin, other = with_lora(unet, every), with_lora(unet, every[::-1])
    after = weights(twin)
    assert all(torch.equal(x, after[name]) for name, x in weights(other).items())
    added = twin.get_submodule("middle_block.1.proj_in").weight - plain["middle_block.1.proj_in.weight"]
    alone = [with_lora(unet, each).get_submodule("middle_block.1.proj_in").weight - plain[
        "middle_block.1.proj_in.weight"] for each in every]
    assert relative(added, sum(alone)) < 1e-5 and all(x.any() for x in alone[2:])
    assert with_lora(unet, []) is unet and with_lora(unet, (a, 0)) is unet
    assert all(torch.equal(x, plain[name]) for name, x in weights(unet).items()), "the argument stays"
    touched = {name for name in plain if not torch.equal(plain[name], after[name])}
    own = dict(twin.named_parameters())
    assert {name for name, x in unet.named_parameters() if own[name] is not x} == touched and touched
    again = with_lora(with_lora(with_lora(unet, every[0]), every[1:3]), every[3])
    assert all(torch.equal(x, after[name]) for name, x in weights(again).items()), "lists add up, from the originals"
    half = with_lora(unet, [(a, 1), (a, -0.5), (a, -0.5)])
    assert all(torch.equal(x, plain[name]) for name, x in weights(half).items())


@pytest.mark.slow
@torch.no_grad()
def test_fast_compiled_moved_and_lora_in_any_order() -> None:
    """One picture, whatever the order; each door gives a twin and leaves the rest as it is."""
    unet = tiny_unet()
    x, t, context = noise(2, 4, 8, 8), torch.tensor([961.73, 3.25]), noise(2, 5, 24, seed=1)
    lora = (style(unet, 1), 0.7)
    want = with_lora(unet, lora)(x, t, context)
    assert relative(want, unet(x, t, context)) > 1e-2
    fast = fast_on_cpu(unet)
    for twin in (fast_on_cpu(with_lora(unet, lora)), with_lora(fast, lora), with_lora(with_lora(fast, lora), [])):
        assert relative(twin(x, t, context), want) < 2e-5
        assert any(module.at_once for module in twin.modules() if isinstance(module, FeedForward)), "it is fast too"
    assert relative(fast(x, t, context), unet(x, t, context)) < 2e-5
    compiled = tiny_unet()
    compiled.compile(backend="eager")
    for each in (compiled, torch.compile(compiled, backend="eager")):
        twin = with_lora(each, lora)
        assert relative(twin(x, t, context), want) < 1e-6 and twin._compiled_call_impl is None
    assert compiled._compiled_call_impl is not None
    sd = family("sd2").ours
    style_2 = style(sd.unet, 3)
    for one, other in ((sd.with_lora(style_2).to(dtype="float64"), sd.to(dtype="float64").with_lora(style_2)),
                       (sd.with_lora(style_2).to(dtype="bfloat16").with_lora((style_2, -1)),
                        sd.to(dtype="bfloat16"))):
        for name, value in weights(other.unet).items():
            assert relative(weights(one.unet)[name], value) < 1e-6, name


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_network_and_its_compiled_twin() -> None:
    unet = tiny_unet()
    x, t, context = noise(2, 4, 8, 8), torch.tensor([961.73, 3.25]), noise(2, 5, 24, seed=1)
    plain, lora = unet(x, t, context), style(unet, 1)
    want = with_lora(unet, lora)(x, t, context)
    unet.compile(backend="eager")
    twin = with_lora(unet, lora)
    twin.compile(backend="eager")
    assert relative(twin(x, t, context), want) < 1e-5 and relative(unet(x, t, context), plain) < 1e-5


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_a_saved_twin_is_a_merged_checkpoint(suffix: str, tmp_path: Path) -> None:
    sd = family("sdxl").ours
    clip: Any = sd.clip
    twin = sd.with_lora([(style(sd.unet, 1), 0.8), (style(clip.first.model, 1, "lora_te1_"), 1.0)])
    assert weights(twin.unet).keys() == weights(sd.unet).keys(), "a recipe is no part of the weights"
    twin.save(tmp_path / f"merged{suffix}")
    loaded: Any = Pipeline.load(tmp_path / f"merged{suffix}", prediction="eps", device="cpu")
    assert_agree(loaded.unet, weights(twin.unet), weights(sd.unet))
    found = loaded.text_models[0] if loaded.clip is None else loaded.clip.first.model
    assert_agree(found, weights(twin.clip.first.model), weights(clip.first.model))  # type: ignore[union-attr]


def test_a_network_by_sigma_is_the_one_that_holds() -> None:
    unet = tiny_unet()
    twin = with_lora(unet, style(unet, 1))
    network = BySigma(unet, twin, unet, at=(7.0, 0.5))
    x, sigma = noise(4, 4, 8, 8), torch.tensor([7.0005, 7.0, 0.5, 3.0])
    one = planned(LDMDenoiser(network), x, sigma, cond=conds(4)["cond"]).denoised
    at_once = LDMDenoiser(network)(x, sigma, conds(4)["cond"])  # rows at four sigmas, in two calls
    assert relative(at_once, one) < 1e-5
    for row, holds in enumerate((unet, twin, unet, twin)):
        want = LDMDenoiser(holds)(x, sigma, conds(4)["cond"])[row]
        assert relative(one[row], want) < 1e-5
        assert relative(one[row], LDMDenoiser({unet: twin, twin: unet}[holds])(x, sigma, conds(4)["cond"])[row]) > 1e-3
    sigmas = torch.tensor([10.0, 6.0, 2.0, 0.4, 0.0])
    args: dict[str, Any] = {**conds(4), "guidance": None}
    args.pop("guidance")
    whole = sample_euler(GuidedDenoiser(LDMDenoiser(network), CFG(3)), x * 10, sigmas, extra_args=args, disable=True)
    begun = sample_euler(GuidedDenoiser(LDMDenoiser(unet), CFG(3)), x * 10, sigmas[:2], extra_args=args, disable=True)
    middle = sample_euler(GuidedDenoiser(LDMDenoiser(twin), CFG(3)), begun, sigmas[1:4], extra_args=args, disable=True)
    end = sample_euler(GuidedDenoiser(LDMDenoiser(unet), CFG(3)), middle, sigmas[3:], extra_args=args, disable=True)
    assert torch.equal(whole, end)


@torch.no_grad()
@pytest.mark.parametrize("rule", [CFG(3.0), PAG(CFG(3.0), 2.0)], ids=str)
def test_rows_with_networks_of_their_own_are_singles(rule: Any) -> None:
    """Cond, uncond and patched rows of each picture go to its network; interleaved ones together."""
    unet = tiny_unet()
    a, b = (with_lora(unet, style(unet, seed)) for seed in (1, 2))
    networks = [a, unet, a, BySigma(b, unet, at=2.0)]
    x, sigma = noise(4, 4, 8, 8), torch.tensor([3.0, 3.0, 3.0, 3.0])
    for level in (sigma, torch.tensor([3.0, 1.0, 0.7, 1.5])):
        got = GuidedDenoiser(LDMDenoiser(ByRow(networks)), rule)(x, level, **conds(4))
        told = planned(GuidedDenoiser(LDMDenoiser(ByRow(networks)), rule), x, level, **conds(4)).denoised
        for row, network in enumerate(networks):
            single = conds(1) | {"cond": Constant(features(*[5] * 4, width=24).take(torch.tensor([row])))}
            want = GuidedDenoiser(LDMDenoiser(network), rule)(x[row:row + 1], level[row:row + 1], **single)
            assert relative(got[row:row + 1], want) < 1e-5 and relative(told[row:row + 1], want) < 1e-5
            other = GuidedDenoiser(LDMDenoiser(b), rule)(x[row:row + 1], level[row:row + 1], **single)
            assert relative(other, want) > 1e-3 or network is networks[3]


@torch.no_grad()
def test_a_lora_for_each_row_of_a_pipeline() -> None:
    """As ByRow's docstring has it: several strengths of a LoRA of UNet and text, each as if drawn alone."""
    sd = family("sd2").ours
    assert sd.clip
    lora = LoRA.of({f"{name}.{end}": x for each in (style(sd.unet, 1), style(sd.clip.model, 1, "lora_te_"))
                    for name, change in each.changes.items()
                    for end, x in (("lora_up.weight", change.factors["lora_up"]),
                                   ("lora_down.weight", change.factors["lora_down"]))})
    twins = [sd.with_lora((lora, s)) for s in (0.0, 3.0, 6.0)]
    cond = Stack(*(twin.encode("a red fox", "clip") for twin in twins))
    uncond = Stack(*(twin.encode("", "clip") for twin in twins))
    args: dict[str, Any] = {"steps": 2, "guidance": 3.0, "progress": False}
    rows = draw(replace(sd, unet=ByRow([twin.unet for twin in twins])), cond, uncond=uncond, seeds=[7, 7, 7], **args)
    singles = [draw(twin, twin.encode("a red fox", "clip"), uncond=twin.encode("", "clip"), seeds=[7], **args)[0]
               for twin in twins]
    pixels = [[torch.tensor(list(image.tobytes()), dtype=torch.int) for image in images] for images in (rows, singles)]
    for one, other in zip(*pixels):
        assert (one - other).abs().max() <= 1
    assert (pixels[0][0] - pixels[0][1]).abs().max() > 8 and (pixels[0][1] - pixels[0][2]).abs().max() > 8
    assert twins[0].unet is sd.unet


def test_what_networks_of_networks_are_like(tmp_path: Path) -> None:
    unet = tiny_unet()
    twin = with_lora(unet, style(unet, 1))
    network: Any = ByRow([unet, BySigma(twin, unet, at=1.0), unet])
    assert (network.in_channels, network.out_channels, network.dtype, network.places) == (4, 4, torch.float32,
                                                                                         unet.places)
    assert network.vector_dim is None and len(list(network.parameters())) < 2 * len(list(unet.parameters()))
    more = with_lora(network, (style(unet, 2), 0.5))
    assert more.networks[0] is more.networks[2] and more.networks[1].boundaries == (1.0,)
    assert_agree(more.networks[1].networks[0], weights(with_lora(twin, (style(unet, 2), 0.5))), weights(twin))
    x, t, context = noise(3, 4, 8, 8), torch.full((3,), 400.0), noise(3, 5, 24, seed=1)
    fast = fast_on_cpu(network).at((2.0,))
    assert relative(fast(x, t, context), network.at((2.0,))(x, t, context)) < 2e-5
    sd = replace(family("sd2").ours, unet=network).to(dtype="bfloat16")
    cast: Any = sd.unet
    assert cast.dtype == torch.bfloat16 and cast.networks[0] is cast.networks[2]
    with pytest.raises(TypeError, match="a UNet of ours can be saved"):
        sd.save(tmp_path / "x")
    with pytest.raises(ValueError, match="decided by sigma"):
        BySigma(unet, twin, at=1.0)(x, t, context)
    with pytest.raises(ValueError, match="made for 3 rows, and was called with 4"):
        network.at((2.0,))(noise(4, 4, 8, 8), torch.ones(4), noise(4, 5, 24))
    for bad, error, message in (((unet, 3), TypeError, "got int"), ((unet, tiny_unet().double()), ValueError, "dtype"),
                                ((), ValueError, "at least")):
        with pytest.raises(error, match=message):
            ByRow(bad)
    for at in (1.0, (1.0, 2.0), (2.0,)):
        with pytest.raises(ValueError, match="falling sigmas"):
            BySigma(unet, twin, unet, at=at)


def test_a_lora_on_a_network_with_changes_inside() -> None:
    """Before or after, by row and fast: the changes stay around the LoRA's twin."""
    unet, change = tiny_unet(), FreeU(1.5, 1.6, 0.9, 0.2, sigma_lo=1.0)
    lora = style(unet, 1)
    x, sigma, cond = noise(2, 4, 8, 8), torch.tensor([3.0, 0.5]), conds(2)["cond"]
    want = LDMDenoiser(Inside(with_lora(unet, lora), change))(x, sigma, cond)
    plain = LDMDenoiser(with_lora(unet, lora))(x, sigma, cond)
    assert relative(want[:1], plain[:1]) > 1e-3 and relative(want[1:], plain[1:]) < 1e-5
    inside = Inside(unet, change)
    twin = with_lora(inside, lora)
    for network in (twin, with_lora(ByRow([inside, inside]), lora), BySigma(twin, with_lora(unet, lora), at=0.8),
                    fast_on_cpu(twin), with_lora(fast_on_cpu(inside), lora)):
        assert relative(LDMDenoiser(network)(x, sigma, cond), want) < 2e-5
    assert with_lora(inside, (lora, 0)).unet is unet


def test_at_work_a_twin_comes_and_goes_with_what_it_shares() -> None:
    sd = replace(family("sd2").ours, placement=Placement(device="cpu", offload=True))
    twin = sd.with_lora((style(sd.unet, 1), Strength(0.5)))
    before: dict[str, Tensor] = weights(twin.unet)
    with twin.at_work("unet"), sd.at_work("unet"):
        assert all(torch.equal(x, before[name]) for name, x in twin.unet.state_dict().items())
    assert all(torch.equal(x, before[name]) for name, x in twin.unet.state_dict().items())
