"""A network in tiles: what a pointwise one says whole, what the mean of the tiles says, and what every tile is told."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ella_kd import And, Box, CFGDenoiser, LDMDenoiser, Mask, Pipeline, Regions
from ella_kd.conditioning import Channels, Constant
from ella_kd.drawing import decoded
from ella_kd.guidance import CFG, GuidedDenoiser, Perturbed, Rescale
from ella_kd.models import TextFeatures
from ella_kd.models.addons.lora import LoRA, with_lora
from ella_kd.models.context import Context
from ella_kd.models.controls import Control, Hint
from ella_kd.models.cpu import fast_on_cpu
from ella_kd.models.freeu import FreeU
from ella_kd.models.inside import Inside
from ella_kd.models.patches import IdentityAttention, SelfAttentionPatch
from ella_kd.models.reuse import Reuse
from ella_kd.models.seamless import seamless
from ella_kd.models.tiled import Tiled, Tiles
from ella_kd.samplers import get_sampler, get_sigmas_karras
from tiny import WIDTH, PointwiseUNet, features, noise, relative, tiny_unet

LAYOUTS = st.builds(
    lambda size, overlap, weights, wrap: Tiles(size, (min(overlap[0], size[0] - 1), min(overlap[1], size[1] - 1)),
                                               weights, wrap),
    st.tuples(st.integers(1, 6), st.integers(1, 6)), st.tuples(st.integers(0, 5), st.integers(0, 5)),
    st.sampled_from(["uniform", "gaussian"]), st.booleans())
TOKENS = noise(1, 3, 24, seed=8)


def tiled(network: Any, tiles: Tiles, at_once: int = 3) -> Tiled:
    return Tiled(network, tiles.size, tiles.overlap, tiles.weights, tiles.wrap, at_once)


class Listening(nn.Module):
    """x plus its channels and 0.1 t; keeps what each call was told."""

    in_channels, out_channels, places, vector_dim, dtype = 4, 4, (), None, torch.float32

    def __init__(self, vector_dim: int | None = None) -> None:
        super().__init__()
        self.vector_dim = vector_dim
        self.calls: list[Context] = []

    def at(self, levels: Sequence[float]) -> "Listening":
        return self

    def forward(self, x: Tensor, t: Tensor, context: Context, patches: Any = ()) -> Tensor:
        self.calls.append(context)
        own = context.tokens[:, :1, :1, None] + 0.1 * t[:, None, None, None]
        return torch.sin(x + own) + (0 if context.channels is None else context.channels)


class Blur(Listening):
    """A circular convolution, which is what a periodic picture is to a translation-equivariant network."""

    def forward(self, x: Tensor, t: Tensor, context: Context, patches: Any = ()) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), torch.ones(4, 1, 3, 3).to(x) / 9, groups=4)


@settings(max_examples=60)
@given(LAYOUTS, st.integers(1, 13), st.integers(1, 13))
def test_tiles_cover_the_picture_evenly(tiles: Tiles, h: int, w: int) -> None:
    boxes = tiles.boxes(h, w)
    for n, size, overlap, wrap, side in ((h, tiles.size[0], tiles.overlap[0], False, 0),
                                         (w, tiles.size[1], tiles.overlap[1], tiles.wrap, 1)):
        starts = sorted({box[side] for box in boxes})
        size = min(size, n)
        assert {box[side + 2] for box in boxes} == {size} and starts[0] == 0
        gaps = [b - a for a, b in pairwise(starts)]
        if len(starts) > 1:
            assert max(gaps) <= size - overlap and max(gaps) - min(gaps) <= 1
            gap = n - starts[-1] - size
            assert gap == 0 if not wrap else -size < gap + overlap <= 0


@settings(max_examples=40)
@given(LAYOUTS, st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_a_pointwise_network_says_the_same_in_tiles(tiles: Tiles, h: int, w: int, rows: int) -> None:
    """Bit for bit, whatever the tiles, their weights and how many go together; with channels beside x."""
    x, t, context = noise(rows, 4, h, w), torch.arange(rows) * 100.0, Context(noise(rows, 2, 24, seed=1),
                                                                             channels=noise(rows, 4, h, w, seed=2))
    assert torch.equal(tiled(Listening(), tiles)(x, t, context), Listening()(x, t, context))


@pytest.mark.parametrize("weights", ["uniform", "gaussian"])
def test_the_mean_of_the_tiles_by_the_book(weights: Any) -> None:
    """sum w_k F_k / sum w_k, with the tokens of each row, in float64; gaussian weights of variance .01 side^2."""
    unet = tiny_unet().double()
    x, t = noise(2, 4, 14, 10, dtype=torch.float64), torch.tensor([500.0, 20.0])
    context = Context(noise(2, 5, WIDTH, seed=4, dtype=torch.float64))
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    for top in (0, 3, 6):
        for left in (0, 2):
            here = slice(top, top + 8), slice(left, left + 8)
            weight = torch.tensor([[1.0 if weights == "uniform" else torch.exp(torch.tensor(
                -((i - 3.5) ** 2 + (j - 3.5) ** 2) / (2 * 0.01 * 64), dtype=torch.float64))
                for j in range(8)] for i in range(8)], dtype=torch.float64)
            total[..., here[0], here[1]] += weight * unet(x[..., here[0], here[1]], t, context)
            count[..., here[0], here[1]] += weight
    for at_once in (1, 4, 9):
        assert relative(Tiled(unet, 8, 5, weights, at_once=at_once)(x, t, context), total / count) < 1e-13


def test_one_tile_is_the_network() -> None:
    unet, x, t, context = tiny_unet(), noise(2, 4, 8, 6), torch.tensor([5.0, 900.0]), Context(noise(2, 3, WIDTH))
    assert torch.equal(Tiled(unet, 8, 2)(x, t, context), unet(x, t, context))


def test_inside_tiles_a_convolution_is_the_whole_one() -> None:
    x, t, context = noise(1, 4, 12, 12, dtype=torch.float64), torch.zeros(1), Context(TOKENS)
    inside = Tiled(Blur(), 12, 0).network(x, t, context)
    apart = Tiled(Blur(), (12, 6), 0)(x, t, context)
    assert relative(apart[..., 1:5], inside[..., 1:5]) < 1e-14
    assert relative(apart[..., :1], inside[..., :1]) > 1e-3


def test_a_panorama_has_no_edge() -> None:
    """Rolled by a stride the answer rolls along, though the network sees where a tile ends; not without wrap."""
    unet = tiny_unet().double()
    x, t, context = noise(1, 4, 8, 16, dtype=torch.float64), torch.tensor([400.0]), Context(TOKENS.double())
    for wrap in (True, False):
        network = Tiled(unet, 8, 4, wrap=wrap)
        error = relative(network(x.roll(4, 3), t, context), network(x, t, context).roll(4, 3))
        assert error < 1e-12 if wrap else error > 1e-3


def test_a_panorama_is_decoded_all_the_way_round() -> None:
    """Moved around, the same picture but for its norms' .08; the decoder alone draws an edge of nothing, 2 of 2."""
    pipeline = Pipeline.miniature(device="cpu")
    z = noise(1, pipeline.vae.config.latent_channels, 6, 48)
    for unet, close in ((Tiled(pipeline.unet, 6, 3, wrap=True), True), (pipeline.unet, False)):
        one, other = (decoded(replace(pipeline, unet=Reuse(unet, 1)), each) for each in (z, z.roll(24, 3)))
        error = float((other - one.roll(24 * pipeline.vae.factor, 3)).detach().abs().max())
        assert error < 0.3 if close else error > 1, error


def test_a_lora_reaches_into_tiles() -> None:
    unet = tiny_unet()
    name = "lora_unet_middle_block_1_proj_in"
    lora = LoRA.of({f"{name}.lora_down.weight": noise(2, 64, 1, 1), f"{name}.lora_up.weight": noise(64, 2, 1, 1)})
    x, t, context = noise(1, 4, 8, 12), torch.tensor([400.0]), Context(TOKENS)
    got = with_lora(Tiled(unet, 8, 4), lora)(x, t, context)
    assert torch.equal(got, Tiled(with_lora(unet, lora), 8, 4)(x, t, context))
    assert relative(got, Tiled(unet, 8, 4)(x, t, context)) > 1e-4


def test_sdxl_is_told_of_each_tile_as_a_crop() -> None:
    network = Listening(vector_dim=7 + 6 * 256)
    x, t = noise(1, 4, 8, 12), torch.zeros(1)
    context = Context(TOKENS, vector=torch.ones(1, 7))
    Tiled(network, 8, 4, at_once=2)(x, t, context)
    assert [call.sizes.tolist() for call in network.calls] == [  # type: ignore[union-attr]
        [[64, 96, 0, 0, 64, 64], [64, 96, 0, 32, 64, 64]]]
    Tiled(network, 8, 4)(x, t, replace(context, sizes=torch.tensor([[512.0, 512, 9, 10, 64, 96]])))
    assert network.calls[-1].sizes.tolist() == [  # type: ignore[union-attr]
        [512, 512, 9, 10, 64, 64], [512, 512, 9, 42, 64, 64]]
    Tiled(network, 8, 4)(x, t, replace(context, vector=torch.ones(1, 7 + 6 * 256)))
    assert network.calls[-1].sizes is None


@dataclass(frozen=True)
class AsTheFirst(SelfAttentionPatch):
    """Every row attends as the first of its rows does."""

    places: tuple[str, ...]

    def attention(self, attn: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        first: Tensor = attn(x[:1], x[:1])
        return first.expand_as(x)


def test_a_patch_sees_the_rows_of_one_tile() -> None:
    """Rows are patched tile by tile, as they would be in a call of each tile alone."""
    unet = tiny_unet().double()
    x, t = noise(3, 4, 8, 12, dtype=torch.float64), torch.full((3,), 300.0)
    context = Context(noise(3, 3, WIDTH, seed=4, dtype=torch.float64))
    every = AsTheFirst(unet.places)
    for patches in ([(3, every)], [(2, every), (1, AsTheFirst(unet.places[:1]))]):
        left, right = (unet(part, t, context, patches) for part in (x[..., :8], x[..., 4:]))
        want = torch.cat([left[..., :4], (left[..., 4:] + right[..., :4]) / 2, right[..., 4:]], 3)
        assert relative(Tiled(unet, 8, 4)(x, t, context, patches), want) < 1e-13


@pytest.mark.parametrize("wrap", [False, True])
def test_the_hints_of_controls_are_cut_with_the_tiles(wrap: bool) -> None:
    """A control that adds its hint, pixel by pixel, adds the same whole and in tiles; rows without one have none."""
    class Adding(Listening):
        def forward(self, x: Tensor, t: Tensor, context: Context, patches: Any = ()) -> Tensor:
            for control in context.controls or ():
                for row, hint, strength in zip(control.rows, control.hints, control.strengths):
                    drawn = F.avg_pool2d(hint.drawn((x.shape[2], x.shape[3]), x), 8)
                    x = torch.cat([x[:row], x[row:row + 1] + strength * drawn.mean(1, True), x[row + 1:]])
            return x

    hint = Hint(torch.rand(1, 3, 64, 104, generator=torch.Generator().manual_seed(0)))
    control = Control((1,), (0.5,), None, (hint,))  # type: ignore[arg-type]
    x, t, context = noise(3, 4, 8, 13), torch.zeros(3), Context(noise(3, 2, 24), controls=(control,))
    whole = Adding()(x, t, context)
    assert relative(whole, x) > 1e-2
    assert torch.equal(Tiled(Adding(), (8, 6), 2, wrap=wrap)(x, t, context), whole)


def prompts(*seeds: int) -> list[Constant]:
    return [Constant(TextFeatures(noise(1, 3, WIDTH, seed=seed, dtype=torch.float64), None)) for seed in seeds]


def test_only_the_tiles_of_a_region_are_asked_about_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the answer is the one of all tiles asked about everything; overlaps, an uncond, AND and CFG among it."""
    a, b, c, u = prompts(1, 2, 3, 4)
    drawn = torch.zeros(8, 32)
    drawn[:, 26:30] = 1
    cond = Regions((a, Box(0, 0, 0.3, 1)), (And((b, 0.7), (c, 0.3)), Mask(drawn)), background=u)
    unet = tiny_unet().double()
    counted: list[int] = []
    unet.register_forward_pre_hook(lambda _, args: counted.append(len(args[0])))
    x = noise(2, 4, 8, 32, dtype=torch.float64) * 3
    denoiser = GuidedDenoiser(LDMDenoiser(Tiled(unet, 8, 0)), Rescale(CFG(3.0), 0.5))
    got = denoiser(x, torch.full((2,), 3.0, dtype=torch.float64), cond=cond, uncond=u)
    asked = sum(counted)
    counted.clear()
    monkeypatch.delattr(Tiled, "takes_where")
    every = denoiser(x, torch.full((2,), 3.0, dtype=torch.float64), cond=cond, uncond=u)
    assert relative(got, every) < 1e-13
    # a in the two tiles on the left, b and c in the one on the right, u in all four
    assert (asked, sum(counted)) == (2 * (2 + 1 + 1 + 4), 2 * 4 * 4)


def test_rows_at_their_own_levels_and_of_their_own_networks() -> None:
    """A network that has a level per row, or a network per row, is called with whole batches of them, tile by tile."""
    class ByLevel(Listening):
        levels: tuple[float, ...] = ()

        def at(self, levels: Any) -> "ByLevel":
            found = ByLevel()
            found.levels = tuple(levels)
            return found

        def forward(self, x: Tensor, t: Tensor, context: Context, patches: Any = ()) -> Tensor:
            assert len(x) % len(self.levels) == 0
            return x * x.new_tensor(self.levels).repeat(len(x) // len(self.levels)).view(-1, 1, 1, 1)

    x = noise(2, 4, 8, 20)
    cond = Regions((TOKENS, Box(0, 0, 0.3, 1)), background=TOKENS + 1)
    levels = torch.tensor([2.0, 0.5])
    assert torch.equal(LDMDenoiser(Tiled(ByLevel(), 8, 2))(x, levels, cond=cond),
                       LDMDenoiser(ByLevel())(x, levels, cond=cond))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "lms_cfg_pp", "dpmpp_2s_ancestral_cfg_pp", "heun"])
def test_a_run_of_a_pointwise_network_is_the_same_in_tiles(sampler: str) -> None:
    x, sigmas = noise(2, 4, 6, 9) * 14, get_sigmas_karras(4, 0.03, 14.0)
    args = {"cond": features(3, seed=1), "uncond": features(2, seed=2), "cond_scale": 0.6}

    def run(network: Any) -> Tensor:
        denoiser = CFGDenoiser(LDMDenoiser(network))
        return get_sampler(sampler).function(denoiser, x, sigmas, extra_args=args, seeds=[1, 2], disable=True)

    assert torch.equal(run(Tiled(PointwiseUNet(), 4, 1, "gaussian", wrap=True)), run(PointwiseUNet()))


def test_perturbed_and_channels_in_a_run() -> None:
    unet = tiny_unet()
    denoiser = GuidedDenoiser(LDMDenoiser(Tiled(unet, 8, 2)), Perturbed(CFG(2.0), IdentityAttention(unet.places), 1.0))
    x = noise(1, 4, 8, 14)
    cond, uncond = (Constant(TextFeatures(noise(1, 3, WIDTH, seed=seed), None)) for seed in (1, 2))
    assert denoiser(x, torch.ones(1), cond=cond, uncond=uncond).isfinite().all()
    with pytest.raises(ValueError, match="channels must be as large as the latents"):
        Tiled(Listening(), 8, 2)(x, torch.ones(1), Channels(cond, torch.zeros(1, 4, 8, 8))(torch.ones(1)))


@pytest.mark.parametrize(("args", "says"), [
    ((0,), "a size of at least 1"), ((8, 8), "an overlap from 0 to less than it"), ((8, 0, "hard"), "uniform"),
    ((8, 0, "uniform", False, 0), "at_once is how many tiles")])
def test_tiles_that_cannot_be_are_refused(args: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Tiled(Listening(), *args)


def test_a_seamless_network_is_refused() -> None:
    unet = tiny_unet()
    for network in (seamless(unet), Inside(seamless(unet), FreeU()), fast_on_cpu(seamless(unet))):
        with pytest.raises(ValueError, match="would meet itself"):
            Tiled(network, 8, 2)
    Tiled(unet, 8, 2)
