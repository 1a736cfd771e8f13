"""Which module of ours a LoRA's name means, by a dictionary built of our own modules: no name is ever taken apart.

A file writes a module's path with dots or with underscores, so both are looked up with underscores: under LDM's and
diffusers' path for a UNet, HF's and OpenCLIP's for a text encoder.
"""

import re
from collections.abc import Iterable, Mapping

from torch import nn

from ella_kd.models.files.building import plain
from ella_kd.models.files.names import OPEN_CLIP, OPEN_LAYER, THIRDS, unet_to_diffusers, unet_to_ldm

Modules = tuple[str, ...]  # one of ours; three where a file has q, k and v in one
PARTS = ("unet", "text", "text_2")
_OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}  # diffusers before 0.20, of CLIP
# What comes before a path, and the part it says; what says none is looked for in each.
_PREFIX = re.compile(r"(?:base_model_model_)?(?:lora_|lycoris_)?"
                     r"(?:(unet_|(?:model_)?diffusion_model_)|(te2_|text_encoder_2_)|(te1?_|text_encoder_))?")


def modules_of(network: nn.Module) -> list[str]:
    """The network's modules that have a weight or a bias of their own."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name, _ in network.named_parameters()
                              if name.endswith((".weight", ".bias"))))


def unet_table(modules: Iterable[str]) -> dict[str, Modules]:
    """Every spelling of a UNet's modules -> ours; they are spelled as LDM does, or all as diffusers does."""
    table: dict[str, Modules] = {}
    spelled = _other_spelling(list(modules))
    for module, other in spelled.items():
        for name in (module, other):
            table[_flat(name)] = (module,)
            if name.endswith(".to_out.0"):
                table[_flat(name.removesuffix(".0"))] = (module,)
    return table


def text_table(modules: Iterable[str]) -> dict[str, Modules]:
    """Every spelling of a text encoder's modules -> ours."""
    table: dict[str, Modules] = {}
    for module in modules:
        name = plain(module)
        names = [name, f"text_model.{name}"]
        if layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name):
            here = f"{OPEN_CLIP}{layer[1]}"
            names += [f"{here}.{open_clip}" for open_clip, hf in OPEN_LAYER.items() if hf == layer[2]]
            end = layer[2].removeprefix("self_attn.")
            if end in _OLD:
                names += [each.removesuffix(end) + _OLD[end] for each in names[:2]]
            if end in THIRDS:
                both = f"{here}.attn.in_proj"
                table[_flat(both)] = (*table.get(_flat(both), ()), module)
        elif name == "final_layer_norm":
            names.append("ln_final")
        table |= {_flat(each): (module,) for each in names}
    for key, found in table.items():
        if len(found) > 1:  # q, k and v as OpenCLIP stacks them, whatever their order here
            table[key] = tuple(sorted(found, key=lambda each: THIRDS.index(each.rpartition(".")[2])))
    return table


class Dictionary:
    """The modules of the networks at hand, by every name that a file may have for them.

    networks: by part, "unet", "text" (CLIP, or SD2's OpenCLIP) and "text_2", SDXL's second, the refiner's only one.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.tables = {part: (unet_table if part == "unet" else text_table)(modules_of(network))
                       for part, network in networks.items()}

    def find(self, name: str) -> tuple[str, Modules]:
        """The part and the modules that a file's name means; no modules where there are none, and the part that the
        name says, "" if it says none."""
        flat = _flat(name)
        prefix = _PREFIX.match(flat)
        assert prefix is not None
        said = ("unet", "text_2", "text", "")[next((i for i in range(3) if prefix[i + 1]), 3)]
        for part in (said,) if said else PARTS:
            for rest in (flat[prefix.end():], flat[prefix.end():].removeprefix("model_")):
                if found := self.tables.get(part, {}).get(rest):
                    return part, found
        if not said and re.search(r"(^|_)text_model_|resblocks_|encoder_layers_", flat):
            said = "text"
        return said, ()


def _flat(name: str) -> str:
    """A path with underscores; diffusers' older attention processors had the layers' factors."""
    return re.sub(r"_processor(?=_to_)", "", name.replace(".", "_"))


def _other_spelling(modules: list[str]) -> dict[str, str]:
    """Module -> its path in the other spelling."""
    names = [f"{module}.weight" for module in modules]
    turn = unet_to_ldm if any(name.startswith("down_blocks.") for name in names) else unet_to_diffusers
    return {name.removesuffix(".weight"): other.removesuffix(".weight") for name, other in turn(names).items()}
