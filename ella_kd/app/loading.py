"""The models of a batch or a grid: by the command's words, loaded when they are needed, one at a time."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ella_kd.models.devices import check_device, check_dtype
from ella_kd.models.files.hashes import sha256
from ella_kd.models.files.hub import find, find_all, with_preset
from ella_kd.options import FILES, load
from ella_kd.pipeline import MINIATURE, Pipeline
from ella_kd.starting import picture_size

#: What `ella_kd.options.model_options` declares, with the defaults.
WORDS: dict[str, Any] = {"model": "miniature", **dict.fromkeys(FILES), "offset": None, "prediction": None,
                         "device": None, "dtype": None, "offload": False, "keep_t5": False, "fast": False}
WEIGHTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Models:
    """The models of a run by their names there: `models("")` is a Pipeline.

    options: what the command says of each (`WORDS`). modes, sizes: what the requests of each need, with who says so
    (`Checker`); checked when the model is loaded.
    """

    options: Mapping[str, Mapping[str, Any]]
    modes: Mapping[str, Mapping[Any, str]]
    sizes: Mapping[str, Mapping[tuple[int | None, int | None], str]]

    def __call__(self, name: str = "") -> Pipeline:
        """Raises ValueError or FileNotFoundError for files that are not there or do not fit, and for requests that the
        model cannot draw."""
        return _loaded(json.dumps({**WORDS, **self.options[name]}), tuple(self.modes[name].items()),
                       tuple(self.sizes[name].items()))

    def facts(self) -> dict[str, dict[str, str]]:
        """What of each decides the pictures: the sha256 of its files, the dtype."""
        return {name: facts({**WORDS, **options}) for name, options in self.options.items()}


@lru_cache(1)
def _loaded(options: str, modes: tuple[tuple[Any, str], ...],
            sizes: tuple[tuple[tuple[int | None, int | None], str], ...]) -> Pipeline:
    pipeline = load(json.loads(options), [(f"mode {mode} ({where})", mode) for mode, where in modes])
    check_sizes(pipeline, dict(sizes))
    return pipeline


def check_sizes(pipeline: Pipeline, sizes: Mapping[tuple[int | None, int | None], str]) -> None:
    """ValueError for widths and heights that the pipeline cannot draw; who says so is named."""
    for (width, height), where in sizes.items():
        try:
            picture_size(pipeline, width, height)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def facts(options: Mapping[str, Any]) -> dict[str, str]:
    """What of a model's options decides the pictures."""
    specs = with_preset({name: options[name] for name in FILES},
                        None if options["model"] == "miniature" else options["model"])
    if any(specs.values()):
        files = {str(part): path for part, path in find_all(specs).items() if path is not None}
    else:
        files = {name: MINIATURE / name for name in ("sd.safetensors", "tsc.safetensors", "t5", "clip")}
    if options["offset"]:
        files["offset"] = find(options["offset"])
    told = {"dtype": str(check_dtype(options["dtype"], check_device(options["device"]))).removeprefix("torch.")}
    told |= {name: str(options[name]) for name in ("prediction", "fast") if options[name]}
    return told | {part: f"{Path(path).name} {_fingerprint(Path(path))}" for part, path in files.items()}


def _fingerprint(path: Path) -> str:
    """The beginning of the sha256 of a file, or of all that a folder holds: of weights their safetensors, if any."""
    if path.is_file():
        return sha256(path)[:16]
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    safe = any(file.suffix == WEIGHTS[0] for file in found)
    kept = [file for file in found if not safe or file.suffix not in WEIGHTS[1:]]
    return hashlib.sha256("".join(f"{file.relative_to(path)} {sha256(file)}\n" for file in kept).encode()
                          ).hexdigest()[:16]


Pipelines = Callable[[str], Pipeline]
