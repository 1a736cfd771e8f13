"""denoiser.compile() compiles once; what a plan saves the connector; both change no picture."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ella_kd import ELLA, CFGDenoiser, Constant, ELLADenoiser, LDMDenoiser
from ella_kd.models import TextFeatures, UNet, UNetConfig
from ella_kd.samplers import sample_dpmpp_2m, sample_euler_ancestral
from tiny import PointwiseTSC, PointwiseUNet, features, noise, randomised, relative, tiny_tsc


def small_unet() -> UNet:
    return randomised(UNet(UNetConfig(4, 4, 32, (1,), 1, (True,), 24, 2)), 0, 0.1)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def draw(denoiser: CFGDenoiser, cond: TextFeatures, steps: int = 3, seed: int = 0, scale: float = 5.0,
         sampler: object = sample_dpmpp_2m) -> Tensor:
    sigmas = denoiser.get_sigmas(steps)
    x = noise(2, 4, 8, 8, seed=seed) * sigmas[0]
    args = {"cond": cond, "uncond": features(1, seed=9), "cond_scale": scale}
    return sampler(denoiser, x, sigmas, extra_args=args, disable=True, seeds=[1, 2])  # type: ignore[operator]


RUNS = [  # prompt, steps, seed, scale, sampler
    (features(7), 3, 0, 5.0, sample_dpmpp_2m),
    (features(4, seed=5), 3, 0, 5.0, sample_dpmpp_2m),
    (features(7, 3), 3, 0, 5.0, sample_dpmpp_2m),
    (features(7), 5, 0, 5.0, sample_dpmpp_2m),
    (features(7), 3, 1, 5.0, sample_dpmpp_2m),
    (features(7), 3, 0, 7.5, sample_dpmpp_2m),
    (features(7), 3, 0, 5.0, sample_euler_ancestral),
]


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_compilation_serves_every_prompt_seed_scale_step_count_and_sampler() -> None:
    denoiser = CFGDenoiser(ELLADenoiser(small_unet(), tiny_tsc()))
    before = [draw(denoiser, *run) for run in RUNS]
    denoiser.compile(backend="eager")
    after = [draw(denoiser, *run) for run in RUNS]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"] and not counters["graph_break"]
    for a, b in zip(before, after, strict=True):
        assert relative(a, b) < 1e-6
    assert set(denoiser.inner_model.inner_model.state_dict()) == set(small_unet().state_dict())


@pytest.mark.usefixtures("fresh_dynamo")
def test_another_shape_is_compiled_once_more_and_no_scale_is_the_same_network() -> None:
    denoiser = LDMDenoiser(small_unet())
    x, sigma, cond = noise(2, 4, 8, 8), torch.tensor([3.0, 0.5]), noise(1, 5, 24)
    want = denoiser(x, sigma, cond=cond)
    denoiser.compile(backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert relative(denoiser(x, sigma, cond=cond), want) < 1e-6
            assert relative(denoiser(x[:1], sigma[:1], cond=cond), want[:1]) < 1e-6
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(("device", "options", "expected"), [
    ("cpu", {}, {"dynamic": False}),
    ("cpu", {"backend": "eager", "dynamic": True}, {"backend": "eager", "dynamic": True}),
    ("cuda", {}, {"dynamic": False, "mode": "reduce-overhead"}),
    ("cuda", {"mode": "default"}, {"dynamic": False, "mode": "default"}),
    ("cuda", {"options": {"a": 1}}, {"dynamic": False, "options": {"a": 1}}),  # torch.compile takes one of them
])
def test_what_is_told_to_torch_compile(device: str, options: dict[str, Any], expected: dict[str, Any]) -> None:
    told = []

    class Net(nn.Module):
        def parameters(self, recurse: bool = True) -> Any:
            return iter([SimpleNamespace(device=torch.device(device))])

        def compile(self, **chosen: Any) -> None:
            told.append(chosen)

    CFGDenoiser(LDMDenoiser(Net())).compile(**options)
    assert told == [expected]


def test_a_run_asks_the_connector_once_however_many_pictures_it_draws() -> None:
    for lengths, prompt, prompts in (((7,), [0], 2), ((7,), [0] * 8, 2), ((3, 9, 4), [0, 1, 2, 1], 4)):
        tsc = PointwiseTSC()
        denoiser = CFGDenoiser(ELLADenoiser(PointwiseUNet(), tsc))  # type: ignore[arg-type]
        sigmas = denoiser.get_sigmas(4)
        cond = ELLA(tsc, features(*lengths), torch.tensor(prompt))  # type: ignore[arg-type]
        sample_dpmpp_2m(denoiser, noise(len(prompt), 4, 8, 8) * sigmas[0], sigmas, disable=True, extra_args={
            "cond": cond, "uncond": features(1, seed=9), "cond_scale": 5.0})
        assert tsc.calls == [prompts * 4]


def test_a_constant_condition_asks_no_connector() -> None:
    denoiser = CFGDenoiser(LDMDenoiser(small_unet()))
    sigmas = denoiser.get_sigmas(2)
    args = {"cond": Constant(TextFeatures(noise(1, 5, 24))), "uncond": noise(1, 5, 24, seed=3), "cond_scale": 5.0}
    x = sample_dpmpp_2m(denoiser, noise(1, 4, 8, 8) * sigmas[0], sigmas, extra_args=args, disable=True)
    assert x.isfinite().all()
