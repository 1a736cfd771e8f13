"""Reading a Stable Diffusion system: a single file, a diffusers folder, or its networks from files of their own.

The architecture is read off the tensors' shapes, and every tensor must be there, once, with its shape.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ella_kd.models.clip import CLIPTextEncoder
from ella_kd.models.devices import check_device, check_dtype
from ella_kd.models.files.building import build, check_dtypes, fill, refuse
from ella_kd.models.files.kinds import Kind, hint, kind_of_path
from ella_kd.models.files.layout import WORDS, Part, parts_of, parts_of_folder
from ella_kd.models.files.metadata import config_of
from ella_kd.models.files.schedule import Known, known_prediction, noise_schedule, warn_of_guess
from ella_kd.models.files.weights import Weights
from ella_kd.models.noise_schedule import EDMSchedule, NoiseSchedule, PredictionType
from ella_kd.models.shapes import count_of, shape_of
from ella_kd.models.tokenizers import check_vocabulary, load_tokenizer
from ella_kd.models.unet import UNet, UNetConfig
from ella_kd.models.vae import AutoencoderKL, VAEConfig

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase

File = str | Path
SCALES = {"sdxl": 0.13025, "refiner": 0.13025, "ssd-1b": 0.13025, "vega": 0.13025, "playground": 0.5}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The networks of one Stable Diffusion system, in eval mode and without gradients.

    text_model is None where no file holds one: ELLA needs none. kind, known: what it is, and how its prediction is
    known.
    """

    unet: UNet
    vae: AutoencoderKL
    text_model: "CLIPTextModel | None" = field(repr=False)
    noise_schedule: NoiseSchedule | EDMSchedule
    clip_tokenizer: "PreTrainedTokenizerBase | None" = field(default=None, repr=False)
    kind: Kind = field(default_factory=Kind)
    known: Known | None = field(default=None, repr=False)

    @property
    def text_encoder(self) -> CLIPTextEncoder:
        """CLIP, ready for prompts. Raises ValueError if the file was loaded without a tokenizer, which it lacks."""
        if self.text_model is None:
            raise ValueError("this checkpoint holds no text encoder: pass text_encoder=<file or folder>")
        if self.clip_tokenizer is None:
            raise ValueError("an LDM checkpoint holds no tokenizer: pass clip_tokenizer=<folder> to load_checkpoint, "
                             "such as the tokenizer folder of stable-diffusion-v1-5 (ELLA alone needs no CLIP)")
        return CLIPTextEncoder(self.text_model, self.clip_tokenizer)


def load_checkpoint(path: File, *, vae: File | None = None, text_encoder: File | None = None,
                    dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu",
                    clip_tokenizer: File | None = None, prediction: PredictionType | None = None, ema: bool = False,
                    variant: str | None = None) -> Checkpoint:
    """Read a system: a single file in LDM's layout, a diffusers folder, or a UNet alone with the rest beside it.

    vae, text_encoder: files or folders of one network, instead of those in `path`. dtype None: fp32 on a CPU, fp16
    elsewhere, whatever the file holds. clip_tokenizer: a tokenizer folder (a diffusers folder has its own).
    prediction: what the network returns, "eps" or "v"; None: as the file says (`models.files.schedule`), and a warning
    where nothing does. ema: the moving averages of the UNet's weights, in a file that has both. variant: of a folder's
    files, such as "fp16"; None: the plain ones, or what there is.
    Raises FileNotFoundError, or ValueError naming the first tensors that are missing, extra, misshapen or no finite
    floats, and saying what the file looks like if it is another kind and where it belongs.
    """
    device = check_device(device)
    dtype = check_dtype(dtype, device)
    path = Path(path)
    parts, others = parts_at(path, variant)
    kind = kind_of_path(path)
    told = f"{path} is not what this loads{hint(kind, 'checkpoint')}"
    if not kind.read:
        raise ValueError(f"{told}: expected a UNet, model.diffusion_model.input_blocks.0.0.weight and so on")
    weights = parts["unet"].weights
    refuse([f"unexpected: {name} {list(weights.shapes.get(name, ()))}" for name in others], told)
    parts |= {name: _alone(name, file) for name, file in (("vae", vae), ("text", text_encoder)) if file is not None}
    if ema:
        parts["unet"] = parts["unet"].averaged()
    if "vae" not in parts:
        raise ValueError(f"{path} is {kind.what}: give an autoencoder with vae=<file or folder>, --vae for the command")
    known = known_prediction(path, weights, parts["unet"], kind.family, kind.purpose, prediction)
    schedule = noise_schedule(path, weights, known, kind.family)
    models = {name: build(MAKERS[name], part, _told(part, told), kind) for name, part in parts.items()}
    for part in parts.values():
        check_dtypes(part)
    tokenizer = _tokenizer(path, clip_tokenizer)
    if tokenizer is not None and "text" in models:
        check_vocabulary(tokenizer, models["text"].config.vocab_size, "CLIP", clip_tokenizer or path)
    warn_of_guess(known, path)
    filled: dict[str, Any] = {name: fill(model, parts[name], _told(parts[name], told), dtype, device)
                              for name, model in models.items()}
    return Checkpoint(filled["unet"], filled["vae"], filled.get("text"), schedule, tokenizer, kind, known)


def unet_of(part: Part, kind: Kind) -> UNet:
    """A UNet of a file's shapes; the heads are in our metadata or in diffusers' configuration, else the family's."""
    own = config_of(part.weights)
    heads = {key: own[key] for key in ("num_heads", "head_dim") if key in own} or _heads(part)
    return UNet(UNetConfig.from_shapes(part.shapes, **heads))


def vae_of(part: Part, kind: Kind) -> AutoencoderKL:
    """An autoencoder of a file's shapes; its scale is in our metadata or in diffusers' configuration, else the UNet's
    family's."""
    usual = SCALES.get(kind.family, VAEConfig.scale)
    scale = config_of(part.weights).get("scale", part.config.get("scaling_factor", usual))
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise ValueError(f"scaling_factor in config.json must be a number above 0, got {scale!r}")
    return AutoencoderKL(VAEConfig.from_shapes(part.shapes, scale))


def text_of(part: Part, kind: Kind) -> "CLIPTextModel":
    """A CLIP text model of a file's shapes, with heads of 64 channels; quick_gelu, unless it is OpenCLIP's."""
    from transformers import CLIPTextConfig, CLIPTextModel

    shapes = part.shapes
    vocabulary, width = shape_of(shapes, "embeddings.token_embedding.weight", 2)
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, projection_dim=width,
        num_attention_heads=part.config.get("num_attention_heads", max(width // 64, 1)),
        intermediate_size=shape_of(shapes, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=count_of(shapes, "encoder.layers"),
        max_position_embeddings=shape_of(shapes, "embeddings.position_embedding.weight", 2)[0],
        hidden_act=part.config.get("hidden_act", "gelu" if part.spelling == "openclip" else "quick_gelu"),
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=0))


MAKERS: dict[str, Callable[[Part, Kind], Any]] = {"unet": unet_of, "vae": vae_of, "text": text_of, "text_2": text_of}


def parts_at(path: Path, variant: str | None = None) -> tuple[dict[str, Part], list[str]]:
    """The networks in a file or a folder, and the names of tensors that belong to none."""
    return parts_of_folder(path, variant) if path.is_dir() else parts_of(Weights(path))


def _alone(name: str, file: File) -> Part:
    """The one network of a file or a folder. Raises ValueError saying what it is, if it is another."""
    path = Path(file)
    parts, _ = parts_at(path)
    if list(parts) != [name]:
        raise ValueError(f"{path} is not the {WORDS[name]} that was asked for{hint(kind_of_path(path))}")
    return parts[name]


def _told(part: Part, told: str) -> str:
    return told if told.startswith(f"{part.weights.path} ") else f"{part.weights.path} is not what this loads"


def _heads(part: Part) -> dict[str, int]:
    """num_heads or head_dim by diffusers' configuration, whose attention_head_dim is the number of heads."""
    heads = part.config.get("num_attention_heads") or part.config.get("attention_head_dim")
    widths = part.config.get("block_out_channels")
    if not heads:
        return {}
    if type(heads) is int:
        return {"num_heads": heads}
    if isinstance(heads, list) and isinstance(widths, list) and len(heads) == len(widths) and all(
            type(n) is int and n > 0 for n in [*heads, *widths]):
        if len(set(heads)) == 1:
            return {"num_heads": heads[0]}
        sizes = {width // n for n, width in zip(heads, widths)}
        if len(sizes) == 1:
            return {"head_dim": sizes.pop()}
    raise ValueError(f"attention_head_dim in config.json must be a whole number, or one for each level, got {heads!r}")


def _tokenizer(path: Path, folder: File | None) -> "PreTrainedTokenizerBase | None":
    own = path / "tokenizer"
    if folder is None and not own.is_dir():
        return None
    return load_tokenizer(own if folder is None else folder, "CLIP")
