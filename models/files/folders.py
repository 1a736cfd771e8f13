"""Add-ons by their names, in a folder of them: flat, or with the folders of A1111's web UI or of ComfyUI in it."""

import difflib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ella_kd.models.files.kinds import kind_of_path
from ella_kd.models.files.weights import Weights

SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")
# Where the two keep each kind, in any case; under the folder itself or its `models`.
FOLDERS = {"lora": ("lora", "loras", "lycoris"), "embedding": ("embeddings", "textual_inversion"),
           "control": ("controlnet", "t2i_adapter", "t2i-adapter"),
           "image_encoder": ("clip_vision", "image_encoder"),
           "image_prompt": ("ipadapter", "ip-adapter", "ip_adapter", "controlnet"),
          "upscaler": ("esrgan", "realesrgan", "swinir", "dat", "hat", "upscale_models")}


def look_up(name: str, place: str, folder: str | Path) -> Path:
    """The file or diffusers folder of a name: with or without its ending, or a path in the folder.

    It may lie in the folder itself, or anywhere below its folders for the kind. A LoRA is found by the name in its
    header (ss_output_name) too, as in A1111. Raises FileNotFoundError with the nearest names, or for a missing folder,
    and ValueError if several files have the name.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of models at {root}")
    wanted = name.replace("\\", "/").strip("/")
    known = _known(root, place)
    found = [path for path in known if _is(path, wanted)]
    exact = [path for path in found if path.parent == root or path.relative_to(root).as_posix() == wanted]
    found = exact or found or ([path for path in known if _alias(path) == name] if place == "lora" else [])
    if len(found) > 1:
        raise ValueError(f"{folder} has {len(found)} files of the name {name}, {', '.join(map(str, found[:3]))}: give "
                         "the path of one")
    if not found:
        names = sorted({path.stem for path in known})
        near = difflib.get_close_matches(name, names, 3) or names[:5]
        raise FileNotFoundError(f"no {place} {name} in {folder}: " + (f"there is {', '.join(near)}" if near else
                                f"nothing lies there or in its folders {', '.join(FOLDERS[place])}"))
    return found[0]


def names(place: str, folder: str | Path) -> list[str]:
    """What `look_up` finds of a kind, by the shortest names that tell them apart; files of other kinds are left out.

    Raises FileNotFoundError for a missing folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of models at {root}")
    found = [path for path in _known(root, place) if _kind(path) == place]
    stems = Counter(path.stem if path.is_file() else path.name for path in _known(root, place))
    return [path.stem if path.is_file() and stems[path.stem] == 1 else path.relative_to(root).as_posix()
            for path in found]


def _kind(path: Path) -> str:
    with suppress(OSError, ValueError):
        return kind_of_path(path).place
    return ""


def _is(path: Path, wanted: str) -> bool:
    own = f"/{path.as_posix()}"
    return any(own.endswith(f"/{wanted}{suffix}") for suffix in ("", path.suffix))


def _alias(path: Path) -> str:
    with suppress(OSError, ValueError):
        return Weights(path).metadata.get("ss_output_name", "") if path.is_file() else ""
    return ""


def _known(root: Path, place: str) -> tuple[Path, ...]:
    """Every file of weights and diffusers folder there, in order."""
    found = [path for path in sorted(root.iterdir()) if _is_model(path)]
    for outer in (root, root / "models"):
        for inner in sorted(outer.iterdir()) if outer.is_dir() else ():
            if inner.is_dir() and inner.name.lower() in FOLDERS[place]:
                found += _below(inner)
    return tuple(dict.fromkeys(found))


def _below(folder: Path) -> Iterator[Path]:
    for at, folders, names in os.walk(folder, followlinks=True):
        whole = [name for name in sorted(folders) if _is_model(Path(at) / name)]
        yield from (Path(at) / name for name in (*sorted(names), *whole) if _is_model(Path(at) / name))
        folders[:] = sorted(set(folders) - set(whole))


def _is_model(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES if path.is_file() else (path / "config.json").is_file()
