"""Where the parts of a system run, in which numbers, and where they wait while they have nothing to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import nn

from ella_kd.models.devices import check_device, check_dtype
from ella_kd.models.parameters import moved
from ella_kd.models.winograd import WinogradConv2d

M = TypeVar("M", bound=nn.Module)

Name = Literal["unet", "vae", "clip", "tsc", "t5"]
OVERFLOWS = ("sdxl", "refiner", "ssd-1b", "vega")  # families whose autoencoder is lost in float16


@dataclass(frozen=True)
class Place:
    """One part's: the device it runs on, its dtype, and where it waits; rest None: out of memory, it is read again."""

    device: torch.device
    dtype: torch.dtype
    rest: torch.device | None


@dataclass(frozen=True)
class Placement:
    """What of a system is where: right by default, and what is said explicitly wins.

    device None: cuda if there is one, else the CPU. dtype None: fp16 on a GPU, fp32 on a CPU. vae_dtype None: dtype,
    but float32 for SDXL's autoencoder, which overflows in float16. t5_dtype None: dtype, but not bfloat16, which
    changes ELLA's pictures visibly (ELLA issue 23): float16 on a GPU, float32 on a CPU.
    keep_t5: T5 stays where it runs; otherwise it leaves once a batch's prompts are encoded: from a CUDA device to the
    CPU's memory, elsewhere altogether, to be read again for the next prompt. offload: every part waits in the CPU's
    memory and comes to the device for its work, one after another; for small cards.
    Raises ValueError for a device or a dtype that there is not.
    """

    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    vae_dtype: str | torch.dtype | None = None
    t5_dtype: str | torch.dtype | None = None
    keep_t5: bool = False
    offload: bool = False

    def of(self, part: Name, family: str = "") -> Place:
        """The place of a part, in a family of `models.files.kinds`."""
        device = check_device(self.device)
        dtype = check_dtype(self.dtype, device)
        on_cpu, cpu = device.type == "cpu", torch.device("cpu")
        rest: torch.device | None = cpu if self.offload else device
        if part == "vae":
            wide = dtype == torch.float16 and family in OVERFLOWS
            dtype = check_dtype(self.vae_dtype or (torch.float32 if wide else dtype), device)
        if part == "t5":
            narrow = torch.float32 if on_cpu else torch.float16
            dtype = check_dtype(self.t5_dtype or (narrow if dtype == torch.bfloat16 else dtype), device)
            if not self.keep_t5:
                rest = cpu if device.type == "cuda" else None
        return Place(device, dtype, rest)


@contextmanager
def carried(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on a device; at the end of the block its own tensors are back, and those there are let go.

    Nothing is copied back: what is trained in the block is lost. One thread at a time.
    """
    tensors = {id(x): x for x in [*module.parameters(), *module.buffers()]}.values()
    waiting = [x.data for x in tensors]
    try:
        for x in tensors:
            x.data = x.data.to(device)
        yield
    finally:
        for x, data in zip(tensors, waiting):
            x.data = data


def moved_part(module: M, device: str | torch.device | None, dtype: torch.dtype | None) -> M:
    """A copy of the module there, which shares the tensors that need no change. ValueError for rounded filters."""
    if dtype is not None and any(isinstance(part, WinogradConv2d) and part.into.dtype != dtype
                                 for part in module.modules()):
        raise ValueError(f"the filters of a network that is fast_on_cpu are rounded once: cast it to {dtype} first, "
                         "sd.to(dtype=...).fast_on_cpu()")
    return moved(module, device, dtype)
