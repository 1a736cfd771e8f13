"""fast_on_cpu rearranges a network and keeps its answer, on every kind of CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ella_kd import Pipeline
from ella_kd.models import UNet, UNetConfig, cpu, fast_on_cpu
from ella_kd.models.attention import attend
from ella_kd.models.cpu import attend_in_blocks
from ella_kd.models.products import ConvLinear, by_convolution
from ella_kd.models.winograd import WinogradConv2d
from tiny import features, noise, randomised, relative, tiny_tsc, tiny_unet

AMD = {"avx512_f": True, "avx512_bf16": True, "amx_tile": False, "cpu_name": "AMD EPYC"}
INTEL = {"avx512_f": True, "avx512_bf16": True, "amx_tile": True, "cpu_name": "Intel(R) Xeon(R) Processor @ 2.80GHz"}
OLD = {"avx512_f": False, "cpu_name": "AMD EPYC"}
Found = dict[str, object]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Found], None]:
    """Makes this CPU look like another."""
    return lambda found: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)


def count(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in network.modules())


@pytest.mark.parametrize("found", [AMD, INTEL, OLD, {}])
def test_an_fp32_network_keeps_its_answer_and_the_given_one_its_layers(found: Found, on: Callable[[Found], None],
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    on(found)
    monkeypatch.setattr(cpu, "AT_ONCE", 128 * 8 * 7)  # feed-forward: 7 tokens at a time
    unet = randomised(UNet(UNetConfig(4, 4, 128, (1, 2), 1, (True, False), 24, 2)), 0, 0.02)
    x, t, context = noise(2, 4, 9, 8), torch.tensor([961.73, 3.25]), noise(2, 5, 24, seed=1)
    before, names = unet(x, t, context), set(unet.state_dict())
    fast = fast_on_cpu(unet)
    assert count(fast, WinogradConv2d) == 17  # all but the first, the last and the one with a stride
    assert count(fast, ConvLinear) == (count(unet, nn.Linear) if found is AMD else 0)
    assert relative(fast(x, t, context), before) < 2e-5
    assert torch.equal(unet(x, t, context), before) and set(unet.state_dict()) == names
    assert fast.time_embed[0].weight is unet.time_embed[0].weight
    with pytest.raises(ValueError, match="save the one it was made of"):
        fast.state_dict()


@pytest.mark.parametrize("found", [AMD, INTEL])
def test_a_bf16_network_attends_in_blocks_where_there_are_no_tiles(found: Found,
                                                                   on: Callable[[Found], None]) -> None:
    on(found)
    unet = tiny_unet()
    x, t, context = noise(2, 4, 8, 8), torch.tensor([961.73, 3.25]), noise(2, 5, 24, seed=1)
    exact = unet(x, t, context)
    half = unet.bfloat16()
    plain, fast = (u(x.bfloat16(), t, context.bfloat16()).float() for u in (half, fast_on_cpu(half)))
    assert float((fast - exact).norm()) < 1.5 * float((plain - exact).norm())
    assert torch.equal(plain, fast) == (found is INTEL)
    assert count(fast_on_cpu(half), WinogradConv2d) == count(fast_on_cpu(half), ConvLinear) == 0


def test_the_connector_keeps_its_answer(on: Callable[[Found], None]) -> None:
    on(AMD)
    tsc, text, t = tiny_tsc(), features(7, 4), torch.tensor([10.0, 990.5])
    fast = fast_on_cpu(tsc)
    assert count(fast, ConvLinear) == count(tsc, nn.Linear) > 5
    assert relative(fast(text.tokens, t, text.mask), tsc(text.tokens, t, text.mask)) < 1e-5
    assert fast.state_dict().keys() == tsc.state_dict().keys()


@pytest.mark.parametrize("shape", [(12,), (1, 12), (5, 12), (2, 5, 12), (2, 1, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_by_convolution_is_the_linear_layer(shape: tuple[int, ...], bias: bool) -> None:
    linear = randomised(nn.Linear(12, 7, bias=bias), 0)
    x = noise(*shape)
    assert relative(by_convolution(x, linear.weight, linear.bias), linear(x)) < 1e-6
    assert relative(ConvLinear(linear)(x.flip(-1)), linear(x.flip(-1))) < 1e-6


@pytest.mark.parametrize("at_once", [1, 30, 100, 700, 10**9])  # a query at a time ... all heads together
@pytest.mark.parametrize("keys", [9, 13])
def test_attention_in_blocks_is_attention(at_once: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "AT_ONCE", at_once)
    q, k, v = noise(2, 9, 12, dtype=torch.float64), noise(2, keys, 12, seed=1).double(), noise(2, keys, 12).double()
    assert relative(attend_in_blocks(q, k, v, 3), attend(q, k, v, 3)) < 1e-14
    mask = torch.arange(keys) < torch.tensor([[4], [keys]])
    assert torch.equal(attend_in_blocks(q, k, v, 3, mask), attend(q, k, v, 3, mask))


def test_its_rounding_in_bf16_is_as_stated() -> None:
    q, k, v = (noise(1, 512, 80, seed=seed).bfloat16() for seed in (1, 2, 3))
    exact = attend(q.double(), k.double(), v.double(), 2)
    own, torchs = (float((f(q, k, v, 2) - exact).norm() / exact.norm()) for f in (attend_in_blocks, attend))
    assert torchs < own < 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_networks_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"float32 or bfloat16 on the CPU, got {dtype} on cpu"):
        fast_on_cpu(tiny_unet().to(dtype))


def test_a_pipeline_draws_the_same(on: Callable[[Found], None]) -> None:
    on(AMD)
    pipeline = Pipeline.miniature()
    fast = pipeline.fast_on_cpu()
    assert fast.tsc is not None and count(fast.tsc, ConvLinear) > 5 and isinstance(pipeline.unet, UNet)
    width = pipeline.unet.config.context_dim
    x, t, context = noise(2, 4, 8, 8), torch.tensor([900.5, 20.0]), noise(2, 5, width)
    assert relative(fast.unet(x, t, context), pipeline.unet(x, t, context)) < 2e-5
    assert fast.vae is pipeline.vae and fast.size == pipeline.size
