"""What our own files say in their header beside ModelSpec's names: what the shapes do not tell."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ella_kd.models.files.layout import json_in
from ella_kd.models.files.weights import SAFETENSORS, Weights

CONFIG = "ella_kd"  # a JSON object
KEPT = {f"modelspec.{name}" for name in ("title", "resolution", "description", "author", "date", "license", "tags",
                                         "usage_hint", "trigger_phrase", "merged_from", "timestep_range",
                                         "encoder_layer", "thumbnail")}
WHOLE = {"num_heads", "head_dim", "heads"}


def kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """ModelSpec's words about a model that stay true in another layout and in other numbers."""
    return {name: text for name, text in metadata.items() if name in KEPT}


def config_of(weights: Weights) -> dict[str, Any]:
    """num_heads, head_dim and heads (whole numbers), scale, mean and std (numbers, one per channel); without what is
    null. Raises ValueError for bad values."""
    path = weights.path
    try:
        config = json.loads(weights.metadata.get(CONFIG, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the metadata {CONFIG!r} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the metadata {CONFIG!r} must be a JSON object, got {config!r:.200}")
    config = {key: value for key, value in config.items() if value is not None}
    for key in WHOLE & config.keys():  # 2.0 is 2 to einops' cache: later a 2 fails too
        if type(config[key]) is not int or config[key] < 1:
            raise ValueError(f"{path}: {key} in the metadata {CONFIG!r} must be a whole number of at least 1, got "
                             f"{config[key]!r}")
    if "scale" in config and not (type(config["scale"]) in (int, float) and 0 < config["scale"] < math.inf):
        raise ValueError(f"{path}: scale in the metadata {CONFIG!r} must be a number above 0, got {config['scale']!r}")
    for key in {"mean", "std"} & config.keys():
        numbers = config[key]
        if not isinstance(numbers, list) or not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
            raise ValueError(f"{path}: {key} in the metadata {CONFIG!r} must be a list of numbers, got "
                             f"{numbers!r:.200}")
        config[key] = tuple(map(float, numbers))
    return config


def size_of(path: Path, factor: int = 8) -> int | None:
    """The side of pictures that a file's `modelspec.resolution` names, or the configuration of a folder's UNet.

    factor: pixels per latent. Raises as `Weights` does.
    """
    if path.is_dir():
        side = json_in(path / "unet" / "config.json").get("sample_size")
        return factor * side if type(side) is int and side > 0 else None
    if path.suffix.lower() not in SAFETENSORS:
        return None
    side = Weights(path).metadata.get("modelspec.resolution", "").partition("x")[0]
    return int(side) if side.isdecimal() and 0 < int(side) < 100_000 else None
