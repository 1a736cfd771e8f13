"""A loaded diffusers pipeline's networks as ours, on the same tensors."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ella_kd.models.files.building import build, check_dtypes, fill
from ella_kd.models.files.checkpoint import MAKERS, Checkpoint
from ella_kd.models.files.kinds import kind_of_parts
from ella_kd.models.files.layout import READ, WORDS, Part
from ella_kd.models.files.schedule import known_prediction, noise_schedule
from ella_kd.models.files.weights import Weights


def from_modules(pipe: Any) -> Checkpoint:
    """The networks of a diffusers pipeline. Raises TypeError and ValueError as `Pipeline.from_diffusers` says."""
    modules: dict[str, Any] = {"unet": getattr(pipe, "unet", None), "vae": getattr(pipe, "vae", None)}
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected a diffusers pipeline with a {name}, such as StableDiffusionPipeline, got "
                            f"{type(pipe).__name__} whose {name} is {type(module).__name__}")
    parts = {name: _part(name, module) for name, module in modules.items()}
    kind = kind_of_parts(parts, parts["unet"].weights)
    told = f"the {type(pipe).__name__} is not what this takes"
    if not kind.read:
        raise ValueError(f"{told}: {kind.what or 'its UNet is none of Stable Diffusion'}")
    scheduler = {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
    known = known_prediction(Path(), parts["unet"].weights, parts["unet"], kind.family, kind.purpose,
                             scheduler=scheduler)
    schedule = noise_schedule(Path(), parts["unet"].weights, known, kind, scheduler)
    made = {name: _filled(part, told, kind) for name, part in parts.items()}
    texts = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    if texts[0] is None:  # SDXL's refiner has its only one in the second place
        texts.reverse()
        tokenizers.reverse()
    return Checkpoint(made["unet"], made["vae"], texts[0], schedule, tokenizers[0], texts[1], tokenizers[1], kind,
                      known)


def _part(name: str, module: nn.Module) -> Part:
    tensors = module.state_dict()
    if any(x.is_meta for x in tensors.values()):
        raise ValueError(f"the pipeline's {WORDS[name]} is offloaded: load it without offloading")
    if any("lora_" in each or ".base_layer." in each for each in tensors):
        raise ValueError(f"the pipeline's {WORDS[name]} has a LoRA beside its weights: pipe.fuse_lora() and "
                         "pipe.unload_lora_weights() first")
    weights = Weights.of(tensors, f"the pipeline's {WORDS[name]}")
    config: Any = module.config
    return Part(name, weights, READ[name](weights.shapes), "", dict(config))


def _filled(part: Part, told: str, kind: Any) -> Any:
    check_dtypes(part)
    first = next(iter(part.weights.values()))
    return fill(build(MAKERS[part.name], part, told, kind), part, told, first.dtype, torch.device(first.device))
