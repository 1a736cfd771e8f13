"""What HiDiffusion and deep shrink cost beside plain calls: `python -m benchmarks.big_pictures`.

Random weights in the shape of Stable Diffusion 1.5, one row. A call of each kind that a run makes, the kinds taking
turns; a run's time is the mean of its calls' over 20 Karras steps of one evaluation each, each at its own sigma: with
the share that the run spends on each side of a threshold. Peak memory is a call's, above the weights.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from statistics import median
from typing import Any

import click
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import machine
from benchmarks.results import Results, device, writes
from benchmarks.speed.clock import Way, interleave
from benchmarks.speed.ways import random_weights
from ella_kd.models import NoiseSchedule, UNet
from ella_kd.models.hidiffusion import Shrink, hidiffusion
from ella_kd.models.inside import Inside
from ella_kd.samplers import get_sigmas_karras

STEPS = 20


def networks(unet: UNet, latents: int) -> dict[str, Any]:
    return {"plain": unet, "HiDiffusion": Inside(unet, *hidiffusion(unet, latents, latents)),
            "deep shrink": Inside(unet, Shrink())}


def sizes(network: Any, sigma: float) -> tuple[str, ...]:
    """What a call at this sigma changes, but for how far windows are moved, which costs nothing."""
    return tuple(type(change).__name__ for change in getattr(network.at((sigma,)), "now", ()))


def calls(unet: UNet, latents: int, sigmas: list[float]) -> dict[tuple[str, ...], Any]:
    """The kinds of calls, each with a network that makes one."""
    found: dict[tuple[str, ...], Any] = {}
    for network in networks(unet, latents).values():
        for sigma in sigmas:
            found.setdefault(sizes(network, sigma), network.at((sigma,)))
    return found


def flops(unet: UNet, latents: int, sigmas: list[float]) -> dict[tuple[str, ...], int]:
    """Of each kind of call, counted without values, attention as two matrix products."""
    found = {}
    with torch.device("meta"):
        x, t, tokens = torch.empty(1, 4, latents, latents), torch.empty(1), torch.empty(1, 77, 768)
        for named, one in calls(UNet(unet.config), latents, sigmas).items():
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                one(x, t, tokens)
            found[named] = counter.get_total_flops()
    return found


@click.command()
@click.option("--pixels", type=int, multiple=True, default=(1024, 1536), show_default=True)
@click.option("--rounds", type=int, default=2, show_default=True)
@click.option("--device", "at", callback=device, default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@writes("big_pictures")
def main(results: Results, pixels: tuple[int, ...], rounds: int, at: torch.device, dtype: str) -> None:
    """Time, FLOPs and memory of calls and of whole runs."""
    schedule, kind = NoiseSchedule.sd15(), getattr(torch, dtype)
    sigmas = get_sigmas_karras(STEPS, schedule.sigma_min, schedule.sigma_max)[:-1].tolist()
    torch.manual_seed(0)
    unet = random_weights(UNet()).requires_grad_(False).to(at, kind)
    rows, kept = [], []
    for side in pixels:
        latents = side // 8
        x, tokens = torch.randn(1, 4, latents, latents).to(at, kind), torch.randn(1, 77, 768).to(at, kind)
        t = torch.full((1,), 500.0, device=at)
        kinds = calls(unet, latents, sigmas)
        ways = [Way(" + ".join(named) or "plain", "once", torch.no_grad()(partial(one, x, t, tokens)))
                for named, one in kinds.items()]
        measured, _ = interleave(ways, rounds, at, kind, click.echo)
        counted = flops(unet, latents, sigmas)
        each = {named: (median(one.seconds), counted[named], one.peak) for named, one in zip(kinds, measured)}
        plain = each[()]
        for name, network in networks(unet, latents).items():
            made = Counter(sizes(network, sigma) for sigma in sigmas)
            seconds, work = (sum(count * each[named][i] for named, count in made.items()) / STEPS for i in (0, 1))
            peak = max(each[named][2] for named in made)
            shares = ", ".join(f"{count} {' + '.join(named) or 'plain'}" for named, count in made.items())
            rows.append(f"| {side} | {name} | {shares} | {seconds:.2f} | {plain[0] / seconds:.2f} | "
                        f"{plain[1] / work:.2f} | {peak:.0f} |")
            kept.append({"pixels": side, "name": name, "calls": shares, "seconds": seconds, "flops": work,
                         "peak MiB": peak, "times": plain[0] / seconds, "times flops": plain[1] / work})
            click.echo(rows[-1])
    head = ["| pixels | network | of 20 evaluations | s each | times as fast | FLOPs, times fewer | peak MiB |",
            "|---|---|---|---|---|---|---|"]
    results.write_tables({"big pictures": "\n".join(head + rows), "big pictures measured":
                          f"`python -m benchmarks.big_pictures --rounds {rounds}`, {dtype}, on {machine()}."})
    (results.folder / "big_pictures.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
