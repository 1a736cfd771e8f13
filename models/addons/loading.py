"""A control of either kind from a file: which it is, the file's tensors say."""

from pathlib import Path

import torch
from torch import nn

from ella_kd.models.addons.control_files import load_controlnet
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.addons.t2i import T2IAdapter
from ella_kd.models.files.kinds import kind_of_path


def load_control(path: str | Path, *, base: nn.Module | None = None, dtype: str | torch.dtype | None = None,
                 device: str | torch.device = "cpu") -> ControlNet | T2IAdapter:
    """A ControlNet or a T2I-Adapter; base: the UNet, or a network made of it, which "difference" files and
    Control-LoRAs are told against.

    Raises as `ControlNet.load` and `T2IAdapter.load` do.
    """
    if "T2I-Adapter" in kind_of_path(path).what:
        return T2IAdapter.load(path, dtype=dtype, device=device)
    return load_controlnet(path, base=base, dtype=dtype, device=device)
