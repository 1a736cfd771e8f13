"""Which tensors of a file or a folder are the UNet's, the autoencoder's, the text encoders', each under our names."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ella_kd.models.files.names import (
    OPEN_CLIP,
    Source,
    Sources,
    ema_name,
    text_sources,
    unet_sources,
    unet_to_diffusers,
    vae_sources,
    vae_to_diffusers,
)
from ella_kd.models.files.weights import Weights, has_weights
from ella_kd.models.shapes import Shape, Shapes

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN = "cond_stage_model.transformer.", "cond_stage_model.model."
FIRST, FIRST_OPEN, SECOND = (f"conditioner.embedders.{each}." for each in ("0.transformer", "0.model", "1.model"))
PREFIXES = {UNET: "unet", VAE: "vae", "vae.": "vae", CLIP: "text", OPEN: "text", FIRST: "text", FIRST_OPEN: "text",
            SECOND: "text_2"}
FOLDERS = {"unet": "unet", "vae": "vae", "text_encoder": "text", "text_encoder_2": "text_2"}
WORDS = {"unet": "UNet", "vae": "autoencoder", "text": "text encoder", "text_2": "second text encoder"}
READ: dict[str, Callable[[Shapes], Sources]] = {"unet": unet_sources, "vae": vae_sources, "text": text_sources,
                                                "text_2": text_sources}
# What a tensor's presence says of the model: v-prediction, zero terminal SNR, EDM of two kinds.
MARKERS = ("v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
TABLE = "alphas_cumprod"
# What training left in LDM files beside the networks; of the noise schedule alphas_cumprod tells all.
IGNORED = {"betas", TABLE, "alphas_cumprod_prev", "log_one_minus_alphas_cumprod", "logvar", "lvlb_weights",
           "scale_factor", "denoiser.sigmas", *MARKERS}
IGNORED |= {f"{owner}.{name}" for owner in ("cond_stage_model", "conditioner.embedders.0")  # of CLIP as a whole
            for name in ("logit_scale", "text_projection", "text_projection.weight")}
WHOLE_CLIP = ("vision_model.", "visual_projection.", "logit_scale")  # beside its text encoder
IGNORED_PREFIXES = ("model_ema.", VAE + "loss.", VAE + "model_ema.", "loss.", "posterior_", "sqrt_",
                    "low_scale_model.", "depth_model.", "embedding_manager.")
# A network without a prefix, alone in its file: what one of its names begins with.
BARE = ((r"(input_blocks|output_blocks)\.\d", "unet"),
        (r"(down_blocks|up_blocks)\.\d+\.(resnets|attentions)\.", "unet"),
        (r"(encoder\.conv_in|decoder\.conv_in|encoder\.down_blocks|decoder\.up_blocks)\.", "vae"),
        (r"(text_model\.)?encoder\.layers\.\d", "text"), (re.escape(OPEN_CLIP), "text"))


@dataclass(frozen=True, eq=False)
class Part:
    """One network's tensors in a file: under our names where they are, their shapes, and each one when it is read."""

    name: str  # unet, vae, text, text_2
    weights: Weights
    sources: Sources
    prefix: str = ""  # of the file's names
    config: dict[str, Any] = field(default_factory=dict)  # config.json beside it

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: source.shape for name, source in self.sources.items()}

    @property
    def spelling(self) -> str:
        """ "diffusers" or "ldm" of UNet and autoencoder; "openclip" or "hf" of a text encoder."""
        names = [source.name.removeprefix(self.prefix) for source in self.sources.values()]
        if self.name.startswith("text"):
            return "openclip" if any(name.startswith(OPEN_CLIP) for name in names) else "hf"
        return "diffusers" if any(re.match(r"(\w+\.)?(down|up|mid)_block", name) for name in names) else "ldm"

    def read(self, name: str) -> Tensor:
        source = self.sources[name]
        return source(self.weights[source.name])

    def spelled(self, names: Iterable[str]) -> dict[str, str]:
        """Our names as this file would spell them, for errors."""
        names = list(names)
        told = {name: name for name in names}
        if self.spelling == "diffusers":
            told = (unet_to_diffusers if self.name == "unet" else vae_to_diffusers)(names)
        elif self.name.startswith("text"):
            long = any("text_model." in source.name for source in self.sources.values())
            told = {name: f"text_model.{name}" if long else name for name in names}
        return {name: self.sources[name].name if name in self.sources else self.prefix + spelled
                for name, spelled in told.items()}

    def averaged(self) -> "Part":
        """The same network with the moving averages of its weights. Raises ValueError if the file has none."""
        known = {name: Source(ema_name(name), source.shape) for name, source in self.sources.items()}
        if self.spelling != "ldm" or not any(source.name in self.weights for source in known.values()):
            raise ValueError(f"{self.weights.path} holds no moving averages of its weights (EMA): load it without "
                             "ema=True")
        missing = [source.name for source in known.values() if source.name not in self.weights]
        if missing:
            raise ValueError(f"{self.weights.path} holds some moving averages (EMA) and not {missing[0]}")
        return Part(self.name, self.weights, known, "", self.config)


def parts_of(weights: Weights, config: dict[str, Any] | None = None) -> tuple[dict[str, Part], list[str]]:
    """The networks that a file holds, and the names of tensors that belong to none."""
    groups: dict[str, dict[str, Shape]] = {}
    others: list[str] = []
    for name, shape in weights.shapes.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if name in IGNORED or name.startswith(IGNORED_PREFIXES):
            continue
        if prefix is None:
            others.append(name)
        else:
            groups.setdefault(prefix, {})[name.removeprefix(prefix)] = shape
    if not groups:
        bare = next((part for pattern, part in BARE for name in others if re.match(pattern, name)), None)
        if bare is None:
            return {}, others
        left = WHOLE_CLIP if bare == "text" else ()
        inside = {name: weights.shapes[name] for name in others if not name.startswith(left)}
        return {bare: Part(bare, weights, _read(bare, inside, "", weights), "", config or {})}, []
    parts: dict[str, Part] = {}
    for prefix, shapes in groups.items():
        part = PREFIXES[prefix]
        if part in parts:
            raise ValueError(f"{weights.path} holds its {WORDS[part]} twice, as {parts[part].prefix}* and {prefix}*")
        parts[part] = Part(part, weights, _read(part, shapes, prefix, weights), prefix, config or {})
    return parts, others


def parts_of_folder(folder: Path, variant: str | None = None) -> tuple[dict[str, Part], list[str]]:
    """The networks of a diffusers folder, or of the folder of one network; and the names that belong to none."""
    found = {FOLDERS[name]: folder / name for name in FOLDERS if (folder / name).is_dir()}
    found = {name: path for name, path in found.items() if has_weights(path)}
    if not found:
        return parts_of(Weights(folder, variant), json_in(folder / "config.json"))
    parts: dict[str, Part] = {}
    others: list[str] = []
    for name, path in found.items():
        inside, extra = parts_of(Weights(path, variant), json_in(path / "config.json"))
        if list(inside) != [name.removesuffix("_2")]:
            raise ValueError(f"{path} holds {', '.join(WORDS[each] for each in inside) or 'no network that is known'}: "
                             f"expected the {WORDS[name]} of a diffusers folder")
        part = inside[name.removesuffix("_2")]
        parts[name] = Part(name, part.weights, part.sources, part.prefix, part.config)
        others += extra
    if "text" not in parts and "text_2" in parts:  # SDXL's refiner has its only one there
        second = parts.pop("text_2")
        parts["text"] = Part("text", second.weights, second.sources, second.prefix, second.config)
    return parts, others


def json_in(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is none. Raises ValueError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {content!r:.100}: fetch it again")
    return content


def _read(part: str, shapes: Shapes, prefix: str, weights: Weights) -> Sources:
    try:
        sources = READ[part](shapes)
    except ValueError as error:
        raise ValueError(f"{weights.path}: the {WORDS[part]} {error}") from error
    return {name: Source(prefix + x.name, x.shape, x.third, x.transposed) for name, x in sources.items()}
