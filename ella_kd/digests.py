"""What a run is made with, in a few letters: so that a paused run is resumed with the same."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass

import numpy as np
import torch
from torch import Tensor, nn


def digest(value: object) -> str:
    """16 letters of the sha256 of a value: of its tensors and numbers bit for bit, of networks by their class alone.

    Other objects count by their class and what they hold. Tensors on a device are read, which waits for it.
    """
    found = hashlib.sha256()
    for part in _bytes(value):
        found.update(part)
    return found.hexdigest()[:16]


def _bytes(value: object) -> Iterable[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield from _bytes(torch.from_numpy(value))
    elif isinstance(value, (str, bytes, int, float, type(None))):
        yield f"{value!r};".encode()
    else:
        yield f"{type(value).__name__}(".encode()
        for part in () if isinstance(value, nn.Module) else _inside(value):
            yield from _bytes(part)
        yield b")"


def _inside(value: object) -> Iterable[object]:
    """What an object holds; of a dataclass what it was made of, without what it keeps by the way (a `Hint`'s cache)."""
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, Mapping):
        return value.items()
    made_of = {each.name: each.init for each in fields(value)} if is_dataclass(value) else {}
    return [item for item in getattr(value, "__dict__", {}).items() if made_of.get(item[0], True)]
