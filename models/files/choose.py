"""Which files of a repository make one part of a system."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ella_kd.models.files.presets import Part

# The weights that transformers and diffusers write; a variant ("fp16") stands before or after the number of a shard.
_WEIGHTS = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)(?P<a>\.[a-z]\w*)?(-(?P<i>\d+)-of-(?P<n>\d+))?"
                      r"(?P<b>\.(?!index)[a-z]\w*)?\.(?P<kind>safetensors|bin)")
_SMALL = (".json", ".txt", ".model")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model")
_COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_NETWORKS = _COMPONENTS[:4]


class Chosen(NamedTuple):
    """What a part is, the file or folder `path` of the repository, and the names to have for it, the weights last."""

    path: str
    names: tuple[str, ...]


def choose(names: Iterable[str], path: str = "", part: Part = "checkpoint") -> Chosen:
    """The file, or the files of the folder, that `path` in a repository with these names means.

    Of a folder: config and tokenizer files, and the weights as safetensors rather than .bin, without a variant if
    there are both. A diffusers folder: those of its networks, tokenizers and scheduler; part "vae" or "text_encoder":
    its folder of that name. A folder without a config: its one file of weights. part "clip_tokenizer": the tokenizer's
    files and no weights.
    Raises FileNotFoundError or ValueError, as the rest of a sentence that began with the repository.
    """
    names = sorted(names)
    if path in names:
        return Chosen(path, (path,))
    folder = path.rstrip("/")
    inside = [name.removeprefix(f"{folder}/") for name in names if not folder or name.startswith(f"{folder}/")]
    if not inside:
        near = difflib.get_close_matches(path, names, 3, 0.5) or [n for n in names if n.endswith(".safetensors")][:3]
        raise FileNotFoundError(f"holds no {path}" + (f"; it holds {', '.join(near)}" if near else ""))
    chosen = _inside(inside, part)
    under = f"{folder}/" if folder else ""
    return Chosen((under + chosen.path).rstrip("/"), tuple(under + name for name in chosen.names))


def _inside(names: Sequence[str], part: Part) -> Chosen:
    top = [name for name in names if "/" not in name]
    small = [name for name in top if name.endswith(_SMALL)]
    if part == "clip_tokenizer":
        if {*_TOKENIZERS} & {*top}:
            return Chosen("", tuple(small))
        return _below("tokenizer", names, part, f"holds no tokenizer: expected {' or '.join(_TOKENIZERS)}")
    if "model_index.json" in top:
        one = part in ("vae", "text_encoder")
        return _below(part, names, part, f"has no {part} folder") if one else _diffusers(names)
    if "config.json" in top and any(map(_WEIGHTS.fullmatch, top)):
        return Chosen("", (*small, *_weights(top)))
    for suffixes in ((".safetensors",), (".ckpt", ".pt", ".pth", ".bin")):
        files = [name for name in top if name.endswith(suffixes)]
        if len(files) == 1:
            return Chosen(files[0], (files[0],))
        if files:
            more = ", ..." if len(files) > 6 else ""
            raise ValueError(f"holds several files: say which after a colon, {', '.join(files[:6])}{more}")
    raise FileNotFoundError("holds no weights: expected .safetensors, or config.json with weights beside it")


def _below(folder: str, names: Sequence[str], part: Part, otherwise: str) -> Chosen:
    inside = [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
    if not inside:
        raise FileNotFoundError(otherwise)
    chosen = _inside(inside, part)
    return Chosen(f"{folder}/{chosen.path}".rstrip("/"), tuple(f"{folder}/{name}" for name in chosen.names))


def _diffusers(names: Sequence[str]) -> Chosen:
    wanted, weights = ["model_index.json"], []
    for folder in _COMPONENTS:
        inside = [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
        wanted += [f"{folder}/{name}" for name in inside if name.endswith(_SMALL)]
        if inside and folder in _NETWORKS:
            weights += [f"{folder}/{name}" for name in _weights(inside)]
    return Chosen("", (*wanted, *weights))


def _weights(names: Sequence[str]) -> list[str]:
    """The best whole set of weights in a folder: one file, or all shards."""
    sets: dict[tuple[bool, str, str, int], list[str]] = {}
    for name in names:
        if found := _WEIGHTS.fullmatch(name):
            key = (found["kind"] == "bin", found["a"] or found["b"] or "", found[1], int(found["n"] or 1))
            sets.setdefault(key, []).append(name)
    if not sets:
        raise FileNotFoundError("holds no weights")
    whole = [key for key, files in sets.items() if len(files) == key[-1]]
    if not whole:
        raise FileNotFoundError("holds some shards of its weights and not all of them")
    return sets[min(whole)]
