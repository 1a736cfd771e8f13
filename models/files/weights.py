"""A read-only view of a file of tensors, or of the shards in a folder: names, shapes, dtypes and metadata at once, each
tensor when it is asked for. Safetensors, or pickles read by `torch.load(weights_only=True)`: no object is unpickled."""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ella_kd.files import write_safetensors
from ella_kd.models.shapes import Shape

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of diffusers and transformers
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64}
SAFETENSORS = {".safetensors", ".sft"}  # in any case
_ZIP = b"PK\x03\x04"
_LFS = b"version https://git-lfs"


class Weights(Mapping[str, Tensor]):
    """Named tensors on disk: `weights[name]` is memory-mapped where the format allows, on the CPU, in the file's dtype.

    shapes and dtypes (None for one that torch does not know) are known without reading; metadata is a safetensors
    header's. Raises FileNotFoundError, PermissionError, or ValueError naming the file for anything that is empty, cut,
    damaged or something else.
    """

    def __init__(self, path: str | Path, variant: str | None = None) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype | None] = {}
        self._readers: dict[str, Callable[[str], Tensor]] = {}
        self._where: dict[str, Path] = {}
        self.files = _files(self.path, variant)
        for file in self.files:
            self._open(file)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> Self:
        """The same view of tensors in memory; name: what errors call them."""
        weights = cls.__new__(cls)
        weights.path, weights.files, weights.metadata = Path(name), [], {}
        weights.shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        weights.dtypes = {name: x.dtype for name, x in tensors.items()}
        weights._readers = dict.fromkeys(tensors, tensors.__getitem__)
        weights._where = dict.fromkeys(tensors, weights.path)
        return weights

    def __getitem__(self, name: str) -> Tensor:
        read = self._readers[name]
        try:
            return read(name)
        except Exception as error:  # SafetensorError: the shape or dtype is none of torch's
            raise ValueError(f"{self._where[name]}: the tensor {name} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __repr__(self) -> str:
        return f"Weights({str(self.path)!r}, {len(self)} tensors)"

    def _open(self, file: Path) -> None:
        with file.open("rb") as start:
            if start.read(len(_LFS)) == _LFS:
                raise ValueError(f"{file} is a pointer of git-lfs to a file that was not fetched: run `git lfs pull` "
                                 "in its repository, or fetch the file itself")
        if file.suffix.lower() in SAFETENSORS:
            opened = _safetensors(file)
            names, reader = list(opened.keys()), opened.get_tensor
            self.metadata |= opened.metadata() or {}
            slices = {name: opened.get_slice(name) for name in names}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: DTYPES.get(part.get_dtype()) for name, part in slices.items()}
        else:
            tensors, metadata = _unpickled(file)
            self.metadata |= metadata
            names, reader = list(tensors), tensors.__getitem__
            shapes = {name: tuple(x.shape) for name, x in tensors.items()}
            dtypes = {name: x.dtype for name, x in tensors.items()}
        if twice := next((name for name in names if name in self._readers), None):
            raise ValueError(f"{self.path}: {self._where[twice].name} and {file.name} both hold {twice}")
        self.shapes |= shapes
        self.dtypes |= dtypes
        self._readers |= dict.fromkeys(names, reader)
        self._where |= dict.fromkeys(names, file)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of one file. Raises as `Weights` does."""
    weights = Weights(path)
    return dict(weights), weights.metadata


def has_weights(folder: Path) -> bool:
    """Whether a folder is that of one network, as diffusers and transformers write it."""
    return any(True for stem in STEMS for _ in folder.glob(f"{stem}*.safetensors")) or any(
        True for stem in STEMS for _ in folder.glob(f"{stem}*.bin"))


def _files(path: Path, variant: str | None) -> list[Path]:
    """The one file, or the shards of a folder or of an index."""
    if path.is_dir():
        path = _in_folder(path, variant)
    if not path.is_file():
        what = ", it is a link that leads nowhere" if path.is_symlink() else ""
        what = ", it is neither a file nor a folder" if path.exists() else what
        raise FileNotFoundError(f"no checkpoint at {path}{what}")
    return _shards(path) if path.suffix == ".json" else [path]


def _in_folder(folder: Path, variant: str | None) -> Path:
    names = sorted(path.name for path in folder.iterdir())
    variants = {name.split(".")[-2 if name.endswith(".json") else 1].partition("-")[0] for name in names
                if name.count(".") > 1 and name.startswith(STEMS)} - {"safetensors", "bin", "index"}
    order = [variant] if variant else [None, *sorted(variants, key=lambda each: (each != "fp16", each))]
    for each in order:
        for kind in ("safetensors", "bin"):
            for stem in STEMS:
                wanted = ((f"{stem}.{kind}", f"{stem}.{kind}.index.json") if each is None else
                          (f"{stem}.{each}.{kind}", f"{stem}.{kind}.index.{each}.json"))
                if found := next((name for name in wanted if name in names), None):
                    return folder / found
    known = f"; it has the variants {', '.join(sorted(variants))}" if variant and variants else ""
    if (folder / "model_index.json").is_file():
        known = "; it is a whole diffusers folder, whose networks lie in folders of their own"
    raise FileNotFoundError(f"no weights{f' of the variant {variant!r}' if variant else ''} in the folder {folder}: "
                            f"expected {STEMS[0]}.safetensors, model.safetensors or the like{known}")


def _shards(index: Path) -> list[Path]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
        if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ValueError("weight_map must name files beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weights ({type(error).__name__}: {error}): fetch it again") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {len(names)} files, and {', '.join(missing[:3])} "
                                f"{'is' if len(missing) == 1 else 'are'} missing: fetch what is missing")
    return [index.parent / name for name in names]


def _safetensors(path: Path) -> Any:
    with path.open("rb"):  # PermissionError, which safe_open tells as no such file
        pass
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # SafetensorError, and what a damaged header leads to
        empty = "it is empty" if path.stat().st_size == 0 else error
        raise ValueError(f"{path} is not a whole safetensors file ({empty}): fetch it again") from error


def _unpickled(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The named tensors of a pickle, unwrapped as often as they are nested; memory-mapped unless in the old format.

    Beside them the step at which training ended, as metadata.
    """
    if path.suffix == ".gguf":
        raise ValueError(f"{path} is a GGUF file: expected .safetensors or .ckpt")
    try:
        with path.open("rb") as file:
            start = file.read(len(_ZIP))
        zipped = start == _ZIP and zipfile.is_zipfile(path)
        if zipped:
            _check_plain(path)
        with _harmless():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        wants = f" ({', '.join(wanted)})" if (wanted := _wanted(path)) else ", or is no checkpoint at all"
        raise ValueError(f"{path} holds Python objects{wants}, which may run code when read: it is refused; use the "
                         ".safetensors version of this model") from error
    except Exception as error:  # a flipped bit in a pickle can raise anything
        raise ValueError(f"{path} is not a whole torch file ({error}): fetch it again") from error
    step = content.get("global_step") if isinstance(content, dict) else None
    for _ in range(9):
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            break
        content = content["state_dict"]
    tensors, size = _flat(content, path), path.stat().st_size
    if large := next((name for name, x in tensors.items() if x.numel() * x.element_size() > size), None):
        raise ValueError(f"{path} is not a whole torch file (the tensor {large} is larger than it): fetch it again")
    return tensors, {"global_step": str(step)} if type(step) is int else {}


def _check_plain(path: Path) -> None:
    """Raises BadZipFile for a compressed entry, which could be a thousand times the file in memory."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise zipfile.BadZipFile("it is compressed, so it is no checkpoint that torch wrote")


def _flat(content: Any, path: Path) -> dict[str, Tensor]:
    """Of dicts of tensors (an IP-Adapter, an embedding) the names are joined by dots."""
    found: dict[str, Tensor] = {}
    if isinstance(content, Tensor):
        return {"": content}
    for name, x in content.items() if isinstance(content, dict) else ():
        inner = x.items() if isinstance(x, dict) else ()
        found |= {f"{name}.{key}": y for key, y in inner if isinstance(y, Tensor)}
        if isinstance(x, Tensor) and isinstance(name, str):
            found[name] = x
    if not found:
        raise ValueError(f"{path} does not hold named tensors: expected a checkpoint's state dict")
    return found


def _harmless() -> AbstractContextManager[Any]:
    """What published files hold beside tensors: the name of a callback's class, numpy's numbers, a ParameterDict.

    Given as stubs and constructors of plain numbers, so that nothing of the file runs. torch before 2.6 cannot be told
    names, and refuses such files.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        return nullcontext()
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [(type("ModelCheckpoint", (), {}),
                           f"pytorch_lightning.callbacks.{module}ModelCheckpoint") for module in
                          ("model_checkpoint.", "")]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed += [(_Parameters, "torch.nn.modules.container.ParameterDict")]
    return torch.serialization.safe_globals([*allowed, np.dtype, np.dtypes.Float64DType])


class _Parameters(dict[str, Tensor]):
    """What the first textual inversions are saved as."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state["_parameters"])


def _wanted(path: Path) -> list[str]:
    """The names of what a pickle wants to call."""
    try:
        with _harmless():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))[:5]
    except Exception:  # an older torch, or no pickle
        return []


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file that appears whole or not at all. Raises OSError naming the file if it cannot."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"tensors are written as .safetensors, got {path}")
    write_safetensors(path, tensors, metadata)
