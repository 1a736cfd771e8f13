"""What a file or folder is, from its tensors' names and shapes and its metadata, before any weight is read."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ella_kd.models.files.layout import MARKERS, WORDS, Part, json_in, parts_of, parts_of_folder
from ella_kd.models.files.weights import Weights
from ella_kd.models.shapes import Shapes, count_of

FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "SDXL", "refiner": "SDXL refiner",
            "ssd-1b": "SSD-1B", "vega": "Segmind Vega", "playground": "Playground v2.5"}
PURPOSES = {5: "depth", 7: "x4 upscaler", 8: "InstructPix2Pix", 9: "inpainting"}  # by the channels of the UNet's input
RELIT = "IC-Light"  # what a UNet with such offsets is for: a foreground in another light
EMBEDDINGS = {768, 1024, 1280}  # the widths of CLIP's token embeddings
PLACES = {"checkpoint": "checkpoint, --checkpoint for the command", "vae": "vae, --vae for the command",
          "text_encoder": "text_encoder", "tsc": "tsc, --tsc for the command",
          "offset": "offset, --offset for the command, beside a checkpoint",
          "t5": "t5, --t5 for the command, and it is given as a folder", "lora": "lora, --lora for the command",
          "embedding": "embedding, --embedding for the command", "control": "control, --control for the command",
          "image_prompt": "image_prompt, --image-prompt for the command"}


@dataclass(frozen=True)
class Kind:
    """What a file is, in words; place: the argument it belongs to, "" if it has none here.

    family: a key of FAMILIES. purpose: what its UNet is for, "" for pictures from text. parts: the networks it holds.
    read: whether `load_checkpoint` can read it; otherwise `what` says why not.
    """

    what: str = ""
    place: str = ""
    family: str = ""
    purpose: str = ""
    parts: tuple[str, ...] = ()
    read: bool = False

    def size(self, prediction: str) -> int:
        """The usual side of the pictures of a family that predicts eps, v or edm, in pixels."""
        if (self.family, self.purpose, prediction) == ("sd2", "", "v"):
            return 768
        return 512 if self.family in ("", "sd1", "sd2") else 1024

    def __str__(self) -> str:
        where = f": its place is {PLACES[self.place]}" if self.place in PLACES else ""
        return self.what + where


# (pattern that a name has, what the file then is, its place); the first that is found holds, so add-ons come first.
_NAMES = [(re.compile(pattern), what, place) for pattern, what, place in (
    (r"^lora_controlnet$", "a Control-LoRA, which is a ControlNet on a base model", "control"),
    (r"^(image_proj|ip_adapter)(\.|$)", "an IP-Adapter", "image_prompt"),
    (r"^lora_(unet|te)|[._]lora(_linear_layer)?[._](up|down|A|B)\b|\.(hada_w1_a|lokr_w[12](_a)?|oft_blocks)$|"
     r"\.lora_(up|down|mid)\.weight$", "a LoRA, which changes a checkpoint and is none itself", "lora"),
    (r"^(control_model\.)?input_hint_block\.|^controlnet_cond_embedding\.", "a ControlNet", "control"),
    (r"motion_modules\.", "a motion module (AnimateDiff)", ""),
    (r"^(adapter\.)?body\.\d+\.", "a T2I-Adapter", "control"),
    (r"^(emb_params|string_to_param(\..*)?|clip_[lg]|<.*>|)$", "a textual-inversion embedding", "embedding"),
    (r"^connector\.perceiver_blocks\.", "ELLA's connector (TSC)", "tsc"),
    (r"(^|\.)(double|joint)_blocks\.\d|^(transformer_blocks|single_transformer_blocks)\.\d|^transformer\.single_",
     "a Flux or SD3 model, which is not read", ""),
    (r"^cond_stage_model\.roberta\.", "an AltDiffusion checkpoint, whose text encoder is not read", ""),
    (r"^(embedder\.|noise_augmentor\.)", "a Stable Diffusion 2.x unCLIP checkpoint, which is not read", ""),
    (r"(^|\.)encoder_hid_proj\.", "Kolors, whose text encoder is not read", ""),
    (r"^(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention\.", "a T5", "t5"),
    (r"\.(on_input|diff|diff_b|w_norm|dora_scale|a1\.weight|lora_magnitude_vector(\.\w+)?|(hada|lokr)_w1(_a)?\.\w+)$",
     "a LoRA, which changes a checkpoint and is none itself", "lora"),
    (r"^(vision_model\.|visual\.)", "a CLIP image encoder", ""),
)]


def kind_of(weights: Weights) -> Kind:
    """What a file holds; `Kind()` if nobody knows."""
    if known := _add_on(weights.shapes):
        return known
    if len(weights) == 1 and all(len(shape) in (1, 2) and shape[-1] in EMBEDDINGS for shape in weights.shapes.values()):
        return Kind("a textual-inversion embedding", "embedding")  # diffusers', under the word itself
    try:
        parts, _ = parts_of(weights, json_in(weights.path / "config.json") if weights.path.is_dir() else None)
    except ValueError:  # a network is there twice, or its names do not agree: who loads it says so
        return Kind()
    return kind_of_parts(parts, weights, bool(weights.path.is_dir()))


def kind_of_folder(folder: Path) -> Kind:
    """What a folder holds: a diffusers pipeline, or one network; `Kind()` if nobody knows."""
    parts, _ = parts_of_folder(folder)
    one = next(iter(parts.values()), None)
    if one is None or one.weights.path == folder:
        return kind_of(Weights(folder))
    for part in parts.values():
        if known := _add_on(part.weights.shapes):
            return known
    return kind_of_parts(parts, one.weights, True)


def kind_of_path(path: str | Path) -> Kind:
    """What is at a path. Raises as `Weights` does."""
    path = Path(path)
    return kind_of_folder(path) if path.is_dir() else kind_of(Weights(path))


def hint(kind: Kind, *wanted: str) -> str:
    """", it looks like a LoRA ..." for an error, unless it belongs to a wanted place or nobody knows it."""
    return f", it looks like {kind}" if kind.what and kind.place not in wanted else ""


def family_of(unet: Shapes, markers: Iterable[str] = ()) -> str:
    """The family of a UNet's shapes in our names."""
    depth = count_of(unet, "input_blocks.7.1.transformer_blocks")
    if "label_emb.0.0.weight" in unet:
        if any(name.startswith("middle_block.0.") for name in unet) and "middle_block.1.norm.weight" not in unet:
            return "vega" if depth < 4 else "ssd-1b"
        if "edm_mean" in markers:
            return "playground"
        levels = sum(bool(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name)) for name in unet) + 1
        return "refiner" if levels > 3 else "sdxl"
    linear = any(name.endswith(".proj_in.weight") and len(shape) == 2 for name, shape in unet.items())
    return "sd2" if linear else "sd1"


def purpose_of(unet: Shapes) -> str:
    """What a UNet's shapes, in our names, say it is for; "" is pictures from text."""
    if "time_embed.cond_proj.weight" in unet:
        return "LCM"
    channels = tuple(unet.get("input_blocks.0.0.weight", ()))[1:2]
    return "" if channels in ((4,), ()) else PURPOSES.get(channels[0], f"{channels[0]}-channel")


def _add_on(names: Iterable[str]) -> Kind | None:
    names = list(names)
    found = ((what, place) for pattern, what, place in _NAMES if any(map(pattern.search, names)))
    return next((Kind(what, place) for what, place in found), None)


def kind_of_parts(parts: dict[str, Part], weights: Weights, folder: bool = True) -> Kind:
    """What networks are; folder: whether they lie in one of diffusers', where no offsets are."""
    names = tuple(name for name in WORDS if name in parts)
    if names == ("vae",):
        return Kind("an autoencoder (VAE) alone", "vae", parts=names)
    if "unet" not in parts:
        if names == ("text",):
            return Kind("a text encoder alone", "text_encoder", parts=names)
        return Kind("a checkpoint without its UNet", parts=names) if names else Kind()
    unet = parts["unet"].shapes
    markers = [name for name in MARKERS if name in weights]
    if "vae" in parts and parts["vae"].config.get("latents_mean"):
        markers.append("edm_mean")
    family, purpose = family_of(unet, markers), purpose_of(unet)
    channels = tuple(unet.get("input_blocks.0.0.weight", ()))[1:2]
    if channels in ((8,), (12,)) and parts["unet"].spelling == "diffusers" and not folder and _offsets(parts["unet"]):
        return Kind("IC-Light's offsets, which are added to a Stable Diffusion 1.x UNet", "offset", "sd1", RELIT, names)
    words = " ".join(word for word in (FAMILIES[family], purpose, "checkpoint") if word)
    article = "an" if re.match(r"[AEIOU]|S[DS]", words) else "a"
    wanted = ["unet", "vae", "text", *(["text_2"] if family in ("sdxl", "ssd-1b", "vega", "playground") else [])]
    missing = [WORDS[name] for name in wanted if name not in parts]
    what = f"{article} {words}"
    if names == ("unet",):
        what = f"the UNet of {what} alone"
    elif missing:
        what += f" without its {' and '.join(missing)}"
    return Kind(what, "checkpoint", family, purpose, names, True)


def _offsets(unet: Part) -> bool:
    """Whether a UNet is a difference of two: its norms' weights are then about 0 instead of 1."""
    name = "out.0.weight"
    return name in unet.shapes and float(unet.read(name).float().mean().abs()) < 0.25

