"""Text features on disk: a prompt is encoded once, and sampling needs no text encoder in memory."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ella_kd.models.devices import check_device
from ella_kd.models.files.weights import read_tensors, write_tensors
from ella_kd.models.text import TextFeatures, check_features

FeatureMode = Literal["flexible", "fixed", "clip"]
HEADER = "ella_kd_features"  # metadata: JSON with the names below
FIELDS = {"version": int, "prompts": list, "encoder": str, "mode": str, "dtype": str}


@dataclass(frozen=True, eq=False)
class SavedFeatures:
    """Features with what they were made of: the prompt of each row, the encoder's name, and how it was asked.

    mode: "flexible" (the real T5 tokens), "fixed" (T5 padded to one length, padding seen) or "clip".
    """

    features: TextFeatures
    prompts: tuple[str, ...]
    encoder: str
    mode: FeatureMode

    def __getitem__(self, prompt: str) -> TextFeatures:
        """One prompt's features, tokens [1, L, D], without what padded it. Raises KeyError naming similar prompts."""
        if prompt not in self.prompts:
            near = difflib.get_close_matches(prompt, self.prompts, 3, 0)
            raise KeyError(f"{prompt!r} is none of the {len(self.prompts)} saved prompts; nearest are {near}")
        i = self.prompts.index(prompt)
        tokens, mask = self.features.tokens[i:i + 1], self.features.mask
        if mask is None or mask.dtype != torch.bool:
            return TextFeatures(tokens, None if mask is None else mask[i:i + 1])
        length = int(mask[i].nonzero().max()) + 1
        kept = mask[i:i + 1, :length]
        return TextFeatures(tokens[:, :length], None if kept.all() else kept)


def save_features(path: str | Path, features: TextFeatures, prompts: str | Sequence[str], *, encoder: str,
                  mode: FeatureMode) -> None:
    """Write features [B, L, D] and their mask, bit by bit, with the prompts of the rows, the encoder's name
    ("flan-t5-xl"), the mode (see `SavedFeatures`) and the dtype in the header.

    The file, a .safetensors, appears whole or not at all. Raises ValueError if rows and prompts differ in number, for
    values that are not finite, a mask that does not fit, or an unknown mode; FileNotFoundError without the folder.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    _check(features, texts, encoder, mode)
    header = {"version": 1, "prompts": texts, "encoder": encoder, "mode": mode, "dtype": _name(features.tokens)}
    tensors = {"tokens": features.tokens} | ({} if features.mask is None else {"mask": features.mask})
    write_tensors(path, tensors, {HEADER: json.dumps(header)})


def load_features(path: str | Path, *, device: str | torch.device = "cpu") -> SavedFeatures:
    """Read what `save_features` wrote, in the dtype it had; `ELLA(tsc, load_features(path).features)` samples with it.

    Raises FileNotFoundError, or ValueError for any file that is not exactly what `save_features` writes.
    """
    device = check_device(device)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no features at {path}")
    tensors, metadata = read_tensors(path)
    try:
        header = _header(metadata)
        if not {"tokens"} <= set(tensors) <= {"tokens", "mask"}:
            raise ValueError(f"it holds the tensors {sorted(tensors)[:5]}, not tokens and perhaps a mask")
        features = TextFeatures(tensors["tokens"], tensors.get("mask"))
        _check(features, header["prompts"], header["encoder"], header["mode"])
        if header["dtype"] != _name(features.tokens):
            raise ValueError(f"it says that the tokens are {header['dtype']}, and they are {_name(features.tokens)}")
    except ValueError as error:
        raise ValueError(f"{path} holds no text features: {error}") from error
    moved = TextFeatures(features.tokens.to(device), None if features.mask is None else features.mask.to(device))
    return SavedFeatures(moved, tuple(header["prompts"]), header["encoder"], header["mode"])


def _header(metadata: dict[str, str]) -> dict[str, Any]:
    if HEADER not in metadata:
        raise ValueError(f"its metadata has no {HEADER!r}: write features with save_features")
    try:
        header = json.loads(metadata[HEADER])
    except json.JSONDecodeError as error:
        raise ValueError(f"its metadata {HEADER!r} is not JSON: {error}") from error
    if not isinstance(header, dict) or {name: type(value) for name, value in header.items()} != FIELDS:
        raise ValueError(f"its metadata {HEADER!r} must have the fields {', '.join(FIELDS)}, got {header!r:.200}")
    if header["version"] != 1:
        raise ValueError(f"it is of version {header['version']}, this ella_kd reads version 1")
    return header


def _check(features: TextFeatures, prompts: Sequence[str], encoder: str, mode: str) -> None:
    tokens, mask = features.tokens, features.mask
    if mode not in get_args(FeatureMode):
        raise ValueError(f"unknown mode {mode!r}: expected one of {', '.join(get_args(FeatureMode))}")
    if not isinstance(encoder, str) or not encoder.strip():
        raise ValueError(f'name the encoder, such as encoder="flan-t5-xl", got {encoder!r}')
    check_features(TextFeatures(tokens, None if mask is None else mask.cpu()))
    if features.vector is not None:
        raise ValueError("features with a vector (SDXL's) are not saved: the file would lose it")
    if len(prompts) != len(tokens) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"features of {len(tokens)} rows need as many prompts, all of them text, got {len(prompts)}: "
                         f"{list(prompts)!r:.100}")
    if not tokens.isfinite().all():
        raise ValueError("the features are not finite: an fp16 encoder that overflowed? Encode them again in fp32")
    if mask is not None and mode == "fixed" and mask.dtype == torch.bool:
        raise ValueError('features of mode "fixed" are seen whole, padding included: their mask is None or weights')
    if mask is not None and not mask.bool().any(1).all():
        raise ValueError("a row of the mask hides every token")


def _name(tokens: Tensor) -> str:
    return str(tokens.dtype).removeprefix("torch.")
