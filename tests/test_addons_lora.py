"""LoRA files of every spelling and kind, merged: diffusers, PEFT and LyCORIS are the judges."""

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from lycoris import functional
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ella_kd import Pipeline
from ella_kd.models import UNet, UNetConfig
from ella_kd.models.addons.lora import LoRA, with_lora
from ella_kd.models.addons.lora.names import Dictionary, modules_of
from ella_kd.models.clip import clip_text_model
from ella_kd.models.files.names import unet_to_diffusers
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


def assert_agree(ours: nn.Module, theirs: Tensors, plain: nn.Module, atleast: int = 1) -> None:
    """Every tensor agrees, and as many as they must have changed from the plain network's."""
    mine, before = weights(ours), weights(plain)
    assert mine.keys() == theirs.keys()
    assert sum(not torch.equal(mine[name], before[name]) for name in mine) >= atleast
    for name in mine:
        assert relative(mine[name], theirs[name]) < 1e-5, name


def sd1_pipe() -> Any:
    """A pipeline of diffusers of Stable Diffusion 1.x's make."""
    sd = family("sd2")
    unet = randomised(UNet(UNetConfig(4, 4, 32, (1, 2, 2), 1, (1, 1, 0), 64, 2)), 4, 0.1)
    from benchmarks.speed.ways import as_diffusers
    pipe = sd.theirs(diffusers.StableDiffusionPipeline, text_encoder=sd.texts[0], tokenizer=byte_tokenizer(),
                     safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.unet = as_diffusers(unet)
    return pipe


@pytest.fixture
def pipe() -> Any:
    import copy
    return copy.deepcopy(sd1_pipe())


SPELLINGS: dict[str, Callable[[str, str, str], str]] = {  # the part, the module's path, the tensor -> its name
    "kohya": lambda part, module, end: f"lora_{'unet' if part == 'unet' else 'te'}_{module.replace('.', '_')}.{end}",
    "peft": lambda part, module, end: f"{part}.{module}." + {
        "lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "alpha"}[end],
    "diffusers": lambda part, module, end: f"{part}.{module}." + {
        "lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight", "alpha": "alpha"}[end],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_layer_equals_diffusers(pipe: Any, spelling: str) -> None:
    """LoRA and LoCon on every linear layer and convolution of UNet and text encoder, fused by diffusers."""
    ours = Pipeline.from_diffusers(pipe)
    tensors: Tensors = {}
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
    assert_agree(twin.unet, weights(theirs.unet), ours.unet, len(list(layers(ours.unet))))
    assert ours.clip and twin.clip and theirs.clip
    assert_agree(twin.clip.model, weights(theirs.clip.model), ours.clip.model, len(list(layers(ours.clip.model))))
