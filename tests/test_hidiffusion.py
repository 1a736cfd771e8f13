"""HiDiffusion against the published code, restated on diffusers' UNet; deep shrink against ComfyUI's, on ours."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.ways import as_diffusers, random_weights
from ella_kd import CFG, PAG, SLG, GuidedDenoiser, LDMDenoiser
from ella_kd.bound import Branch
from ella_kd.conditioning import Constant
from ella_kd.models import EDMSchedule, NoiseSchedule, TextFeatures, UNet, UNetConfig, fast_on_cpu
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.blocks import Downsample
from ella_kd.models.context import Context
from ella_kd.models.freeu import FreeU
from ella_kd.models.hidiffusion import (
    AFTER_35,
    Shrink,
    WiderStride,
    WindowAttention,
    Windows,
    after,
    hidiffusion,
)
from ella_kd.models.inside import Change, Inside, finest
from ella_kd.models.seamless import around
from ella_kd.models.tome import ToMe
from ella_kd.samplers import sample_dpmpp_2m
from tiny import WIDTH, noise, randomised, relative, tiny_unet

SD15 = UNetConfig(4, 4, 32, (1, 2, 4, 4), 2, (1, 1, 1, 0), WIDTH, 2)
SD21 = UNetConfig(4, 4, 32, (1, 2, 4, 4), 2, (1, 1, 1, 0), WIDTH, None, 16, linear_proj=True)
SDXL = UNetConfig(4, 4, 32, (1, 2, 4), 2, (0, 2, 2), WIDTH, 2, linear_proj=True, middle_depth=2)
SIZES = [(20, 12), (17, 23)]
TINY = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
WHOLE = {"sd15": UNetConfig(), "sd21": UNetConfig(context_dim=1024, num_heads=None, head_dim=64, linear_proj=True),
         "sdxl": UNetConfig(4, 4, 128, (1, 2, 4), 2, (0, 2, 10), 256, None, 64, True, 10)}  # of 320 channels: 10 GB


@cache
def random_unet(config: UNetConfig) -> UNet:
    return randomised(UNet(config), 0, 0.1).double()


def inputs(unet: UNet, h: int, w: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    t = 999 * torch.rand(batch, generator=torch.Generator().manual_seed(0))
    return noise(batch, 4, h, w, dtype=unet.dtype), t, noise(batch, 7, WIDTH, seed=4, dtype=unet.dtype)


def strided(conv: Any) -> None:
    """The published downsampler, while it is switched on; its upsampler is told the size, `num_upsamplers += 12`."""
    conv.stride, conv.padding, conv.dilation = (4, 4), (2, 2), (2, 2)


def pooled(down: Any, up: Any) -> None:
    """The published cross-attention blocks: pooling after the first pair going down, back after the second going up."""
    sizes: list[torch.Size] = []

    def smaller(module: Any, args: Any, out: Any) -> Any:
        sizes.append(out[0].shape[2:])
        return (F.avg_pool2d(out[0], 2, ceil_mode=True), *out[1:])

    down.attentions[0].register_forward_hook(smaller)
    up.attentions[1].register_forward_hook(
        lambda module, args, out: (F.interpolate(out[0], sizes.pop(), mode="bicubic"), *out[1:]))


def windowed(block: Any, size: Callable[[], tuple[int, int]], quarters: int) -> None:
    """The published transformer block's self-attention: partition, attend, reverse."""
    plain = block.attn1.forward

    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        h, w = size()
        a, b = -(-h // 2), -(-w // 2)
        grid = x.view(len(x), h, w, -1)
        if h % 2 or w % 2:
            grid = F.interpolate(grid.permute(0, 3, 1, 2), (2 * a, 2 * b), mode="bicubic").permute(0, 2, 3, 1)
        moved = (a // 4 * quarters, b // 4 * quarters)
        grid = grid.roll((-moved[0], -moved[1]), (1, 2)).reshape(len(x), 2, a, 2, b, -1)
        answer = plain(grid.permute(0, 1, 3, 2, 4, 5).reshape(4 * len(x), a * b, -1), **kwargs)
        grid = answer.view(len(x), 2, 2, a, b, -1).permute(0, 1, 3, 2, 4, 5).reshape(len(x), 2 * a, 2 * b, -1)
        grid = grid.roll(moved, (1, 2))
        if h % 2 or w % 2:
            grid = F.interpolate(grid.permute(0, 3, 1, 2), (h, w), mode="bicubic").permute(0, 2, 3, 1)
        return grid.reshape(x.shape)

    block.attn1.forward = forward


# Sigmas of Stable Diffusion's schedule after so many percent of the timesteps.
AFTER_16, AFTER_30, AFTER_40, AFTER_70 = 6.142, 3.325, 2.280, 0.832
KINDS = ["sd15 1024", "sd15 2048", "sd21 2048", "sdxl 2048", "sdxl 4096", "sdxl 2048 inpainting"]
SIGMAS = [9.0, 3.0, 1.0, 0.3]


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_published_code_at_each_stage(kind: str, sigma: float) -> None:
    unet = random_unet(TINY[kind.split()[0]])
    for size in SIZES:
        assert differing(unet, kind, sigma, inputs(unet, *size)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_whole_shapes_equal_the_published_code(kind: str) -> None:
    """All blocks of Stable Diffusion 1.5 and 2.1 in their widths, of SDXL in narrower ones; fp32."""
    torch.manual_seed(0)
    unet = random_weights(UNet(WHOLE[kind.split()[0]])).requires_grad_(False)
    x, t, tokens = noise(1, 4, 32, 24), torch.tensor([600.0]), noise(1, 7, unet.config.context_dim, seed=4)
    for sigma in SIGMAS:
        assert differing(unet, kind, sigma, (x, t, tokens)) < 1e-5


def differing(unet: UNet, kind: str, sigma: float, args: tuple[Tensor, Tensor, Tensor]) -> float:
    """How far the answer for latents of a kind's size is from the published code's; the plain one is far from both."""
    xl, side = kind.startswith("sdxl"), int(kind.split()[1]) // 8
    network = Inside(unet, *hidiffusion(unet, side, side + 8, aggressive="inpainting" not in kind))
    twin = as_diffusers(unet)
    twin.num_upsamplers += 12
    downsampler = twin.down_blocks[1 if xl else 0].downsamplers[0].conv
    blocks = twin.down_blocks[1], twin.up_blocks[1 if xl else 2]
    if kind == "sdxl 2048":
        stages = {"strided": sigma > AFTER_16, "pooled": AFTER_40 < sigma <= AFTER_16}
    elif xl:
        large = "4096" in kind
        stages = {"strided": large and sigma > AFTER_30, "pooled": sigma > (AFTER_70 if large else AFTER_40)}
    else:
        large = "2048" in kind
        stages = {"strided": sigma > (AFTER_70 if large else AFTER_40), "pooled": large and sigma > AFTER_30}
    if stages["strided"]:
        strided(downsampler)
    if stages["pooled"]:
        pooled(*blocks)
    ours = {place: patch for change in network.at((sigma,)).now for patch in change.patches
            for place in patch.places}
    level, up = (1, 1) if xl else (0, 3)
    theirs = [*twin.down_blocks[level].attentions, *twin.up_blocks[up].attentions]
    assert tuple(ours) and set(ours) == set(finest(unet)) and len(theirs) == len(ours)
    sizes: list[tuple[int, int]] = []
    for place, attention in zip(finest(unet), theirs, strict=True):
        attention.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[2:])))
        for block in attention.transformer_blocks:
            patch = ours[place]
            assert isinstance(patch, Windows)
            windowed(block, lambda: sizes[-1], patch.quarters)
    got = network.at((sigma,))(*args)
    assert relative(got, unet(*args)) > 1e-4
    return relative(got, twin(*args).sample)


def comfy(unet: UNet, args: tuple[Tensor, Tensor, Tensor], block: int, factor: float, after_skip: bool) -> Tensor:
    """ComfyUI's UNet with the patches of PatchModelAddDownscale, its first choices of methods."""
    x, t, tokens = args

    def smaller(h: Tensor) -> Tensor:
        height, width = (round(side * (1.0 / factor)) for side in h.shape[2:])
        return F.interpolate(h, (height, width), mode="bicubic")

    emb = unet._embedding(x, t, Context(tokens))
    skips = []
    for n, stage in enumerate(unet.input_blocks):
        x = stage(x, emb, tokens, None)
        if n == block and not after_skip:
            x = smaller(x)
        skips.append(x)
        if n == block and after_skip:
            x = smaller(x)
    x = unet.middle_block(x, emb, tokens, None)
    for stage in unet.output_blocks:
        skip = skips.pop()
        if x.shape[2] != skip.shape[2] or x.shape[3] != skip.shape[3]:
            x = F.interpolate(x, skip.shape[2:], mode="bicubic")
        x = stage(torch.cat([x, skip], 1), emb, tokens, None, (), skips[-1].shape[2:] if skips else None)
    return unet.out(x)


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
@pytest.mark.parametrize(("stage", "factor", "skip"), [(3, 2., False), (3, 2., True), (1, 1.5, False), (6, 2., True)])
def test_shrink_equals_comfyuis(config: UNetConfig, stage: int, factor: float, skip: bool) -> None:
    unet = random_unet(config)
    network, args = Inside(unet, Shrink(stage, factor, skip)), inputs(unet, *SIZES[1])
    got = network.at((AFTER_35 + 1e-3,))(*args)
    assert relative(got, comfy(unet, args, stage, factor, not skip)) < 1e-13
    assert relative(got, unet(*args)) > 1e-6
    assert network.at((AFTER_35,)) is unet


def test_the_thresholds_are_shares_of_the_timesteps() -> None:
    for share, sigma in ((0.16, AFTER_16), (0.3, AFTER_30), (0.35, 2.739), (0.4, AFTER_40), (0.7, AFTER_70)):
        assert after(share) == pytest.approx(sigma, abs=6e-4)


def test_the_thresholds_follow_the_schedule_and_where_a_run_begins() -> None:
    """As the published code's, whose steps are those of the shortened run; an EDM model has logarithms for timesteps,
    as ComfyUI's percents of it (Playground v2.5: .002 to 80)."""
    edm, sd15 = EDMSchedule(), NoiseSchedule.sd15()
    assert after(0.4, edm) == pytest.approx(80 ** 0.6 * 0.002**0.4)
    for begins in (1.18, 5.0):
        t = sd15.sigma_to_t(torch.tensor(begins, dtype=torch.float64))
        assert after(0.4, sd15, begins) == pytest.approx(float(sd15.t_to_sigma(0.6 * t)))
    unet = random_unet(SDXL)
    assert [type(change) for change in hidiffusion(unet, 256, 256, schedule=edm)] == [Shrink, WindowAttention]


def test_windows_move_with_sigma_and_place_alone() -> None:
    unet = random_unet(SD15)
    windows, places = WindowAttention().on(unet), finest(unet)
    before = torch.get_rng_state(), random.getstate()

    def quarters(sigma: float, seed: int = 0) -> list[int]:
        at = replace(windows, seed=seed).at(sigma)
        assert at is not None
        return [patch.quarters for place in places for patch in at.patches if place in patch.places]  # type: ignore[attr-defined]

    sigmas = [14.6 * 0.8**i for i in range(30)]
    assert all(quarters(s) == quarters(float(torch.tensor(s))) for s in sigmas), "fp32 and fp64 alike"
    assert {quarters(s)[0] for s in sigmas} == {0, 1, 2, 3}
    assert [quarters(s, 1) for s in sigmas] != [quarters(s) for s in sigmas]
    assert all(set(quarters(s)) == {0, 1, 2, 3} for s in sigmas), "the places of one call differ"
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def cond(seed: int) -> Constant:
    return Constant(TextFeatures(noise(1, 7, WIDTH, seed=seed)))


ALL: tuple[Change, ...] = (WiderStride(3, sigma_lo=2.0), Shrink(4, skip=True, pooled=True, sigma_lo=5.0),
                           WindowAttention(), FreeU(by="level", sigma_hi=4.0))


def test_batches_equal_singles_rows_differ_in_sigma_and_runs_split() -> None:
    unet = randomised(UNet(SD15), 0, 0.1)
    denoiser = GuidedDenoiser(LDMDenoiser(Inside(unet, *ALL)), CFG(4.0))
    args = {"cond": cond(4), "uncond": cond(5)}
    x, sigma = noise(3, 4, 20, 13), torch.tensor([9.0, 3.0, 0.5])
    got = denoiser(x, sigma, **args)
    for i in range(3):
        assert relative(got[i:i + 1], denoiser(x[i:i + 1], sigma[i:i + 1], **args)) < 1e-5
    sigmas = torch.tensor([9.0, 5.5, 3.0, 1.0, 0.3, 0.0])
    whole = sample_dpmpp_2m(denoiser, x * 9, sigmas, extra_args=args, disable=True)
    apart = GuidedDenoiser(LDMDenoiser(Inside(fast_on_cpu(unet), *ALL)), CFG(4.0), together=False)
    assert relative(sample_dpmpp_2m(apart, x * 9, sigmas, extra_args=args, disable=True), whole) < 1e-4
    one = sample_dpmpp_2m(denoiser, x[1:2] * 9, sigmas, extra_args=args, disable=True)
    assert relative(one, whole[1:2]) < 1e-4


@pytest.mark.parametrize("rule", [PAG(CFG(4.0), 3.0), PAG(CFG(4.0), 3.0, ("input_blocks.1.1",)), SLG(CFG(4.0), 2.0)],
                         ids=["middle", "a windows' place", "slg"])
def test_rules_that_patch_rows_stand_beside(rule: Any) -> None:
    unet = randomised(UNet(SD15), 0, 0.1)
    network = Inside(unet, *ALL)
    args = {"cond": cond(4), "uncond": cond(5)}
    x, sigma = noise(1, 4, 16, 16), torch.tensor([9.0])
    got, plain = (GuidedDenoiser(LDMDenoiser(network), each)(x, sigma, **args) for each in (rule, CFG(4.0)))
    denoiser = LDMDenoiser(network)

    def answer(**patched: Any) -> Tensor:
        return denoiser.bind(x, cond=args["cond"])(x, 9.0, only=Branch("cond", **patched)).denoised

    away = answer() - answer(patch=rule.perturbation())
    assert relative(got, plain + rule.scale * away) < 1e-5


def test_a_controls_features_are_resized_to_the_skips_as_published() -> None:
    """The published UNet brings each residual to its feature's size, bicubic, and adds it."""
    unet = tiny_unet().double()
    net = randomised(ControlNet.of(unet, "edges"), 3, 0.1)
    x, t, tokens = inputs(unet, 20, 14)
    picture = torch.rand(1, 3, 160, 112, generator=torch.Generator().manual_seed(0))
    seen = Constant(TextFeatures(tokens)).with_control(net, picture, 0.7)(t)
    got = Inside(unet, WiderStride(2)).at((9.0,))(x, t, seen)
    twin = as_diffusers(unet)
    twin.num_upsamplers += 12
    strided(twin.down_blocks[0].downsamplers[0].conv)
    found = seen.controls[0].residuals(x, t, seen, unet.config)

    def fitted(residual: Tensor, small: bool) -> Tensor:
        return F.interpolate(residual, (5, 4), mode="bicubic") if small else residual

    down = [fitted(residual, n > 1) for n, residual in sorted(found.skips.items())]
    want = twin(x, t, tokens, down_block_additional_residuals=down,
                mid_block_additional_residual=fitted(found.middle, True)).sample
    assert relative(got, want) < 1e-12
    assert relative(got, Inside(unet, WiderStride(2)).at((9.0,))(x, t, Context(tokens))) > 1e-4
    off = Constant(TextFeatures(tokens)).with_control(net, picture, 0.0)(t)
    assert torch.equal(Inside(unet, WiderStride(2)).at((9.0,))(x, t, off),
                       Inside(unet, WiderStride(2)).at((9.0,))(x, t, Context(tokens)))


def test_a_seamless_downsampler_stays_seamless() -> None:
    down = around(randomised(Downsample(8), 0).double())
    x = noise(1, 8, 16, 12, dtype=torch.float64)
    assert relative(down(x.roll((4, 8), (2, 3)), 2), down(x, 2).roll((1, 2), (2, 3))) < 1e-14


def test_what_cannot_be() -> None:
    unet = tiny_unet()
    with pytest.raises(ValueError, match=r"no downsampler: choose from \[2\]"):
        Inside(unet, WiderStride(3))
    with pytest.raises(ValueError, match="stages 0 to 3"):
        Inside(unet, Shrink(9))
    with pytest.raises(ValueError, match="at least 1"):
        Shrink(3, 0.5)
    with pytest.raises(ValueError, match="a whole one"):
        Shrink(3, 1.5, pooled=True)
    with pytest.raises(ValueError, match="both change"):
        Inside(unet, WindowAttention(), ToMe(0.5))
    assert Inside(unet, Shrink(2, 1.0)).at((9.0,)) is unet
