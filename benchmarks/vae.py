"""Time and memory to encode and decode a large picture: `python -m benchmarks.vae 4096`, on the CPU or --device cuda.

Stable Diffusion 1.5's autoencoder with random weights. Memory is the peak of the process (on a GPU: of what torch
allocated there) beyond what it had with the weights loaded and one small picture done.
"""

import argparse
import resource
import time

import torch

from benchmarks.machine import machine
from ella_kd.models import AutoencoderKL, vae
from ella_kd.models.devices import DTYPES, check_dtype

GB = 1e9


def peak(device: torch.device) -> float:
    """Gigabytes, so far."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / GB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("side", type=int, help="of the square picture, in pixels")
    parser.add_argument("--what", nargs="+", default=["decode", "encode"], choices=["decode", "encode"])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", choices=DTYPES, help="by default float32 on a CPU, else float16")
    parser.add_argument("--how", choices=["strips", "whole"], help="by default as the size decides")
    asked = parser.parse_args()
    dtype = check_dtype(asked.dtype, asked.device)
    torch.manual_seed(0)
    network = AutoencoderKL().to(asked.device, dtype)
    if asked.how:
        vae.WHOLE = asked.side ** 2 if asked.how == "whole" else 0
    network.decode(network.encode(torch.zeros(1, 3, 64, 64)))
    way = "whole" if asked.side ** 2 <= vae.WHOLE else "in strips"
    print(f"{asked.side} px, {dtype}, {way}; {machine()}", flush=True)
    for what in asked.what:
        side = asked.side // (network.factor if what == "decode" else 1)
        before, start = peak(asked.device), time.perf_counter()
        x = torch.randn(1, 4 if what == "decode" else 3, side, side, device=asked.device, dtype=dtype)
        getattr(network, what)(x)
        used, seconds = peak(asked.device) - before, time.perf_counter() - start
        print(f"{what}: {used:.2f} GB beyond the weights, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
