"""LoRA files of every spelling and kind, merged: diffusers, PEFT and LyCORIS are the judges."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.speed.ways import as_diffusers
from ella_kd import Pipeline
from ella_kd.models import UNet, UNetConfig
from ella_kd.models.addons.lora import LoRA, with_lora
from ella_kd.models.addons.lora.merging import _added
from ella_kd.models.files.kinds import kind_of, kind_of_path
from ella_kd.models.files.weights import Weights
from families import byte_tokenizer, family
from tiny import randomised, relative, tiny_unet

Tensors = dict[str, Tensor]


def random(*shape: int, seed: int = 0, std: float = 0.1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield name, layer


def factors(layer: Any, seed: int, rank: int = 3) -> dict[str, Tensor]:
    """kohya's down and up of a layer."""
    out, into, *kernel = layer.weight.shape
    ones = (1,) * len(kernel)
    return {"lora_down.weight": random(rank, into, *kernel, seed=seed),
            "lora_up.weight": random(out, rank, *ones, seed=seed + 1), "alpha": torch.tensor(2.0)}


def weights(network: nn.Module) -> Tensors:
    return {name: x.clone() for name, x in network.state_dict().items()}


def assert_agree(ours: nn.Module, theirs: Tensors, before: Tensors, atleast: int = 1) -> None:
    """Every tensor agrees, and as many as they must have changed from the plain network's."""
    mine = weights(ours)
    assert mine.keys() == theirs.keys()
    assert sum(not torch.equal(mine[name], before[name]) for name in mine) >= atleast
    for name in mine:
        assert relative(mine[name], theirs[name]) < 1e-5, name


def sd1_pipe() -> Any:
    """A pipeline of diffusers of Stable Diffusion 1.x's make, to be changed."""
    sd = copy.deepcopy(family("sd2"))
    unet = randomised(UNet(UNetConfig(4, 4, 32, (1, 2, 2), 1, (1, 1, 0), 64, 2)), 4, 0.1)
    pipe = sd.theirs(diffusers.StableDiffusionPipeline, text_encoder=sd.texts[0], tokenizer=byte_tokenizer(),
                     safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.unet = as_diffusers(unet)
    return pipe


SPELLINGS: dict[str, Callable[[str, str, str], str]] = {  # the part, the module's path, the tensor -> its name
    "kohya": lambda part, module, end: f"lora_{'unet' if part == 'unet' else 'te'}_{module.replace('.', '_')}.{end}",
    "peft": lambda part, module, end: f"{part}.{module}." + {
        "lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "alpha"}[end],
    "diffusers": lambda part, module, end: f"{part}.{module}." + {
        "lora_down.weight": f"lora{'' if part == 'unet' else '_linear_layer'}.down.weight",
        "lora_up.weight": f"lora{'' if part == 'unet' else '_linear_layer'}.up.weight", "alpha": "alpha"}[end],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_layer_equals_diffusers(spelling: str) -> None:
    """LoRA and LoCon on every linear layer and convolution of UNet and text encoder, fused by diffusers."""
    pipe = sd1_pipe()
    ours = Pipeline.from_diffusers(pipe)
    assert ours.clip
    before, tensors = (weights(ours.unet), weights(ours.clip.model)), Tensors()
    for part, network in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        for i, (name, layer) in enumerate(layers(network)):
            module = name if part == "unet" else f"text_model.{name}"
            tensors |= {SPELLINGS[spelling](part, module, end): x for end, x in factors(layer, 10 * i).items()
                        if spelling == "kohya" or end != "alpha"}
    twin = with_lora(ours, (LoRA.of(tensors), 0.7))
    pipe.load_lora_weights(dict(tensors))
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    theirs = Pipeline.from_diffusers(pipe)
    assert twin.clip and theirs.clip
    for mine, judge, plain in zip((twin.unet, twin.clip.model), (theirs.unet, theirs.clip.model), before):
        assert_agree(mine, weights(judge), plain, len(list(layers(mine))))


LYCORIS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (LoConModule, {}), "Tucker": (LoConModule, {"use_tucker": True}),
    "DoRA": (LoConModule, {"weight_decompose": True}),
    "DoRA by input": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "rank-stabilised": (LoConModule, {"rs_lora": True}),
    "LoHa": (LohaModule, {}), "LoHa Tucker": (LohaModule, {"use_tucker": True}),
    "LoHa DoRA": (LohaModule, {"weight_decompose": True}),
    "LoKr": (LokrModule, {"factor": 4}), "LoKr whole": (LokrModule, {"factor": 4, "full_matrix": True}),
    "LoKr both": (LokrModule, {"factor": 8, "decompose_both": True, "lora_dim": 2}),
    "LoKr Tucker": (LokrModule, {"factor": 2, "use_tucker": True, "lora_dim": 2}),
    "OFT": (DiagOFTModule, {}), "OFT bound": (DiagOFTModule, {"constraint": 0.02, "rescaled": True}),
    "BOFT": (ButterflyOFTModule, {}), "BOFT bound": (ButterflyOFTModule, {"constraint": 0.02, "rescaled": True}),
    "IA3": (IA3Module, {}), "IA3 by input": (IA3Module, {"train_on_input": True}),
    "GLoRA": (GLoRAModule, {}), "full": (FullModule, {}), "norm": (NormModule, {}),
}


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 32), lambda: nn.Conv2d(24, 32, 3, padding=1, bias=False),
                                  lambda: nn.Conv2d(24, 32, 1), lambda: nn.GroupNorm(8, 24)],
                         ids=["linear", "3x3", "1x1", "norm"])
@pytest.mark.parametrize("kind", LYCORIS)
def test_every_kind_equals_lycoris(kind: str, make: Callable[[], Any]) -> None:
    """What a layer answers, after the tensors of LyCORIS' module have been through a file's names."""
    layer = randomised(make(), 0)
    if (kind == "norm") != isinstance(layer, nn.GroupNorm):
        return
    of, options = LYCORIS[kind]
    x = random(2, 24, *(() if isinstance(layer, nn.Linear) else (6, 6)), seed=9, std=1.0)
    before, plain = layer(x), weights(layer)
    args = {"lora_dim": 4, "alpha": 3, **options} if kind != "norm" else {}
    theirs = of("x", layer, 1.0, **args)
    for i, parameter in enumerate(theirs.parameters()):
        if not any(parameter is own for own in layer.parameters()):
            parameter.add_(random(*parameter.shape, seed=20 + i, std=0.3))
    theirs.apply_to()  # LyCORIS' full difference knows itself only then
    state = {f"lora_unet_x.{name}": value.clone() for name, value in theirs.state_dict().items()}
    want = layer(x)
    assert kind_of(Weights.of(state, "x")).place == "lora"
    fresh = make()
    fresh.load_state_dict(plain)
    added = _added(LoRA.of(state).changes["lora_unet_x"], [fresh])
    fresh.load_state_dict({name: value + added.get(name, 0) for name, value in plain.items()})
    assert relative(want, before) > 1e-2, "the judge has changed something"
    assert relative(fresh(x), want) < 1e-5


PEFT: dict[str, Any] = {
    "LoHa": LoHaConfig(r=4, alpha=8, use_effective_conv2d=True), "LoKr": LoKrConfig(r=2, alpha=3, decompose_factor=4),
    "LoKr whole": LoKrConfig(r=16, alpha=8, decompose_factor=4), "LoRA": LoraConfig(r=4, lora_alpha=2),
    "rsLoRA": LoraConfig(r=4, lora_alpha=2, use_rslora=True), "DoRA": LoraConfig(r=4, lora_alpha=2, use_dora=True),
    "by module": LoraConfig(r=4, lora_alpha=2, alpha_pattern={"to_k": 7}, rank_pattern={"to_k": 2}),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", PEFT)
def test_what_peft_trains_and_saves(kind: str, tmp_path: Path) -> None:
    """Its own folder, configuration and merged weights, of attention, a convolution of 3x3 and one of 1x1."""
    unet = tiny_unet()
    before = weights(unet)
    config = copy.deepcopy(PEFT[kind])
    config.target_modules = ["to_q", "to_k", "out_layers.3", "proj_in"]
    model = get_peft_model(copy.deepcopy(unet), config)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad and "magnitude" not in name:
            parameter.add_(random(*parameter.shape, seed=i, std=0.1))
        elif parameter.requires_grad:
            parameter.mul_(1 + random(*parameter.shape, seed=i).abs())
    model.save_pretrained(str(tmp_path))
    lora = LoRA.load(tmp_path)
    assert kind_of_path(tmp_path / "adapter_model.safetensors").place == "lora"
    assert lora.modules["unet"] == sum(name.endswith(("to_q", "to_k", "out_layers.3", "proj_in"))
                                       for name, _ in layers(unet))
    theirs = weights(model.merge_and_unload())
    assert_agree(with_lora(unet, lora), theirs, before, lora.modules["unet"])
    if kind != "LoKr whole":
        assert lora.kinds == (("DoRA" if kind == "DoRA" else kind.removeprefix("rs").replace("by module", "LoRA")),)
