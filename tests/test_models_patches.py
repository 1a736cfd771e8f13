"""Patches against blocks that were really changed, written down again with einsum; and that nothing of them stays."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from ella_kd.models import UNet, UNetConfig, patches
from ella_kd.models.blocks import TransformerBlock
from ella_kd.models.context import Context
from ella_kd.models.patches import (
    BlurredQueries,
    IdentityAttention,
    Patch,
    SkipAttention,
    SkipBlock,
    gaussian_blur,
)
from tiny import WIDTH, noise, randomised, relative, sharp_unet, tiny_unet

DATA = Path(__file__).parent / "data"
MIDDLE = ("middle_block.1",)
SEVERAL = ("input_blocks.3.1", "middle_block.1", "output_blocks.3.1")
SIZE = (6, 5)


def inputs(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[::2, 4:] = False
    t = 999 * torch.rand(batch, generator=torch.Generator().manual_seed(0))
    return noise(batch, 4, 12, 9, dtype=dtype), t, noise(batch, 7, WIDTH, seed=4, dtype=dtype), mask


class Changed(nn.Module):
    """A transformer block written down again, with a self-attention that is given q, k, v [b, h * w, heads, d]."""

    def __init__(self, block: TransformerBlock, self_attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.self_attention = block, self_attention

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        block, heads = self.block, self.block.attn1.heads
        normed = block.norm1(x)
        q, k, v = (layer(normed).unflatten(2, (heads, -1))
                   for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v))
        x = x + block.attn1.to_out(self.self_attention(q, k, v).flatten(2))
        x = x + block.attn2(block.norm2(x), context, mask)
        return x + block.ff(block.norm3(x))


def softmax_map(q: Tensor, k: Tensor) -> Tensor:
    return (torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5).softmax(-1)


def mixed(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def scipy_blurred(q: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    grid = q.unflatten(1, size).numpy()
    return torch.from_numpy(gaussian_filter(grid, sigma, axes=(1, 2), mode="reflect", truncate=6)).flatten(1, 2)


class Nothing(nn.Module):
    """A block that is gone."""

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        return x


class NoSelfAttention(nn.Module):
    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.block.attn2(self.block.norm2(x), context, mask)
        return x + self.block.ff(self.block.norm3(x))


def blurred(sigma: float, sizes: dict[int, tuple[int, int]]) -> Callable[[TransformerBlock], nn.Module]:
    return lambda block: Changed(
        block, lambda q, k, v: mixed(softmax_map(scipy_blurred(q, sizes[q.shape[1]], sigma), k), v))


def mean_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mixed(softmax_map(q.mean(1, keepdim=True).expand_as(q), k), v)


SIZES = {12 * 9: (12, 9), 6 * 5: (6, 5)}
PATCHES: dict[str, tuple[Callable[[tuple[str, ...]], Patch], Callable[[TransformerBlock], nn.Module]]] = {
    "identity": (IdentityAttention, lambda block: Changed(block, lambda q, k, v: v)),
    "skip attention": (SkipAttention, NoSelfAttention),
    "skip block": (SkipBlock, lambda block: Nothing()),
    "mean query": (BlurredQueries, lambda block: Changed(block, mean_query)),
    "blur 1": (lambda places: BlurredQueries(places, 1.0), blurred(1.0, SIZES)),
    "blur 2.5": (lambda places: BlurredQueries(places, 2.5), blurred(2.5, SIZES)),
}


def changed_unet(unet: UNet, places: tuple[str, ...], change: Callable[[TransformerBlock], nn.Module]) -> UNet:
    changed = deepcopy(unet)
    for place in places:
        blocks = changed.get_submodule(place).transformer_blocks
        blocks[0] = change(blocks[0])  # type: ignore[operator, index, arg-type, assignment]
    return changed


@pytest.mark.parametrize("places", [MIDDLE, SEVERAL], ids=["middle", "several"])
@pytest.mark.parametrize("name", PATCHES)
def test_patched_rows_equal_a_changed_network_and_the_others_the_plain_one(name: str, places: tuple[str, ...]) -> None:
    make, change = PATCHES[name]
    unet = sharp_unet()
    x, t, context, mask = inputs(5)
    plain = unet(x, t, Context(context, mask))
    got = unet(x, t, Context(context, mask), [(2, None), (2, make(places)), (1, None)])
    want = changed_unet(unet, places, change)(x, t, Context(context, mask))
    tolerance = 1e-7 if "blur" in name else 1e-13  # scipy cuts the Gaussian elsewhere
    assert relative(got[2:4], want[2:4]) < tolerance
    assert relative(got[2:4], plain[2:4]) > 1e-5
    rest = [0, 1, 4]
    assert relative(got[rest], plain[rest]) < 1e-14
    alone = unet(x, t, context, [(5, make(places))])
    assert relative(alone, changed_unet(unet, places, change)(x, t, context)) < tolerance


@pytest.mark.parametrize("name", PATCHES)
def test_a_block_alone(name: str) -> None:
    make, change = PATCHES[name]
    block = randomised(TransformerBlock(32, WIDTH, 2), 1).double()
    x, context = noise(2, 30, 32, dtype=torch.float64), noise(2, 7, WIDTH, seed=4, dtype=torch.float64)
    patch = make(MIDDLE)
    assert relative(patch(block, x, context, None, SIZE), change(block)(x, context, None)) < 1e-7
    assert relative(patch(block, x, context, None, SIZE), block(x, context, None)) > 1e-3


KINDS = (None, IdentityAttention(MIDDLE), BlurredQueries(SEVERAL[:2], 0.7), SkipBlock(("output_blocks.0.1",)),
         SkipAttention(SEVERAL[:2]))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(KINDS)), min_size=1, max_size=4))
def test_any_mix_of_rows_equals_single_calls(mix: list[tuple[int, Patch | None]]) -> None:
    batch = sum(rows for rows, _ in mix)
    assume(batch)
    unet = randomised(UNet(UNetConfig(4, 4, 32, (1, 1), 1, (False, True), WIDTH, 2)), 0, 0.1).double()
    x, t, context, mask = inputs(batch)
    got = unet(x, t, Context(context, mask), mix)
    each = [patch for rows, patch in mix for _ in range(rows)]
    for i, patch in enumerate(each):
        row = slice(i, i + 1)
        assert relative(got[row], unet(x[row], t[row], Context(context[row], mask[row]), ((1, patch),))) < 1e-13


def test_patches_that_change_nothing_here_are_bitwise_nothing() -> None:
    unet = tiny_unet()
    x, t, context, mask = inputs(3, torch.float32)
    plain = unet(x, t, Context(context, mask))
    for mix in ([(3, None)], [(1, None), (2, None)], [(0, SkipBlock(MIDDLE)), (3, None)], [(3, SkipBlock(()))],
                [(3, BlurredQueries(SEVERAL, 0.0))]):
        assert torch.equal(unet(x, t, Context(context, mask), mix), plain)


def test_a_patch_sees_the_rows_and_the_size_of_its_place() -> None:
    seen = []

    @dataclass(frozen=True)
    class Look(Patch):
        places: tuple[str, ...]

        def __call__(self, block: TransformerBlock, x: Tensor, context: Tensor, mask: Tensor | None,
                     size: tuple[int, int]) -> Tensor:
            seen.append((x.shape, context, mask, size))
            return block(x, context, mask)

    unet = tiny_unet()
    x, t, context, mask = inputs(4, torch.float32)
    got = unet(x, t, Context(context, mask), [(1, None), (2, Look(("input_blocks.1.1", *MIDDLE))), (1, None)])
    assert relative(got, unet(x, t, Context(context, mask))) < 1e-6
    assert [(shape, size) for shape, _, _, size in seen] == [((2, 108, 32), (12, 9)), ((2, 30, 64), (6, 5))]
    for _, its_context, its_mask, _ in seen:
        assert torch.equal(its_context, context[1:3])
        assert its_mask is not None and torch.equal(its_mask, mask[1:3])


@dataclass(frozen=True)
class Broken(Patch):
    places: tuple[str, ...] = MIDDLE

    def __call__(self, block: TransformerBlock, x: Tensor, context: Tensor, mask: Tensor | None,
                 size: tuple[int, int]) -> Tensor:
        raise KeyError("broken")


@dataclass(frozen=True)
class Short(Broken):
    def __call__(self, block: TransformerBlock, x: Tensor, context: Tensor, mask: Tensor | None,
                 size: tuple[int, int]) -> Tensor:
        return x[:, 1:]


def test_nothing_remains_after_an_exception() -> None:
    unet = tiny_unet()
    x, t, context, mask = inputs(3, torch.float32)
    before, text, state = unet(x, t, Context(context, mask)), repr(unet), deepcopy(unet.__dict__)
    for patch, error in ((Broken(), KeyError), (Short(), ValueError)):
        with pytest.raises(error, match=r"broken|shape of its x \[1, 30, 64\].* returned \[1, 29, 64\]"):
            unet(x, t, Context(context, mask), [(2, None), (1, patch)])
    assert torch.equal(unet(x, t, Context(context, mask)), before)
    assert (repr(unet), unet.__dict__.keys()) == (text, state.keys())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_patches_are_values() -> None:
    assert {IdentityAttention(MIDDLE), IdentityAttention(MIDDLE), SkipBlock(MIDDLE), BlurredQueries(MIDDLE, 1.0),
            BlurredQueries(MIDDLE, 1.0), BlurredQueries(MIDDLE, 2.0)} == {
        IdentityAttention(MIDDLE), SkipBlock(MIDDLE), BlurredQueries(MIDDLE, 1.0), BlurredQueries(MIDDLE, 2.0)}


@pytest.mark.parametrize("patch", [patch for patch in KINDS if patch is not None], ids=lambda p: type(p).__name__)
def test_a_half_network_stays_half(patch: Patch) -> None:
    unet = tiny_unet().bfloat16()
    x, t, context, mask = inputs(2, torch.bfloat16)
    assert unet(x, t, Context(context, mask), [(1, None), (1, patch)]).dtype == torch.bfloat16


@pytest.mark.parametrize(("mix", "says"), [
    ([(3, SkipBlock(("mid",)))], r"no transformer block 'mid': choose from input_blocks\.1\.1, .*, middle_block\.1, "),
    ([(2, None), (1, SkipBlock(("middle_block.1", "input_blocks.0.1")))], "no transformer block 'input_blocks.0.1'"),
    ([(2, None)], r"each of the 3 rows .* got rows \[2\]"),
    ([(2, None), (2, SkipBlock(MIDDLE))], r"got rows \[2, 2\]"),
    ([(4, None), (-1, SkipBlock(MIDDLE))], r"got rows \[4, -1\]"),
])
def test_wrong_patches_are_refused(mix: list[tuple[int, Patch | None]], says: str) -> None:
    x, t, context, mask = inputs(3, torch.float32)
    with pytest.raises(ValueError, match=says):
        tiny_unet()(x, t, Context(context, mask), mix)


@pytest.mark.parametrize("sigma", [-1.0, math.nan])
def test_a_blur_needs_a_sigma(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma >= 0"):
        BlurredQueries(MIDDLE, sigma)
    with pytest.raises(ValueError, match="sigma >= 0"):
        gaussian_blur(torch.zeros(1, 1, 2, 2), sigma)


def test_the_patch_in_the_docstring_works() -> None:
    lines = (patches.__doc__ or "").partition("frozen dataclass:\n")[2].splitlines()
    code = "\n".join(line.removeprefix("    ") for line in lines)
    names: dict[str, type] = {"dataclass": dataclass, "Patch": Patch}  # type: ignore[dict-item]
    exec(code, names)
    unet = sharp_unet()
    x, t, context, mask = inputs(2)
    got = unet(x, t, Context(context, mask), [(1, None), (1, names["FadedText"](MIDDLE, 0.5))])
    changed = deepcopy(unet)
    changed.middle_block[1].transformer_blocks[0].attn2.to_out[0].weight *= 0.5  # type: ignore[union-attr, index]
    changed.middle_block[1].transformer_blocks[0].attn2.to_out[0].bias *= 0.5  # type: ignore[union-attr, index]
    assert relative(got[1:], changed(x, t, Context(context, mask))[1:]) < 1e-13
