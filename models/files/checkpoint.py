"""Reading a Stable Diffusion system: a single file, a diffusers folder, or its networks from files of their own.

The architecture is read off the tensors' shapes, and every tensor must be there, once, with its shape.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ella_kd.models.clip import CLIPTextEncoder, TwoTextEncoders, clip_text_model
from ella_kd.models.devices import check_device, check_dtype
from ella_kd.models.files.building import build, check_dtypes, fill, refuse
from ella_kd.models.files.kinds import RELIT, Kind, hint, kind_of, kind_of_path
from ella_kd.models.files.layout import WORDS, Part, parts_of, parts_of_folder
from ella_kd.models.files.metadata import config_of
from ella_kd.models.files.offsets import added
from ella_kd.models.files.schedule import Known, known_prediction, noise_schedule, warn_of_guess
from ella_kd.models.files.weights import Weights
from ella_kd.models.noise_schedule import EDMSchedule, NoiseSchedule, PredictionType
from ella_kd.models.tokenizers import check_vocabulary, load_tokenizer
from ella_kd.models.unet import UNet, UNetConfig
from ella_kd.models.vae import AutoencoderKL, VAEConfig

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

    TextModel = CLIPTextModel | CLIPTextModelWithProjection

File = str | Path
SCALES = {"sdxl": 0.13025, "refiner": 0.13025, "ssd-1b": 0.13025, "vega": 0.13025, "playground": 0.5}
UPSCALER = 0.08333
PLAYGROUND_MEAN, PLAYGROUND_STD = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)
PAIRS = ("sdxl", "ssd-1b", "vega", "playground")  # families with two text encoders


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The networks of one Stable Diffusion system, in eval mode and without gradients.

    text_model is CLIP, or OpenCLIP in Stable Diffusion 2.x and SDXL's refiner, text_model_2 SDXL's second encoder; None
    where no file holds one: ELLA needs none but on SDXL. kind, known: what it is, and how its prediction is known.
    """

    unet: UNet
    vae: AutoencoderKL
    text_model: "TextModel | None" = field(repr=False)
    noise_schedule: NoiseSchedule | EDMSchedule
    clip_tokenizer: "PreTrainedTokenizerBase | None" = field(default=None, repr=False)
    text_model_2: "TextModel | None" = field(default=None, repr=False)
    clip_tokenizer_2: "PreTrainedTokenizerBase | None" = field(default=None, repr=False)
    kind: Kind = field(default_factory=Kind)
    known: Known | None = field(default=None, repr=False)

    @property
    def text_encoder(self) -> "CLIPTextEncoder | TwoTextEncoders":
        """CLIP as the family uses it, ready for prompts. Raises ValueError for what the files lacked: the text encoder,
        or the tokenizer, which no single file has."""
        model: Any = self.text_model
        two = self.kind.family in PAIRS
        if model is None or (two and self.text_model_2 is None):
            raise ValueError("this checkpoint holds no text encoder: pass text_encoder=<file or folder>" if not two else
                             "this checkpoint lacks one of SDXL's two text encoders")
        if self.clip_tokenizer is None:
            raise ValueError("an LDM checkpoint holds no tokenizer: pass clip_tokenizer=<folder> to load_checkpoint, "
                             "such as the tokenizer folder of stable-diffusion-v1-5 (ELLA alone needs no CLIP)")
        if two:
            second: Any = self.text_model_2
            return TwoTextEncoders.sdxl(model, second, self.clip_tokenizer, self.clip_tokenizer_2)
        makers: dict[str, Callable[..., CLIPTextEncoder]] = {"sd2": CLIPTextEncoder.sd2,
                                                             "refiner": CLIPTextEncoder.big_g}
        make = makers.get(self.kind.family, CLIPTextEncoder)
        return make(model, self.clip_tokenizer)


def load_checkpoint(path: File, *, vae: File | None = None, text_encoder: File | None = None,
                    text_encoder_2: File | None = None, dtype: str | torch.dtype | None = None,
                    device: str | torch.device = "cpu", clip_tokenizer: File | None = None,
                    prediction: PredictionType | None = None, ema: bool = False, variant: str | None = None,
                    vae_dtype: Callable[[str], torch.dtype] | None = None, offset: File | None = None) -> Checkpoint:
    """Read a system: a single file in LDM's layout, a diffusers folder, or a UNet alone with the rest beside it.

    vae, text_encoder, text_encoder_2: files or folders of one network, instead of those in `path`. dtype None: fp32 on
    a CPU, fp16 elsewhere, whatever the file holds. clip_tokenizer: a tokenizer folder (a diffusers folder has its own).
    prediction: what the network returns, "eps" or "v"; None: as the file says (`models.files.schedule`), and a warning
    where nothing does. ema: the moving averages of the UNet's weights, in a file that has both. variant: of a folder's
    files, such as "fp16"; None: the plain ones, or what there is. vae_dtype(family): the autoencoder's dtype, if it is
    another. offset: a file of differences that are added to the UNet, which then sees more (IC-Light's).
    Raises FileNotFoundError, or ValueError naming the first tensors that are missing, extra, misshapen or no finite
    floats, and saying what the file looks like if it is another kind and where it belongs.
    """
    device = check_device(device)
    dtype = check_dtype(dtype, device)
    path = Path(path)
    alone = None if path.is_dir() else Weights(path)  # its header is read once
    parts, others = parts_of_folder(path, variant) if alone is None else parts_of(alone)
    kind = kind_of_path(path) if alone is None else kind_of(alone)
    told = f"{path} is not what this loads{hint(kind, 'checkpoint')}"
    if not kind.read:
        raise ValueError(f"{told}: expected a UNet, model.diffusion_model.input_blocks.0.0.weight and so on")
    weights = parts["unet"].weights
    refuse([f"unexpected: {name} {list(weights.shapes.get(name, ()))}" for name in others], told)
    given = {"vae": vae, "text": text_encoder, "text_2": text_encoder_2}
    parts |= {name: _alone(name, file) for name, file in given.items() if file is not None}
    if ema:
        parts["unet"] = parts["unet"].averaged()
    if "vae" not in parts:
        raise ValueError(f"{path} is {kind.what}: give an autoencoder with vae=<file or folder>, --vae for the command")
    parts = {name: needed(part, kind) for name, part in parts.items()}
    known = known_prediction(path, weights, parts["unet"], kind.family, kind.purpose, prediction)
    schedule = noise_schedule(path, weights, known, kind)
    if offset is not None:
        parts["unet"], kind = added(parts["unet"], _offset(offset)), replace(kind, purpose=RELIT)
    models = {name: build(MAKERS[name], part, _told(part, told), kind) for name, part in parts.items()}
    for part in parts.values():
        check_dtypes(part)
    tokenizers = [_tokenizer(path, name, clip_tokenizer) for name in ("tokenizer", "tokenizer_2")]
    for tokenizer, name in zip(tokenizers, ("text", "text_2")):
        if tokenizer is not None and name in models:
            check_vocabulary(tokenizer, models[name].config.vocab_size, "CLIP", clip_tokenizer or path)
    warn_of_guess(known, path)
    dtypes = {"vae": dtype if vae_dtype is None else vae_dtype(kind.family)}
    filled: dict[str, Any] = {name: fill(model, parts[name], _told(parts[name], told), dtypes.get(name, dtype), device)
                              for name, model in models.items()}
    return Checkpoint(filled["unet"], filled["vae"], filled.get("text"), schedule, tokenizers[0] or tokenizers[1],
                      filled.get("text_2"), tokenizers[1], kind, known)


def unet_of(part: Part, kind: Kind) -> UNet:
    """A UNet of a file's shapes; the heads are in our metadata or in diffusers' configuration, else the family's."""
    return UNet(UNetConfig.from_shapes(part.shapes, **heads_of(part)))


def heads_of(part: Part) -> dict[str, Any]:
    """num_heads or head_dim, as our metadata or diffusers' configuration say; {} where they do not."""
    own = config_of(part.weights)
    return {key: own[key] for key in own if key in ("num_heads", "head_dim")} or _heads(part)


def vae_of(part: Part, kind: Kind) -> AutoencoderKL:
    """An autoencoder of a file's shapes; its scale, mean and spread are in our metadata, in diffusers' configuration or
    in marker tensors, else the UNet's family's."""
    own, config = config_of(part.weights), part.config
    usual = UPSCALER if kind.purpose == "x4 upscaler" else SCALES.get(kind.family, VAEConfig.scale)
    scale = own.get("scale", config.get("scaling_factor", usual))
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise ValueError(f"scaling_factor in config.json must be a number above 0, got {scale!r:.60}")
    found = replace(VAEConfig.from_shapes(part.shapes, scale),
                    mean=own.get("mean", _numbers(part, "edm_mean", "latents_mean")),
                    std=own.get("std", _numbers(part, "edm_std", "latents_std")))
    if found.mean is None and kind.family == "playground":
        found = replace(found, mean=PLAYGROUND_MEAN, std=PLAYGROUND_STD)
    if config.get("shift_factor"):
        found = replace(found, mean=(float(config["shift_factor"]),) * found.latent_channels)
    return AutoencoderKL(found)


def text_of(part: Part, kind: Kind) -> "TextModel":
    """A text model of a file's shapes; the activation is OpenCLIP's or CLIP's by the spelling, or in config.json.

    A projection is kept where the family reads it, SDXL's second encoder and the refiner's; elsewhere it is left.
    """
    act = part.config.get("hidden_act") or ("gelu" if part.spelling == "openclip" else
                                            "quick_gelu" if part.prefix else None)
    if act is not None and act not in ("gelu", "quick_gelu"):
        raise ValueError(f"hidden_act in config.json must be gelu or quick_gelu, got {act!r:.60}")
    return clip_text_model(part.shapes, act)


def needed(part: Part, kind: Kind) -> Part:
    """A part without what its family leaves: a text encoder's projection."""
    keeps = part.name == "text_2" or kind.family == "refiner"
    if not part.name.startswith("text") or keeps:
        return part
    return replace(part, sources={name: x for name, x in part.sources.items() if name != "text_projection.weight"})


MAKERS: dict[str, Callable[[Part, Kind], Any]] = {"unet": unet_of, "vae": vae_of, "text": text_of, "text_2": text_of}


def parts_at(path: Path, variant: str | None = None) -> tuple[dict[str, Part], list[str]]:
    """The networks in a file or a folder, and the names of tensors that belong to none."""
    return parts_of_folder(path, variant) if path.is_dir() else parts_of(Weights(path))


def _alone(name: str, file: File) -> Part:
    """The one network of a file or a folder. Raises ValueError saying what it is, if it is another."""
    path = Path(file)
    parts, _ = parts_at(path)
    if list(parts) != [name.removesuffix("_2")]:
        raise ValueError(f"{path} is not the {WORDS[name]} that was asked for{hint(kind_of_path(path))}")
    return replace(parts[name.removesuffix("_2")], name=name)


def _offset(file: File) -> Part:
    """The UNet of differences in a file. Raises ValueError saying what it is, if it is another."""
    kind = kind_of_path(file)
    if kind.purpose != RELIT:
        raise ValueError(f"{file} holds no offsets of a UNet{hint(kind, 'offset')}")
    return parts_at(Path(file))[0]["unet"]


def _numbers(part: Part, marker: str, key: str) -> tuple[float, ...] | None:
    """One number per channel, from a marker tensor or config.json."""
    if marker in part.weights:
        with torch.device("cpu"):  # not on meta, where networks are built
            return tuple(part.weights[marker].flatten().tolist())
    said = part.config.get(key)
    if said is None:
        return None
    if not isinstance(said, list | tuple) or not all(type(x) in (int, float) for x in said):
        raise ValueError(f"{key} in config.json must be a list of numbers, got {said!r:.60}")
    return tuple(map(float, said))


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
    if isinstance(heads, list | tuple) and isinstance(widths, list | tuple) and len(heads) == len(widths) and all(
            type(n) is int and n > 0 for n in [*heads, *widths]):
        if len(set(heads)) == 1:
            return {"num_heads": heads[0]}
        sizes = {width // n for n, width in zip(heads, widths)}
        if len(sizes) == 1:
            return {"head_dim": sizes.pop()}
    raise ValueError(f"attention_head_dim in config.json must be a whole number, or one for each level, got {heads!r}")


def _tokenizer(path: Path, name: str, folder: File | None) -> "PreTrainedTokenizerBase | None":
    """The one that was given, for the first of two; else a diffusers folder's."""
    if folder is not None:
        return load_tokenizer(folder, "CLIP") if name == "tokenizer" else None
    return load_tokenizer(path / name, "CLIP") if (path / name).is_dir() else None
