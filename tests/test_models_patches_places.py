"""Patches where a place is several blocks deep, recorders of what a place looks at, patches in compiled networks."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ella_kd.models import UNet, UNetConfig
from ella_kd.models.context import Context
from ella_kd.models.demofusion import Dilated, LocalAndGlobal, fading
from ella_kd.models.networks import ByRow
from ella_kd.models.patches import IdentityAttention, Recorder
from ella_kd.models.tiled import Tiled
from test_models_patches import MIDDLE, PATCHES, SEVERAL, Changed, changed_unet, inputs, mixed, softmax_map
from tiny import WIDTH, noise, randomised, relative, sharp_unet, tiny_unet

DATA = Path(__file__).parent / "data"


def test_a_recorder_keeps_the_map_of_its_rows_and_changes_nothing() -> None:
    unet = sharp_unet()
    x, t, context, mask = inputs(4)
    recorders = Recorder("middle_block.1"), Recorder("input_blocks.1.1")
    got = unet(x, t, Context(context, mask), [(1, None), (2, recorders[0]), (1, recorders[1])])
    assert relative(got, unet(x, t, Context(context, mask))) < 1e-14
    assert recorders[0].received.shape == (2, 1, 6, 5)
    assert recorders[1].received.shape == (1, 1, 12, 9)

    maps = []

    def keep(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps.append(softmax_map(q, k))
        return mixed(maps[-1], v)

    changed_unet(unet, MIDDLE, lambda block: Changed(block, keep))(x, t, Context(context, mask))
    assert relative(recorders[0].received.flatten(1), maps[0][1:3].sum(2).mean(1)) < 1e-13
    assert float(recorders[0].received.mean((1, 2, 3)).sub(1).abs().max()) < 1e-14
    assert float(maps[0].std()) > 0.01  # not the uniform map


def test_a_recorder_is_for_one_call_and_no_value() -> None:
    unet, recorder = tiny_unet(), Recorder("middle_block.1")
    with pytest.raises(ValueError, match="one call of the UNet, and this one saw 0"):
        _ = recorder.received
    x, t, context, _ = inputs(2, torch.float32)
    assert torch.equal(unet(x, t, context, [(2, recorder)]), unet(x, t, context))
    assert recorder.received.dtype == torch.float32
    unet(x, t, context, [(2, recorder)])
    with pytest.raises(ValueError, match="this one saw 2"):
        _ = recorder.received
    assert Recorder("middle_block.1") != Recorder("middle_block.1")
    half, recorder = tiny_unet().bfloat16(), Recorder("middle_block.1")
    half(x.bfloat16(), t, context.bfloat16(), [(2, recorder)])
    assert recorder.received.dtype == torch.float32


def test_the_places_of_sd15() -> None:
    names = json.loads((DATA / "sd15_ldm_keys.json").read_text())
    inside = {name.removeprefix("model.diffusion_model.").partition(".transformer_blocks.")[0] for name in names
              if name.startswith("model.diffusion_model.") and ".transformer_blocks." in name}
    with torch.device("meta"):
        places = UNet().places
    assert set(places) == inside
    assert places[6] == "middle_block.1"
    assert len(places) == len(inside) == 16


def deep_unet() -> UNet:
    """Two blocks deep in the middle and at the coarse level, as SDXL's are deeper still."""
    config = UNetConfig(4, 4, 32, (1, 2), 1, (1, 2), WIDTH, 2, middle_depth=2)
    return randomised(UNet(config), 0, 0.1).double()


@pytest.mark.parametrize("name", ["identity", "skip attention", "mean query"])
def test_a_place_is_all_of_its_blocks(name: str) -> None:
    make, change = PATCHES[name]
    unet = deep_unet()
    x, t, context, mask = inputs(2)
    changed = deepcopy(unet)
    for place in SEVERAL[:2]:
        blocks: Any = changed.get_submodule(place).transformer_blocks
        assert len(blocks) == 2
        for i in range(2):
            blocks[i] = change(blocks[i])
    got = unet(x, t, Context(context, mask), [(1, None), (1, make(SEVERAL[:2]))])
    assert relative(got[1:], changed(x, t, Context(context, mask))[1:]) < 1e-12
    assert relative(got[:1], unet(x, t, Context(context, mask))[:1]) < 1e-12
    assert relative(got[1:], unet(x, t, Context(context, mask))[1:]) > 1e-5


def test_the_map_of_a_deep_place_is_its_first_blocks() -> None:
    unet, recorder, first = deep_unet(), Recorder("middle_block.1"), Recorder("middle_block.1")
    x, t, context, mask = inputs(1)
    unet(x, t, Context(context, mask), [(1, recorder)])
    shallow = deepcopy(unet)
    blocks: Any = shallow.get_submodule("middle_block.1").transformer_blocks
    del blocks[1]
    shallow(x, t, Context(context, mask), [(1, first)])
    assert torch.equal(recorder.received, first.received)
    unet(x, t, Context(context, mask), [(1, recorder)])
    with pytest.raises(ValueError, match="this one saw 2"):
        _ = recorder.received


def test_what_is_received_in_a_call_of_several_parts() -> None:
    """In tiles the mean of what they say, of several networks each row's own, of DemoFusion's pictures each pixel's."""
    unet, other, place = sharp_unet(), sharp_unet(), "middle_block.1"
    other.get_submodule(place).transformer_blocks[0].attn1.to_q.weight *= -1  # type: ignore[union-attr, index]
    x, t = noise(3, 4, 8, 12, dtype=torch.float64), torch.full((3,), 300.0)
    tokens = noise(3, 3, WIDTH, seed=4, dtype=torch.float64)

    def received(network: Any, x: Tensor) -> Tensor:
        """At the latents' size, of two rows among others."""
        own = len(x) // 3
        recorder = Recorder(place)
        network(x, t.repeat(own), Context(tokens.repeat(own, 1, 1)), [(1, None), (2, recorder)] * own)
        return F.interpolate(recorder.received, x.shape[2:])

    left, right = received(unet, x[..., :8]), received(unet, x[..., 4:])
    whole = torch.cat([left[..., :4], (left[..., 4:] + right[..., :4]) / 2, right[..., 4:]], 3)
    assert relative(received(Tiled(unet, 8, 4, at_once=1), x), whole) < 1e-13
    assert torch.equal(received(Tiled(unet, (8, 12), 0), x), received(unet, x))
    rows = received(ByRow([unet, other, unet]), x)
    one, two = received(other, x), received(unet, x)
    assert relative(one, two) > 1e-2
    assert relative(rows, torch.stack([one[0], two[1]])) < 1e-13
    assert relative(received(Tiled(ByRow([unet, other, unet]), 8, 4), x)[1:], whole[1:]) < 1e-13
    small: list[Tensor] = []
    with unet.register_forward_pre_hook(lambda _, args: small.append(args[0])):
        apart = received(Dilated(unet, 2, at_once=1), x)
    want = torch.zeros_like(apart)
    for i, each in enumerate(small):
        want[..., i // 2::2, i % 2::2] = received(unet, each)
    assert relative(apart, want) < 1e-13
    both, c = received(LocalAndGlobal(unet, 2, 8), x), float(fading(t)[0])
    assert relative(both, (1 - c) * whole + c * apart) < 1e-13


def test_a_block_compiles_into_one_graph_with_patches() -> None:
    transformer = tiny_unet().middle_block[1]
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Tensor]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(transformer, fullgraph=True, backend=keep)
    x, context = noise(3, 64, 4, 4), noise(3, 7, WIDTH, seed=4)
    assert_compiled(transformer, compiled, (x, context, None))
    assert len(graphs) == 2, "equal patches must not compile again"


@pytest.mark.slow
def test_the_unet_compiles_into_one_graph_with_patches() -> None:
    unet = randomised(UNet(UNetConfig(4, 4, 32, (1,), 1, (True,), WIDTH, 2)), 0, 0.1)
    assert_compiled(unet, torch.compile(unet, fullgraph=True), inputs(3, torch.float32))


def assert_compiled(module: nn.Module, compiled: Callable[..., Tensor], args: tuple[Tensor | None, ...]) -> None:
    """The same answers without patches, with patches, and with equal ones that are other objects."""
    plain = module(*args)
    assert relative(compiled(*args), plain) < 1e-5
    for _ in range(2):
        mix = [(1, None), (1, IdentityAttention(MIDDLE)), (1, recorder := Recorder("middle_block.1"))]
        want = module(*args, [*mix[:2], (1, check := Recorder("middle_block.1"))])
        assert relative(want, plain) > 1e-4
        assert relative(compiled(*args, mix), want) < 1e-5
        assert relative(recorder.received, check.received) < 1e-5
