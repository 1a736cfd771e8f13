"""Four prompts in one picture of twice the miniature's size, in tiles and without: `python -m benchmarks.tiles`.

Each quarter has a dense prompt of its own (`Regions`). It is read as a picture of its own from its own latents: the
miniature's autoencoder knows one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.miniature.questions import ask, summary
from benchmarks.miniature.scenes import Scene, parse
from benchmarks.results import Results, writes
from benchmarks.score import SCALE, STEPS, held_out, write_captions
from ella_kd import CFG, Box, Pipeline, Regions
from ella_kd.conditioning import Stack
from ella_kd.images import to_images
from ella_kd.models.tiled import Tiled
from ella_kd.samplers import get_sampler, get_sigmas_karras, randn

Found = dict[str, dict[str, tuple[float, float]]]  # by way and sampler
QUARTERS = [Box(x / 2, y / 2, (x + 1) / 2, (y + 1) / 2) for y in (0, 1) for x in (0, 1)]
SAMPLERS = ("dpmpp_2m", "euler_ancestral", "dpmpp_2m_cfg_pp")


def ways(side: int) -> dict[str, Any]:
    """What becomes of the network, by name; side: of a picture of its own size, in latents."""
    return {"the whole picture at once": lambda unet: unet,
            "tiles without overlap": lambda unet: Tiled(unet, side, 0),
            "tiles that overlap by half": lambda unet: Tiled(unet, side, side // 2),
            "the same, gaussian weights": lambda unet: Tiled(unet, side, side // 2, "gaussian")}


@torch.no_grad()
def latents(pipeline: Pipeline, cond: Any, sampler: str, rows: int, side: int) -> Tensor:
    cfg_pp = get_sampler(sampler).cfg_pp
    denoiser = pipeline.denoiser(CFG(0.6 if cfg_pp else SCALE))
    sigmas = get_sigmas_karras(STEPS, denoiser.sigma_min, denoiser.sigma_max)
    seeds = list(range(rows))
    args = {"cond": cond, "uncond": pipeline.encode("")}
    return get_sampler(sampler).function(denoiser, randn((rows, 4, side, side), seeds) * sigmas[0], sigmas,
                                         extra_args=args, seeds=seeds, disable=True)


def found(pipeline: Pipeline, z: Tensor) -> list[Scene]:
    with torch.no_grad():
        return [parse(np.asarray(image)) for image in to_images(pipeline.vae.decode(z))]


def right(wanted: Sequence[Scene], seen: Sequence[Scene]) -> tuple[float, float]:
    """The share of pictures that are right but for fills and rims, and the score, which counts those too."""
    said = summary([ask(w, s) for w, s in zip(wanted, seen, strict=True)])
    return said["early_right"] / 100, said["score"]


def measure(pipeline: Pipeline, count: int, samplers: Sequence[str] = SAMPLERS) -> Found:
    """Of `count` pictures of four quarters; and of their prompts alone, at the network's own size."""
    side = pipeline.size // pipeline.vae.factor
    wanted = held_out(4 * count, 2)
    prompts = write_captions(wanted, "dense")
    quarters = [Stack(*(pipeline.encode(prompts[4 * i + q]) for i in range(count))) for q in range(4)]
    result: Found = {}
    for sampler in samplers:
        alone = latents(pipeline, Stack(*map(pipeline.encode, prompts)), sampler, 4 * count, side)
        result.setdefault("each prompt in a picture of its own", {})[sampler] = right(wanted, found(pipeline, alone))
        for name, around in ways(side).items():
            cond = Regions(*zip(quarters, QUARTERS))
            z = latents(replace(pipeline, unet=around(pipeline.unet)), cond, sampler, count, 2 * side)
            parts = torch.stack([z[..., y:y + side, x:x + side] for y in (0, side) for x in (0, side)], 1)
            click.echo(f"{sampler}: {name}")
            result.setdefault(name, {})[sampler] = right(wanted, found(pipeline, parts.flatten(0, 1)))
    return result


def table(result: Found, count: int) -> str:
    samplers = list(next(iter(result.values())))
    lines = ["| | " + " | ".join(f"{name}: right | score" for name in samplers) + " |",
             "|---" * (1 + 2 * len(samplers)) + "|"]
    lines += [f"| {way} | " + " | ".join("{:.2f} | {:.1f}".format(*row[name]) for name in samplers) + " |"
              for way, row in result.items()]
    return "\n".join([*lines, "", f"{4 * count} quarters of {count} pictures, {STEPS} steps, {machine()}."])


@click.command()
@click.option("--count", default=12, show_default=True, help="Pictures, each of four quarters.")
@writes("tiles")
def main(count: int, results: Results) -> None:
    """Four prompts in one picture, in tiles and without."""
    said = table(measure(Pipeline.miniature(device="cpu"), count), count)
    click.echo(said)
    results.write_tables({"tiles": said})


if __name__ == "__main__":
    main()
