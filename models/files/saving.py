"""Writing a system: an LDM single file, or a diffusers folder. What appears is whole, or nothing does."""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ella_kd.files import writing_folder
from ella_kd.models.files.building import plain
from ella_kd.models.files.checkpoint import Checkpoint
from ella_kd.models.files.configs import (
    model_index,
    scheduler_config,
    unet_config,
    vae_config,
)
from ella_kd.models.files.kinds import Kind, family_of, purpose_of
from ella_kd.models.files.layout import CLIP, FIRST, FIRST_OPEN, OPEN, SECOND, TABLE, UNET, VAE
from ella_kd.models.files.metadata import CONFIG
from ella_kd.models.files.names import LCM, to_open_clip, unet_to_diffusers, vae_to_diffusers
from ella_kd.models.files.schedule import PREDICT_KEY, PREDICTION
from ella_kd.models.files.weights import write_tensors
from ella_kd.models.noise_schedule import EDMSchedule, NoiseSchedule
from ella_kd.models.unet import UNet
from ella_kd.models.vae import AutoencoderKL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ella_kd.models.files.checkpoint import TextModel

ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512",  # ModelSpec's words
                 "refiner": "stable-diffusion-xl-v1-refiner", "sdxl": "stable-diffusion-xl-v1-base",
                 "playground": "stable-diffusion-xl-v1-base"}
SHORT = {"inpainting": "-inpainting", "depth": "-depth"}


def save_checkpoint(path: str | Path, unet: UNet, vae: AutoencoderKL, text_model: "TextModel | None" = None,
                    metadata: Mapping[str, str] | None = None, *, text_model_2: "TextModel | None" = None,
                    noise_schedule: NoiseSchedule | EDMSchedule | None = None,
                    dtype: torch.dtype | None = None) -> None:
    """Write a single file in LDM's layout as `load_checkpoint` reads it; what shapes do not say is metadata.

    text_model: CLIP, or OpenCLIP's for Stable Diffusion 2.x; text_model_2: SDXL's second. dtype None: the parameters'
    own. The file appears whole or not at all.
    """
    schedule = noise_schedule or NoiseSchedule.sd15()
    kind = kind_of_networks(unet, vae)
    tensors = {UNET + name: x for name, x in unet.state_dict().items()}
    for ours, theirs in {name: name.replace(ldm, other) for name in tensors for other, ldm in LCM.items()
                         if ldm in name}.items():
        tensors[theirs] = tensors.pop(ours)
    tensors |= {VAE + name: x for name, x in vae.state_dict().items()}
    if text_model is not None:
        tensors |= _text(text_model, kind.family, first=True)
    if text_model_2 is not None:
        tensors |= _text(text_model_2, kind.family, first=False)
    tensors = cast(tensors, dtype) | _markers(schedule, vae)
    own: dict[str, Any] = {"num_heads": unet.config.num_heads, "head_dim": unet.config.head_dim,
                           "scale": vae.config.scale, "mean": vae.config.mean, "std": vae.config.std}
    write_tensors(path, tensors, {**_model_spec(kind, schedule), CONFIG: json.dumps(own), **(metadata or {})})


def save(path: str | Path, checkpoint: Checkpoint, metadata: Mapping[str, str] | None = None, *,
         dtype: torch.dtype | None = None) -> None:
    """`path.safetensors`: a single file in LDM's layout; any other path: a diffusers folder."""
    if not is_folder(path):
        save_checkpoint(path, checkpoint.unet, checkpoint.vae, checkpoint.text_model, metadata, dtype=dtype,
                        text_model_2=checkpoint.text_model_2, noise_schedule=checkpoint.noise_schedule)
    else:
        side = (metadata or {}).get("modelspec.resolution", "").partition("x")[0]
        save_folder(path, checkpoint, dtype=dtype, size=int(side) if side.isdecimal() else None)


def is_folder(path: str | Path) -> bool:
    """Whether a system is written there as a folder. Raises ValueError for what looks like a file of another kind."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return False
    if re.fullmatch(r"\.[A-Za-z]+", path.suffix) and not path.is_dir():
        raise ValueError(f"a single file is written as .safetensors, got {path}; a folder of that name must be there")
    return True


def save_folder(path: str | Path, checkpoint: Checkpoint, *, dtype: torch.dtype | None = None,
                size: int | None = None) -> None:
    """Write a diffusers folder that `from_pretrained` loads: weights, configurations, scheduler, and the tokenizers if
    the checkpoint has them. The folder appears whole or not at all; one that is there must be empty.

    size: the side in pixels of the pictures it was trained on; None: what is usual (`Kind.size`).

    Raises ValueError for a network that diffusers has no configuration for.
    """
    unet, vae = checkpoint.unet, checkpoint.vae
    kind = kind_of_networks(unet, vae)
    texts: dict[str, Any] = {"text_encoder": checkpoint.text_model, "text_encoder_2": checkpoint.text_model_2}
    tokenizers: dict[str, Any] = {"tokenizer": checkpoint.clip_tokenizer,
                                  "tokenizer_2": checkpoint.clip_tokenizer_2 or checkpoint.clip_tokenizer}
    if kind.family == "refiner":
        texts = {"text_encoder": None, "text_encoder_2": checkpoint.text_model}
        tokenizers["tokenizer"] = None
    if texts["text_encoder_2"] is None:
        tokenizers["tokenizer_2"] = None
    length = next((model.config.max_position_embeddings for model in texts.values() if model is not None), 77)
    schedule = scheduler_config(checkpoint.noise_schedule)
    size = size or kind.size(checkpoint.noise_schedule.prediction)
    names = unet_to_diffusers(unet.state_dict())
    vae_names = vae_to_diffusers(vae.state_dict())
    with writing_folder(path) as folder:
        _network(folder / "unet", unet_config(unet.config, kind, size // vae.factor),
                 cast({names[name]: x for name, x in unet.state_dict().items()}, dtype))
        _network(folder / "vae", vae_config(vae.config, kind, size), cast(
            {vae_names[name]: x[..., 0, 0] if ".mid.attn_1." in name and x.ndim == 4 else x
             for name, x in vae.state_dict().items()}, dtype))
        for name, model in texts.items():
            if model is not None:
                (folder / name).mkdir()
                model.config.save_pretrained(folder / name)
                tensors = {("" if key.startswith("text_projection.") else "text_model.") + key: x
                           for key, x in text_tensors(model).items()}
                write_tensors(folder / name / "model.safetensors", cast(tensors, dtype), {"format": "pt"})
        for name, tokenizer in tokenizers.items():
            if tokenizer is not None:
                zeros = kind.family in ("sd2", "refiner") or name == "tokenizer_2"
                published(tokenizer, zeros, length).save_pretrained(folder / name)
        _json(folder / "scheduler", "scheduler_config.json", schedule)
        (folder / "model_index.json").write_text(json.dumps(
            model_index(kind, schedule, texts, tokenizers), indent=2) + "\n", encoding="utf-8")


def published(tokenizer: "PreTrainedTokenizerBase", zeros: bool, length: int) -> "PreTrainedTokenizerBase":
    """A copy that pads as diffusers has to: to the model's length, OpenCLIP's with zeros, which is "!"."""
    found = copy.deepcopy(tokenizer)
    found.model_max_length = length
    if zeros and found.get_vocab().get("!") == 0:
        found.pad_token = "!"
    return found


def kind_of_networks(unet: UNet, vae: AutoencoderKL) -> Kind:
    """The family and purpose of networks in memory."""
    shapes = {name: tuple(x.shape) for name, x in unet.state_dict().items()}
    markers = ["edm_mean"] if vae.config.mean and vae.config.std else []  # a shift alone is no Playground's
    return Kind(family=family_of(shapes, markers), purpose=purpose_of(shapes))


def text_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A text encoder's tensors under plain names, without buffers."""
    return {plain(name): x for name, x in model.state_dict().items() if not name.endswith("position_ids")}


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {name: x if dtype is None or not x.is_floating_point() else x.to(dtype) for name, x in tensors.items()}


def _text(model: nn.Module, family: str, first: bool) -> dict[str, Tensor]:
    """One text encoder in LDM's layout: CLIP in HF's spelling, OpenCLIP in its own."""
    tensors = text_tensors(model)
    if family == "sd1" or (first and family not in ("sd2", "refiner")):
        prefix = CLIP if family == "sd1" else FIRST
        return {f"{prefix}text_model.{name}": x for name, x in tensors.items()}
    prefix = OPEN if family == "sd2" else FIRST_OPEN if family == "refiner" else SECOND
    return {prefix + name: x for name, x in to_open_clip(tensors).items()}


def _markers(schedule: NoiseSchedule | EDMSchedule, vae: AutoencoderKL) -> dict[str, Tensor]:
    """The schedule as files keep it: a table, and the tensors whose presence says what no table does."""
    found: dict[str, Tensor] = {}
    if isinstance(schedule, NoiseSchedule):
        found[TABLE] = schedule.alphas_cumprod.float()
        if schedule.prediction == "v":
            found["v_pred"] = torch.tensor([])
        if float(schedule.alphas_cumprod[-1]) < 1e-6:
            found["ztsnr"] = torch.tensor([])
    elif schedule.prediction == "v":
        found = {"edm_vpred.sigma_max": torch.tensor(schedule.sigma_max),
                 "edm_vpred.sigma_min": torch.tensor(schedule.sigma_min)}
    if vae.config.mean and vae.config.std:
        found |= {"edm_mean": torch.tensor(vae.config.mean).view(1, -1, 1, 1),
                  "edm_std": torch.tensor(vae.config.std).view(1, -1, 1, 1)}
    return found


def _model_spec(kind: Kind, schedule: NoiseSchedule | EDMSchedule) -> dict[str, str]:
    said = {"eps": "epsilon", "v": "v"}.get(schedule.prediction)
    architecture = ARCHITECTURES.get(kind.family, kind.family)
    if kind.family == "sd2" and said == "v":
        architecture = "stable-diffusion-v2-768-v"
    if kind.purpose in SHORT:
        architecture = architecture.removesuffix("-512") + SHORT[kind.purpose]
    told = {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": architecture,
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models"}
    return told | ({PREDICTION: said, PREDICT_KEY: said} if said else {})


def _network(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    _json(folder, "config.json", config)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})


def _json(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    folder.mkdir()
    (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
