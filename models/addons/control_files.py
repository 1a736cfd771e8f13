"""ControlNets in files: LDM's and diffusers' spelling, "difference" files, Control-LoRAs; single files and folders."""

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ella_kd.models.addons.controlnet import COPIED, WIDTHS, ControlNet
from ella_kd.models.addons.lora.merging import merged
from ella_kd.models.around import innermost
from ella_kd.models.devices import check_device, check_dtype
from ella_kd.models.files.building import build, check_dtypes, fill
from ella_kd.models.files.checkpoint import heads_of
from ella_kd.models.files.kinds import hint, kind_of_path
from ella_kd.models.files.layout import Part, json_in
from ella_kd.models.files.metadata import CONFIG
from ella_kd.models.files.names import Source, unet_to_ldm
from ella_kd.models.files.weights import Weights, write_tensors
from ella_kd.models.parameters import Recipe
from ella_kd.models.shapes import Shapes, count_of, shape_of
from ella_kd.models.unet import UNet, UNetConfig

PREFIX = "control_model."
UNION = ("task_embedding", "control_add_embedding.", "transformer_layes.", "spatial_ch_projs.")
SHUFFLE = ("_shuffle", "-shuffle")  # of a file's name: nothing inside says that outputs are pooled


@dataclass(frozen=True, eq=False)
class ControlPart(Part):
    """A ControlNet's tensors in a file."""

    def spelled(self, names: Iterable[str]) -> dict[str, str]:
        return {name: self.sources[name].name if name in self.sources else self.prefix + name for name in names}


def load_controlnet(path: str | Path, *, base: nn.Module | None = None, pooled: bool | None = None,
                    dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu") -> ControlNet:
    """Read a ControlNet: a single file in LDM's or diffusers' names, or diffusers' folder of one.

    base: the UNet that a "difference" file or a Control-LoRA is told against, `fast_on_cpu` or not, or a network made
    of UNets, whose first counts; other files do not need it. pooled: whether its outputs are averaged over the picture;
    None: as the configuration says, or a name with "_shuffle". dtype None: fp32 on a CPU, fp16 elsewhere. Raises
    FileNotFoundError, or ValueError naming what is missing, misshapen or extra, for a file of another kind, for a union
    ControlNet, and for a base that is missing or of another kind.
    """
    device = check_device(device)
    dtype = check_dtype(dtype, device)
    path = Path(path)
    weights = Weights(path)
    told = f"{path} is not a ControlNet"
    config = json_in(path / "config.json") if path.is_dir() else {}
    if any(name.removeprefix(PREFIX).startswith(UNION) for name in weights):
        raise ValueError(f"{path} is a union ControlNet (Union or ProMax, several kinds of pictures in one), which is "
                         "not read: take one of a single kind")
    if config.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise ValueError(f"{path} takes pictures in the order {config['controlnet_conditioning_channel_order']!r}: "
                         "only rgb is read")
    lora, difference = "lora_controlnet" in weights, "difference" in weights
    unet = unet_of(base)
    if unet is None and (lora or difference):
        kind = "a Control-LoRA" if lora else 'a "difference" ControlNet'
        raise ValueError(f"{path} is {kind}, told against a base model: give its UNet, base=sd.unet")
    if lora or difference:
        assert unet is not None
        unet = unfinished(unet)
        tensors = with_base(weights, unet) if lora else added_to_base(weights, unet)
        weights = replace_tensors(weights, tensors)
    part = part_of(weights, config)
    if "input_hint_block.0.weight" not in part.sources:
        raise ValueError(f"{told}{hint(kind_of_path(path))}: expected input_hint_block.0.weight or "
                         "controlnet_cond_embedding.conv_in.weight and so on")
    name = path.stem if path.is_file() else path.name
    if pooled is None:
        said = config.get("global_pool_conditions", own_config(weights).get("pooled"))
        pooled = bool(said) if said is not None else any(mark in name.lower() for mark in SHUFFLE)
    heads = heads_of(part)
    if unet is not None and not heads:
        told_heads = {"num_heads": unet.config.num_heads, "head_dim": unet.config.head_dim}
        heads = {name: count for name, count in told_heads.items() if count is not None}
    net = build(lambda of: ControlNet(config_of_shapes(of.shapes, **heads), widths_of(of.shapes), name, pooled), part,
                told)
    check_dtypes(part)
    return fill(net, part, told, dtype, device)


def save_controlnet(path: str | Path, net: ControlNet) -> None:
    """Write a .safetensors file in LDM's names, which appears whole or not at all."""
    own = {"num_heads": net.config.num_heads, "head_dim": net.config.head_dim, "pooled": net.pooled}
    tensors = {PREFIX + name: x.detach().contiguous() for name, x in net.state_dict().items()}
    write_tensors(path, tensors, {"modelspec.architecture": "stable-diffusion-v1/controlnet", CONFIG: json.dumps(own)})


def part_of(weights: Weights, config: dict[str, Any]) -> ControlPart:
    """The network's tensors under our names. Raises ValueError for what is there twice."""
    prefix = PREFIX if any(name.startswith(PREFIX) for name in weights) else ""
    shapes = {name.removeprefix(prefix): tuple(shape) for name, shape in weights.shapes.items()
              if name.startswith(prefix) and name not in ("difference", "lora_controlnet")}
    ours = to_ldm(shapes)
    sources: dict[str, Source] = {}
    for name, new in ours.items():
        if new in sources:
            raise ValueError(f"{weights.path} holds {new} twice, as {sources[new].name} and as {prefix + name}")
        sources[new] = Source(prefix + name, shapes[name])
    return ControlPart("unet", weights, sources, prefix, config)


def to_ldm(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name -> LDM's, for all names of one ControlNet; LDM's own stay."""
    found = {}
    for name, new in unet_to_ldm(names).items():
        head, _, rest = name.partition(".")
        parts = rest.split(".", 2)
        if head == "controlnet_cond_embedding":
            last = 2 * count_of(names, "controlnet_cond_embedding.blocks") + 2
            number = {"conv_in": 0, "conv_out": last}.get(parts[0])
            inner = rest.partition(".")[2] if number is not None else parts[-1]
            number = 2 * int(parts[1]) + 2 if number is None else number
            new = f"input_hint_block.{number}.{inner}"
        elif head == "controlnet_down_blocks":
            new = f"zero_convs.{parts[0]}.0.{parts[1]}"
        elif head == "controlnet_mid_block":
            new = f"middle_block_out.0.{rest}"
        found[name] = new
    return found


def config_of_shapes(shapes: Shapes, **heads: Any) -> UNetConfig:
    """The configuration of the UNet that a ControlNet is for, read off the shapes of its way down."""
    return UNetConfig.from_shapes(shapes, whole=False, **heads)


def widths_of(shapes: Shapes) -> tuple[int, ...]:
    """The widths of the layers that read the picture."""
    found = tuple(shape_of(shapes, f"input_hint_block.{4 * i}.weight", 4)[0] for i in range(len(WIDTHS)))
    if shape_of(shapes, "input_hint_block.0.weight", 4)[1] != 3:
        raise ValueError("its picture is not RGB: input_hint_block.0.weight is "
                         f"{list(shapes['input_hint_block.0.weight'])}")
    return found


def unet_of(network: Any) -> UNet | None:
    """The first UNet of a network that is made of some, or that torch.compile has wrapped; None for another make."""
    network = innermost(network)
    return network if isinstance(network, UNet) else None


def unfinished(unet: UNet) -> UNet:
    """The same UNet, LoRAs included, before `fast_on_cpu` exchanged the layers whose weights are asked for."""
    recipe = Recipe.of(unet)
    if not recipe.finish:
        return unet
    loras = [(each.lora, each.strength) for each in recipe.changes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a file has for CLIP was said when it was merged first
        found: UNet = merged({"unet": recipe.plain}, loras, partial=True)["unet"]
    return found


def added_to_base(weights: Weights, base: UNet) -> dict[str, Tensor]:
    """A "difference" file's tensors, the base's added to those that it has too."""
    known = base.state_dict()
    found: dict[str, Tensor] = {}
    for name, new in to_ldm([name.removeprefix(PREFIX) for name in weights if name != "difference"]).items():
        x = weights[PREFIX + name if PREFIX + name in weights else name]
        found[new] = x if new not in known else x.float() + _of_shape(known[new], x.shape, new, weights)
    return found


def with_base(weights: Weights, base: UNet) -> dict[str, Tensor]:
    """A Control-LoRA whole: W + up @ down on the base's way down, and what is stored as it is."""
    known = base.state_dict()
    found = {name: x for name, x in known.items()
             if name.partition(".")[0] in COPIED}
    stored = {name.removeprefix(PREFIX): name for name in weights if name != "lora_controlnet"}
    for name, own in stored.items():
        module, _, end = name.rpartition(".")
        if end == "down":
            continue
        if end != "up":
            found[name] = weights[own]
            continue
        if f"{module}.weight" not in known or f"{module}.down" not in stored:
            raise ValueError(f"{weights.path}: {own} belongs to {module}.weight of a base model that the given one "
                             "lacks, or its .down is missing: give the base that the Control-LoRA was made for")
        up, down = (weights[x].float().flatten(1) for x in (own, stored[f"{module}.down"]))
        weight = known[f"{module}.weight"].float()
        if (up.shape[0], down.shape[1]) != weight.flatten(1).shape or up.shape[1] != down.shape[0]:
            raise ValueError(f"{weights.path}: {own} {list(up.shape)} and its down {list(down.shape)} do not fit the "
                             f"base's {module}.weight {list(weight.shape)}: give the base it was made for")
        found[f"{module}.weight"] = weight + (up @ down).to(weight.device).view_as(weight)
    return found


def replace_tensors(weights: Weights, tensors: dict[str, Tensor]) -> Weights:
    """The view of these tensors under a file's name, with its metadata."""
    new = Weights.of({name: x.cpu() for name, x in tensors.items()}, str(weights.path))
    new.metadata = weights.metadata
    return new


def own_config(weights: Weights) -> dict[str, Any]:
    try:
        found = json.loads(weights.metadata.get(CONFIG, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _of_shape(x: Tensor, shape: torch.Size, name: str, weights: Weights) -> Tensor:
    if x.shape != shape:
        raise ValueError(f"{weights.path}: {name} is {list(shape)} and the base's {list(x.shape)}: give the base that "
                         "it was made for")
    return x.float().cpu()
