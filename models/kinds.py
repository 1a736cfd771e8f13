"""What a file looks like by its tensor names, for the error where it is not what was asked for."""

import re
from collections.abc import Iterable

CHECKPOINT, CONNECTOR = "a Stable Diffusion 1.x checkpoint", "ELLA's connector"

# (pattern that a name of this kind has, and what it then is); the first that is found holds, so add-ons come first.
_NAMES = [(re.compile(pattern), kind) for pattern, kind in (
    (r"^lora_(unet|te)|[._]lora(_linear_layer)?[._](up|down|A|B)\b|\.(hada_w1_a|lokr_w[12](_a)?|oft_blocks)$",
     "a LoRA, which changes a checkpoint and is none itself"),
    (r"^(control_model\.)?input_hint_block\.|^controlnet_cond_embedding\.", "a ControlNet"),
    (r"^(image_proj|ip_adapter)(\.|$)", "an IP-Adapter"),
    (r"^(adapter\.)?body\.\d+\.", "a T2I-Adapter"),
    (r"^(emb_params|string_to_param|clip_[lg])$", "a textual-inversion embedding"),
    (r"^connector\.perceiver_blocks\.", CONNECTOR + " (TSC): its place is tsc, --tsc for the command"),
    (r"^conditioner\.embedders\.1\.model\.", "an SDXL checkpoint; only Stable Diffusion 1.x is read"),
    (r"^conditioner\.embedders\.0\.model\.", "an SDXL refiner; only Stable Diffusion 1.x is read"),
    (r"^cond_stage_model\.model\.transformer\.resblocks\.",
     "a Stable Diffusion 2.x checkpoint; only Stable Diffusion 1.x is read"),
    (r"(^|\.)(double|joint)_blocks\.\d", "a Flux or SD3 model; only Stable Diffusion 1.x is read"),
    (r"^(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention\.",
     "a T5: its place is t5, --t5 for the command, and it is given as a folder"),
    (r"^(down|up)_blocks\.\d\.(resnets|attentions)\.",
     "the UNet of a diffusers folder; only single files in LDM's layout are read"),
    (r"^(encoder\.down|decoder\.up)_blocks\.\d\.",
     "the autoencoder of a diffusers folder; only single files in LDM's layout are read"),
    (r"^(text_model\.)?encoder\.layers\.\d+\.self_attn\.", "a CLIP text encoder alone"),
)]
_PARTS = {"model.diffusion_model.": "UNet", "first_stage_model.": "autoencoder", "cond_stage_model.": "text encoder"}


def kind_of(names: Iterable[str]) -> str:
    """What a file with these tensors is, in words; "" if nobody knows."""
    names = list(names)
    for pattern, kind in _NAMES:
        if any(map(pattern.search, names)):
            return kind
    found = [part for prefix, part in _PARTS.items() if any(name.startswith(prefix) for name in names)]
    if len(found) == len(_PARTS):
        return CHECKPOINT + ": its place is checkpoint, --checkpoint for the command"
    if found:
        return f"a checkpoint without its {' and '.join(part for part in _PARTS.values() if part not in found)}"
    if any(name.startswith("input_blocks.") for name in names):
        return "the UNet of a checkpoint alone"
    if {"encoder.conv_in.weight", "decoder.conv_in.weight"} & set(names):
        return "the autoencoder (VAE) of a checkpoint alone"
    return ""


def hint(names: Iterable[str], wanted: str) -> str:
    """", it looks like a LoRA ..." for an error, unless the file is of the wanted kind or unknown."""
    kind = kind_of(names)
    return f", it looks like {kind}" if kind and not kind.startswith(wanted) else ""
