"""Clocks that wait for the device, rounds in which everybody takes a turn, peak memory, FLOPs and the matrix peak."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20


@dataclass(frozen=True)
class Way:
    """One way to draw: `run()` returns the latents. mode: eager, fast, compiled, fast compiled, or fp32."""

    name: str
    mode: str
    run: Callable[[], Tensor]


@dataclass
class Measured:
    """Seconds of the rounds and of the first run, compilation included; flops of the eager run, 0 if it was not
    counted; peak: MiB above what was held before a run; answer: latents, on the CPU in fp32."""

    first: float
    flops: int
    answer: Tensor
    seconds: list[float]
    peak: float = 0.0


def clock(run: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds from an idle device to an idle device, and the answer."""
    _synchronize(device)
    begin = time.perf_counter()
    answer = run()
    _synchronize(device)
    return time.perf_counter() - begin, answer


def interleave(ways: list[Way], rounds: int, device: torch.device, dtype: torch.dtype,
               log: Callable[[str], object]) -> tuple[list[Measured], list[float]]:
    """Every way once to warm up, then rounds in which each has its turn; and each round's matrix peak in FLOP/s."""
    found: list[Measured] = []
    for way in ways:
        counter = FlopCounterMode(display=False)
        if way.mode == "eager":
            with counter:
                first, answer = clock(way.run, device)
        else:
            first, answer = clock(way.run, device)
        found.append(Measured(first, counter.get_total_flops(), answer.float().cpu(), []))
        log(f"  {way.name}, {way.mode}: first run {first:.2f} s")
    peaks = []
    for i in range(rounds):
        peaks.append(matrix_peak(device, dtype))
        for way, measured in list(zip(ways, found))[:: 1 if i % 2 else -1]:  # back and forth: nobody is always last
            before = _memory(device)
            measured.seconds.append(clock(way.run, device)[0])
            measured.peak = max(measured.peak, _peak_memory(device) - before)
        log(f"  round {i + 1}: " + ", ".join(f"{measured.seconds[-1]:.3f}" for measured in found) + " s")
    return found, peaks


def matrix_peak(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP/s of a large square matrix product, the best of a few: what the machine gives at this moment."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    clock(lambda: a @ b, device)
    return 2 * n**3 / min(clock(lambda: a @ b, device)[0] for _ in range(repeats))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> float:
    """MiB held now; the peak starts anew. On a CPU resident memory, on Linux; NaN where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / MIB
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return _status("VmRSS")


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return _status("VmHWM") if Path("/proc/self/status").exists() else float("nan")


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) / 1024
