"""Where networks run, and in which numbers: checked before any work."""

import warnings

import torch
from torch import Tensor, nn

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def check_device(name: str | torch.device | None) -> torch.device:
    """The device of a name such as "cpu", "cuda:1" or "mps"; None: cuda if there is one, else the CPU.

    Raises ValueError for a device that this machine, or this build of torch, does not have, and for "meta".
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each backend has errors of its own
        reason = str(error).partition("\n")[0]
        raise ValueError(f"this machine, or this build of torch, has no device {str(name)!r} ({reason}): choose "
                         f"{' or '.join(_present())}") from error
    if device.type == "meta":
        raise ValueError(f"device 'meta' holds no numbers to draw with: choose {' or '.join(_present())}")
    return device


def check_dtype(dtype: str | torch.dtype | None, device: str | torch.device) -> torch.dtype:
    """The dtype of networks on a device, given as torch.float16 or "float16"; None: float32 on a CPU, else float16.

    Warns of float16 on a CPU. Raises ValueError for any but float16, bfloat16, float32 and float64.
    """
    on_cpu = torch.device(device).type == "cpu"
    if dtype is None:
        return torch.float32 if on_cpu else torch.float16
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"networks run in {', '.join(DTYPES)}, got dtype {dtype!r}")
    if on_cpu and found == torch.float16:
        warnings.warn("float16 on a CPU takes about 100 times as long as float32: take float32, or bfloat16 for less "
                      "memory", stacklevel=1)  # here, so that three networks loaded together say it once
    return found


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, which nobody waits for: a GPU fetches it from pinned memory by itself, while a copy from
    any other memory of the host makes the host wait. One that is no longer on the host cannot be pinned."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def outliving(x: Tensor) -> Tensor:
    """What a network has answered, to be kept beyond its next call: a CUDA graph writes that one over it."""
    return x.clone() if x.is_cuda else x


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that there is not memory enough, in torch's words for a CPU too."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "allocate" in str(error))


def place_of(network: nn.Module) -> str:
    """For a network's repr: "float32 on cpu"."""
    parameter = next(network.parameters())
    return f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"


def _present() -> list[str]:
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]
