"""ELLA's connector on disk."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ella_kd.models.devices import check_device, check_dtype
from ella_kd.models.files.building import build, check_dtypes, fill
from ella_kd.models.files.kinds import hint, kind_of
from ella_kd.models.files.layout import Part, json_in
from ella_kd.models.files.metadata import CONFIG, config_of
from ella_kd.models.files.names import Source
from ella_kd.models.files.weights import Weights, write_tensors
from ella_kd.models.tsc import TSC


def load_tsc(path: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu") -> TSC:
    """Read a connector of any dimensions, such as `ella-sd1.5-tsc-t5xl.safetensors`, in eval mode, without gradients.

    path: a file, or a folder with one. dtype None: fp32 on a CPU, fp16 elsewhere. The heads are not in the shapes: the
    file's metadata, else 8. Raises FileNotFoundError, or ValueError naming the first tensors that are missing, extra,
    misshapen or no finite floats, and saying what the file looks like if it is another kind.
    """
    device = check_device(device)
    dtype = check_dtype(dtype, device)
    weights = Weights(connector_file(Path(path)))
    heads = config_of(weights).get("heads", 8)
    told = f"{path} is not what this loads{hint(kind_of(weights), 'tsc')}"
    part = Part("tsc", weights, {name: Source(name, tuple(shape)) for name, shape in weights.shapes.items()})
    tsc = build(lambda part: TSC(**TSC.arguments_from_shapes(part.shapes), heads=heads), part, told)
    check_dtypes(part)
    return fill(tsc, part, told, dtype, device)


def save_tsc(path: str | Path, tsc: TSC, metadata: Mapping[str, str] | None = None, *,
             dtype: torch.dtype | None = None) -> None:
    """Write a connector as `load_tsc` reads it. The file appears whole or not at all."""
    tensors = {name: x if dtype is None else x.to(dtype) for name, x in tsc.state_dict().items()}
    write_tensors(path, tensors, {CONFIG: json.dumps({"heads": tsc.heads}), **(metadata or {})})


def connector_file(path: Path) -> Path:
    """A connector's file; of a folder without a configuration the only .safetensors in it."""
    if not path.is_dir() or (path / "model_index.json").is_file():
        return path
    files = sorted(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 else path


def check_connector(tsc: TSC, file: str | Path | None, width: int, t5: str | Path) -> None:
    """Raises ValueError for a connector that belongs to another UNet or to another T5."""
    tokens = tsc.connector.latents.shape[1]
    if tokens != width:
        raise ValueError(f"the connector {file} makes tokens of width {tokens}, the checkpoint's UNet takes {width}: "
                         "they belong to different models (ELLA's published one is Stable Diffusion 1.5's)")
    known = json_in(Path(t5) / "config.json").get("d_model")
    if type(known) is int and known != tsc.input_dim:
        raise ValueError(f"the T5 in {t5} has width {known}, the connector {file} was trained on one of "
                         f"{tsc.input_dim}" + " (flan-t5-xl)" * (tsc.input_dim == 2048))
