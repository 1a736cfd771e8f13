"""The spellings of tensor names: diffusers and LDM, OpenCLIP and HF.

Inside there is one spelling: LDM's for UNet and autoencoder, HF's for text encoders, without the `text_model.` that
some versions of transformers put first. Any other is translated here, by tables of modules built from the names
themselves, so that every size of network is covered. A name that no table knows stays as it is: who loads refuses it.
Checked against diffusers' own conversion (loaders/single_file_utils.py).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ella_kd.models.shapes import Shapes, count_of

Table = dict[str, str]  # module -> module
DEPTH = 6  # the longest module in a table: encoder.mid_block.attentions.0.to_out.0

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "class_embedding": "label_emb", "class_embedding.linear_1": "label_emb.0.0",
        "class_embedding.linear_2": "label_emb.0.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
LCM = {"time_embedding.cond_proj": "time_embed.cond_proj"}  # LDM's files have diffusers' name of it
ATTENTION = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",  # before diffusers .18; today's come last
             "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
              "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
OPEN_ENDS = {"positional_embedding": "embeddings.position_embedding.weight",
             "token_embedding.weight": "embeddings.token_embedding.weight",
             "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias"}
THIRDS = ("q_proj", "k_proj", "v_proj")
OPEN_CLIP = "transformer.resblocks."
# Beside a text encoder's weights: no part of it.
TEXT_BUFFERS = {"embeddings.position_ids", "logit_scale", "attn_mask"}


@dataclass(frozen=True)
class Source:
    """Where a tensor of ours is in a file, and what is made of it: `source(tensor)` has this shape."""

    name: str
    shape: tuple[int, ...]
    third: int | None = None  # of the rows: OpenCLIP keeps q, k and v in one
    transposed: bool = False

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        return tensor.T.contiguous() if self.transposed else tensor.reshape(self.shape)


Sources = dict[str, Source]  # our name -> where it is


def unet_sources(shapes: Shapes) -> Sources:
    """Our UNet's tensors in a file that spells them as LDM or as diffusers does (names without their prefix)."""
    spelled = unet_to_ldm(shapes) if _diffusers(shapes) else _translated(shapes, LCM)
    return _sources(spelled, shapes)


def vae_sources(shapes: Shapes) -> Sources:
    """Our autoencoder's tensors in a file in LDM's or diffusers' spelling; its attention may be linear or 1x1."""
    spelled = vae_to_ldm(shapes) if _diffusers(shapes) else {name: name for name in shapes}
    found = _sources(spelled, shapes)
    return {name: Source(x.name, (*x.shape, 1, 1)) if ".mid.attn_1." in name and len(x.shape) == 2 else x
            for name, x in found.items()}


def text_sources(shapes: Shapes) -> Sources:
    """Our text encoder's tensors in a file in HF's spelling, with `text_model.` or without, or in OpenCLIP's.

    OpenCLIP's `text_projection` is applied as x @ P and is therefore transposed, `text_projection.weight` is not
    (files that were written from a linear layer; as a square it tells nothing by its shape).
    """
    found: Sources = {}
    open_clip = any(name.startswith(OPEN_CLIP) for name in shapes)
    for name, shape in shapes.items():
        for ours, source in (_open_clip(name, shape) if open_clip else _hf(name, shape)):
            if ours in found:
                raise ValueError(f"holds {ours} twice, as {found[ours].name} and as {name}")
            found[ours] = source
    return found


def taken(tensors: Mapping[str, Tensor], sources: Sources) -> dict[str, Tensor]:
    """The tensors of a file under our names."""
    return {name: source(tensors[source.name]) for name, source in sources.items()}


def unet_to_ldm(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name -> LDM's, for all names of one UNet."""
    names = list(names)
    levels, blocks = count_of(names, "down_blocks"), count_of(names, "down_blocks.0.resnets")
    last = {name.split(".")[1] for name in names if re.match(rf"up_blocks\.\d{{1,2}}\.attentions\.{blocks}\.", name)}
    return _translated(names, _unet_table(_Plan(levels, blocks, {int(level) for level in last})))


def unet_to_diffusers(names: Iterable[str]) -> dict[str, str]:
    """LDM's name -> diffusers', for all names of one UNet (without `model.diffusion_model.`)."""
    names = list(names)
    downs = sorted({int(found[1]) for name in names if (found := re.match(r"input_blocks\.(\d{1,2})\.0\.op\.", name))})
    blocks = max(downs[0] if downs else count_of(names, "input_blocks"), 1) - 1
    whole, known = blocks + 1, set(names)
    last = {i for i in range(len(downs) + 1) if f"output_blocks.{whole * i + blocks}.1.norm.weight" in known}
    table = _unet_table(_Plan(len(downs) + 1, blocks, last))
    return _translated(names, {ldm: diffusers for diffusers, ldm in table.items()})


def vae_to_ldm(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name -> LDM's, for all names of one autoencoder."""
    names = list(names)
    return _translated(names, _vae_table(*(max(count_of(names, prefix) for prefix in either) for either in (
        ("encoder.down_blocks", "decoder.up_blocks"),
        ("encoder.down_blocks.0.resnets", "decoder.up_blocks.0.resnets")))))


def vae_to_diffusers(names: Iterable[str]) -> dict[str, str]:
    """LDM's name -> diffusers', for all names of one autoencoder. There the attention's weights are [C, C]."""
    names = list(names)
    table = _vae_table(*(max(count_of(names, prefix) for prefix in either) for either in (
        ("encoder.down", "decoder.up"), ("encoder.down.0.block", "decoder.up.0.block"))))
    return _translated(names, {ldm: diffusers for diffusers, ldm in table.items()})


def to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors in HF's plain names as OpenCLIP spells them: q, k, v in one, the projection turned."""
    back = {hf: ours for ours, hf in OPEN_ENDS.items()}
    layers = {hf: ours for ours, hf in OPEN_LAYER.items()}
    found: dict[str, Tensor] = {}
    for name, x in tensors.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer is None:
            turned = name == "text_projection.weight"
            found["text_projection" if turned else back.get(name, name)] = x.T.contiguous() if turned else x
        elif layer[2].removeprefix("self_attn.") not in THIRDS:
            found[f"{OPEN_CLIP}{layer[1]}.{layers[layer[2]]}.{layer[3]}"] = x
        elif layer[2] == "self_attn.q_proj":
            rows = [tensors[name.replace("q_proj", each)] for each in THIRDS]
            found[f"{OPEN_CLIP}{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(rows)
    return found


def ema_name(name: str) -> str:
    """Where an LDM file keeps the moving average of a UNet's tensor; dots cannot be put back, so names go forward."""
    return "model_ema.diffusion_model" + name.replace(".", "")


class _Plan(NamedTuple):
    levels: int
    blocks: int  # res blocks a level, on the way down
    last: set[int]  # levels on the way up whose last res block is followed by attention: their upsampler comes third


def _unet_table(plan: _Plan) -> Table:
    """diffusers' modules -> LDM's. Where two have one name there, the later is the one back."""
    table = ENDS | LCM
    whole = plan.blocks + 1
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    table["mid_block.attentions.0"] = "middle_block.1"
    for i in range(plan.levels):
        for j in range(whole):
            here = f"input_blocks.{1 + whole * i + j}"
            if j < plan.blocks:
                resnets[f"down_blocks.{i}.resnets.{j}"] = f"{here}.0"
                table[f"down_blocks.{i}.attentions.{j}"] = f"{here}.1"
            else:
                table[f"down_blocks.{i}.downsamplers.0.conv"] = f"{here}.0.op"
            resnets[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{whole * i + j}.0"
            table[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{whole * i + j}.1"
        end = f"output_blocks.{whole * i + plan.blocks}"
        table[f"up_blocks.{i}.upsamplers.0.conv"] = f"{end}.{1 + (i in plan.last)}.conv"
    return table | {f"{diffusers}.{a}": f"{ldm}.{b}" for diffusers, ldm in resnets.items() for a, b in RESNET.items()}


def _vae_table(levels: int, blocks: int) -> Table:
    """diffusers' modules -> LDM's. Where two have one name there, the later is the one back."""
    table: Table = {}
    for half, down in (("encoder", True), ("decoder", False)):
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        resnets = {f"mid_block.resnets.{j}": f"mid.block_{j + 1}" for j in range(2)}
        for i in range(levels):
            theirs, ours = (f"down_blocks.{i}", f"down.{i}") if down else (f"up_blocks.{i}", f"up.{levels - 1 - i}")
            resnets |= {f"{theirs}.resnets.{j}": f"{ours}.block.{j}" for j in range(blocks + 1)}
            way = "down" if down else "up"
            table[f"{half}.{theirs}.{way}samplers.0.conv"] = f"{half}.{ours}.{way}sample.conv"
        table |= {f"{half}.{theirs}.conv_shortcut": f"{half}.{ours}.nin_shortcut" for theirs, ours in resnets.items()}
        table |= {f"{half}.{theirs}.{same}": f"{half}.{ours}.{same}" for theirs, ours in resnets.items()
                  for same in ("norm1", "conv1", "norm2", "conv2")}
        table |= {f"{half}.mid_block.attentions.0.{theirs}": f"{half}.mid.attn_1.{ours}"
                  for theirs, ours in ATTENTION.items()}
    return table


def _translated(names: Iterable[str], table: Table) -> dict[str, str]:
    found = {}
    for name in names:
        parts = name.split(".", DEPTH + 1)
        modules = (n for n in range(min(len(parts) - 1, DEPTH), 0, -1) if ".".join(parts[:n]) in table)
        n = next(modules, 0)
        found[name] = ".".join([table[".".join(parts[:n])], *parts[n:]]) if n else name
    return found


def _sources(spelled: Mapping[str, str], shapes: Shapes) -> Sources:
    found: Sources = {}
    for name, ours in spelled.items():
        if ours in found:
            raise ValueError(f"holds {ours} twice, as {found[ours].name} and as {name}")
        found[ours] = Source(name, tuple(shapes[name]))
    return found


def _open_clip(name: str, shape: Iterable[int]) -> list[tuple[str, Source]]:
    shape = tuple(shape)
    if name in TEXT_BUFFERS:
        return []
    if name == "text_projection":
        return [("text_projection.weight", Source(name, shape[::-1], transposed=True))]
    if name.startswith("text_projection.weight"):  # one tool wrote .weight.weight
        return [("text_projection.weight", Source(name, shape))]
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
    if layer is None:
        return [(OPEN_ENDS.get(name, name), Source(name, shape))]
    here = f"encoder.layers.{layer[1]}"
    if layer[2] == "attn.in_proj" and shape and shape[0] % 3 == 0:
        part = (shape[0] // 3, *shape[1:])
        return [(f"{here}.self_attn.{each}.{layer[3]}", Source(name, part, third=i)) for i, each in enumerate(THIRDS)]
    return [(f"{here}.{OPEN_LAYER[layer[2]]}.{layer[3]}" if layer[2] in OPEN_LAYER else name, Source(name, shape))]


def _hf(name: str, shape: Iterable[int]) -> list[tuple[str, Source]]:
    plain = name.removeprefix("text_model.")
    return [] if plain in TEXT_BUFFERS else [(plain, Source(name, tuple(shape)))]


def _diffusers(names: Iterable[str]) -> bool:
    """Whether a UNet or an autoencoder is spelled as diffusers does."""
    return any(re.match(r"((en|de)coder\.)?(down|up|mid)_block", name) for name in names)

