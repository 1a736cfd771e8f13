"""Tensors in files: safetensors, or pickles read by `torch.load(weights_only=True)`, never an unpickled object."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ella_kd.files import write_safetensors
from ella_kd.models.kinds import hint


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file, or of a pickle that holds nothing but tensors.

    Raises FileNotFoundError, or ValueError naming the file for anything that is empty, cut, damaged or something else.
    """
    path = Path(path)
    if path.is_dir():
        kind = "a diffusers folder" if (path / "model_index.json").is_file() else "a folder"
        raise FileNotFoundError(f"no checkpoint at {path}, it is {kind}: expected one file, .safetensors or .ckpt")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except PermissionError:
            raise
        except Exception as error:  # SafetensorError, and what a damaged header leads to
            raise ValueError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds Python objects, which may run code when read, or is no checkpoint at all: "
                         "it is refused; use the .safetensors version of this model") from error
    except Exception as error:  # a flipped bit in a pickle can raise anything
        raise ValueError(f"{path} is not a whole torch file ({error}): fetch it again") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) and isinstance(name, str)
                                                for name, x in content.items()):
        looks = hint(map(str, content), " ") if isinstance(content, dict) else ""
        raise ValueError(f"{path} does not hold named tensors{looks}: expected a checkpoint's state dict")
    return content, {}


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file that appears whole or not at all. Raises OSError naming the file if it cannot."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"tensors are written as .safetensors, got {path}")
    write_safetensors(path, tensors, metadata)


def check_weights(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises ValueError naming the first tensor that holds no floats, or floats that torch cannot cast."""
    known = {dtype: _castable(dtype) for dtype in {x.dtype for x in tensors.values()}}
    for name, x in tensors.items():
        if not known[x.dtype]:
            raise ValueError(f"{path}: the weights {name} are {str(x.dtype).removeprefix('torch.')}, expected floats; "
                             "use the float16 or float32 version of this model")


def _castable(dtype: torch.dtype) -> bool:
    try:
        torch.zeros(1, dtype=dtype).float()
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return dtype.is_floating_point
