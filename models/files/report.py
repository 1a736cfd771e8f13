"""What is known of a file or folder without loading it: for `ella-kd inspect`."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ella_kd.models.files.building import build, problems
from ella_kd.models.files.checkpoint import MAKERS, needed, parts_at
from ella_kd.models.files.hashes import sha256
from ella_kd.models.files.kinds import FAMILIES, PLACES, Kind, kind_of_path
from ella_kd.models.files.layout import WORDS, Part
from ella_kd.models.files.presets import PRESETS, HubFile
from ella_kd.models.files.schedule import known_prediction
from ella_kd.models.files.weights import Weights

FIRST = 10  # of many names


@dataclass(frozen=True)
class Network:
    """One network's tensors: how many, of how many numbers, in which dtypes."""

    tensors: int
    parameters: int
    dtypes: dict[str, int]  # dtype -> parameters


@dataclass(frozen=True)
class Report:
    """What a file or folder is. prediction is "" where there is no UNet; known: the preset whose sha256 it has."""

    path: str
    kind: str
    place: str
    bytes: int
    networks: dict[str, Network]
    resolution: str = ""
    prediction: str = ""
    prediction_known_by: str = ""
    guess: bool = False
    averages: bool = False  # whether the file holds the moving averages of its UNet (EMA) too
    title: str = ""
    known: str = ""
    sha256: str = ""
    told: dict[str, str] = field(default_factory=dict)  # of an add-on: what its own file says
    trigger_words: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)


def report(path: str | Path, hashed: bool = False) -> Report:
    """What is at a path. hashed: read it whole for its sha256 even if no preset's file has its size.

    Raises as `Weights` does for what cannot be read.
    """
    path = Path(path)
    kind = kind_of_path(path)
    try:
        parts, others = parts_at(path)
    except ValueError:  # the networks do not agree: nothing is known but what the file is
        parts, others = {}, []
    weights = parts["unet"].weights if "unet" in parts else _any(path, parts)
    metadata = weights.metadata
    found: dict[str, Any] = {}
    if kind.read and "unet" in parts:
        known = known_prediction(path, weights, parts["unet"], kind.family, kind.purpose)
        found = {"prediction": known.prediction, "prediction_known_by": known.how, "guess": known.guess,
                 "resolution": metadata.get("modelspec.resolution") or _side(kind, parts, known.prediction),
                 "averages": any(name.startswith("model_ema.diffusion") for name in weights)}
        wrong = [line for part in parts.values() for line in _problems(part, kind)]
        extra = [line.removeprefix("unexpected: ") for line in wrong if line.startswith("unexpected: ")]
        found |= {"missing": [line for line in wrong if not line.startswith("unexpected: ")], "extra": extra + others}
    found["told"] = _told(path, kind)
    name, digest = _known(path, hashed)
    return Report(str(path), kind.what or "unknown", PLACES.get(kind.place, ""),
                  sum(file.stat().st_size for file in _files(weights, parts)),
                  {WORDS[part]: _network(each.weights, [source.name for source in each.sources.values()])
                   for part, each in parts.items()} or {"tensors": _network(weights, weights)},
                  title=metadata.get("modelspec.title", ""), known=name, sha256=digest,
                  trigger_words=_triggers(metadata), **found)


def _told(path: Path, kind: Kind) -> dict[str, str]:
    """What an add-on says of itself; nothing of one that cannot be used."""
    from ella_kd.models.addons.embeddings import Embedding
    from ella_kd.models.addons.lora import LoRA

    weights = Weights(path) if kind.place in ("control", "image_prompt") else {}
    try:
        told = (LoRA.load(path).described() if kind.place == "lora" else
                Embedding.load(path).described() if kind.place == "embedding" else {})
    except ValueError as error:
        return {"cannot be used": str(error)}
    widths = {weights.shapes[name][-1] for name in weights
              if name.endswith(("attn2.to_k.weight", "to_k_ip.weight"))} if isinstance(weights, Weights) else set()
    if len(widths) == 1:
        told["base"] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}.get(widths.pop(), "")
    if base := told.pop("base", ""):
        told["base"] = FAMILIES.get(base, base)
    return told


def _any(path: Path, parts: dict[str, Part]) -> Weights:
    return next(iter(parts.values())).weights if parts else Weights(path)


def _files(weights: Weights, parts: dict[str, Part]) -> set[Path]:
    return {file for each in (weights, *(part.weights for part in parts.values())) for file in each.files}


def _network(weights: Weights, names: Iterable[str]) -> Network:
    sizes: Counter[str] = Counter()
    names = set(names)
    for name in names:
        number = 1
        for side in weights.shapes[name]:
            number *= side
        sizes[str(weights.dtypes[name]).removeprefix("torch.")] += number
    return Network(len(names), sizes.total(), dict(sizes.most_common()))


def _side(kind: Kind, parts: dict[str, Part], prediction: str) -> str:
    """The side of a picture, as the configuration says or as is usual in the family."""
    side = parts["unet"].config.get("sample_size")
    if type(side) is int and kind.purpose != "x4 upscaler":
        return f"{8 * side}x{8 * side}"
    return f"usually {kind.size(prediction)}x{kind.size(prediction)}"


def _problems(part: Part, kind: Kind) -> list[str]:
    try:
        part = needed(part, kind)
        return problems(build(MAKERS[part.name], part, f"the {WORDS[part.name]}", kind), part)
    except ValueError as error:
        return [str(error)]


def _known(path: Path, hashed: bool) -> tuple[str, str]:
    """The preset's part whose sha256 the file has, and the sha256 if it was computed."""
    if not path.is_file():
        return "", ""
    files = {(name, part): file for name, preset in PRESETS.items() for part, file in preset.parts.items()
             if file.sha256}
    if not hashed and not any(_may_be(file, path) for file in files.values()):
        return "", ""
    digest = sha256(path)
    return next((f"{name} ({file})" for (name, _), file in files.items() if file.sha256 == digest), ""), digest


def _may_be(file: HubFile, path: Path) -> bool:
    size = path.stat().st_size
    rounded = file.bytes is None or file.bytes % 1_000_000 == 0
    return size == file.bytes or (rounded and path.name == Path(file.path).name)


def _triggers(metadata: dict[str, str]) -> list[str]:
    """The words that call what a LoRA was trained for: the author's, else the commonest tags of its training."""
    if said := metadata.get("modelspec.trigger_phrase"):
        return [said]
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({str(tag).strip(): int(n) for tag, n in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []
    return [tag for tag, _ in counts.most_common(FIRST)]
