"""Where the miniature draws at twice its size: `python -m benchmarks.big_miniature`.

One thing is asked, at a place; how much of what is no background lies in that place's cell, twice as large, 2 px of
margin around it? Its sprites have one scale, so the pictures cannot be read back as scenes, and it decides what stands
where at other sigmas than Stable Diffusion does: nothing is to be tuned by these numbers.
"""

from __future__ import annotations

import random
from dataclasses import replace

import click
import numpy as np
import torch
from PIL import Image

from benchmarks.machine import machine
from benchmarks.miniature.captions import dense, text
from benchmarks.miniature.scenes import CELL, SIZE, SMUDGE, Scene, _canvas, random_scene
from benchmarks.results import Results, writes
from ella_kd import CFG, Pipeline, generate
from ella_kd.denoiser import Denoiser
from ella_kd.images import to_images
from ella_kd.models.demofusion import LocalAndGlobal
from ella_kd.models.hidiffusion import AFTER_35, AFTER_40, AFTER_70, Shrink, WiderStride
from ella_kd.models.inside import Change, Inside
from ella_kd.models.tiled import Tiled
from ella_kd.pictures.progressive import sample_progressively
from ella_kd.samplers import get_schedule, randn

MARGIN = 2
WAYS: dict[str, tuple[Change, ...]] = {
    "plain": (),
    **{f"RAU-Net's stride above sigma {sigma:.3g}": (WiderStride(2, sigma_lo=sigma),)
       for sigma in (AFTER_40, AFTER_70, 0.0)},
    **{f"deep shrink of stage 0 above sigma {sigma:.3g}": (Shrink(0, sigma_lo=sigma),) for sigma in (AFTER_35, 0.0)},
}


def share(picture: np.ndarray, scene: Scene, times: int) -> float:
    """Of the pixels that are far from the asked background those in the asked cell; NaN without any."""
    side = SIZE * times
    background = np.asarray(Image.fromarray(_canvas(scene.background)).resize((side, side), Image.Resampling.BILINEAR))
    away = np.sqrt(((picture.astype(float) - background) ** 2).mean(2)) > SMUDGE
    row, column = divmod(scene.things[0].place, 3)
    rows, columns = (slice(max(0, CELL * n * times - MARGIN), CELL * (n + 1) * times + MARGIN) for n in (row, column))
    return float(away[rows, columns].sum() / away.sum()) if away.any() else float("nan")


def grown(sd: Pipeline, prompts: list[str], times: int = 2, steps: int = 20) -> list[Image.Image]:
    """DemoFusion, from a first phase at the miniature's own size; euler, as its steps begin without history."""
    side, seeds = SIZE // sd.vae.factor, list(range(len(prompts)))

    def denoiser_of(k: int) -> Denoiser:
        return (replace(sd, unet=LocalAndGlobal(sd.unet, k, side)) if k > 1 else sd).denoiser(CFG(3.0))

    sigmas = get_schedule("karras").sigmas(steps, denoiser_of(1))
    z = sample_progressively("euler", denoiser_of, randn((len(seeds), 4, side, side), seeds) * sigmas[0], sigmas,
                             {"cond": sd.encode(prompts), "uncond": sd.encode("")}, scale=times, seeds=seeds,
                             disable=True)
    with torch.no_grad():
        return to_images(sd.vae.decode(z))


@click.command()
@click.option("--count", type=int, default=16, show_default=True)
@writes("big_miniature")
def main(results: Results, count: int) -> None:
    """The share of what is drawn that lies in the asked cell."""
    rng, sd = random.Random(0), Pipeline.miniature()
    scenes = [random_scene(rng, 1) for _ in range(count)]
    prompts = [text(dense(scene, rng)) for scene in scenes]
    rows = ["| network | pixels | share in the asked cell |", "|---|---|---|"]

    def measure(name: str, pipeline: Pipeline, times: int, hires: str | None = None) -> None:
        side = SIZE * (1 if hires else times)
        pictures = generate(pipeline, prompts, seeds=list(range(count)), width=side, height=side, scale=3.0,
                            progress=False, hires=hires)
        add(name, [each.image for each in pictures], times)

    def add(name: str, pictures: list[Image.Image], times: int) -> None:
        side = SIZE * times
        found = [share(np.asarray(each), scene, times) for each, scene in zip(pictures, scenes)]
        rows.append(f"| {name} | {side} | {np.nanmean(found):.2f} |")
        click.echo(rows[-1])

    torch.manual_seed(0)
    measure("plain", sd, 1)
    for name, changes in WAYS.items():
        measure(name, replace(sd, unet=Inside(sd.unet, *changes)), 2)  # type: ignore[arg-type]
    for hires in ("2:0.3", "2:0.5", "2:0.7"):
        measure(f"hires fix, {hires}", sd, 2, hires)
    measure("tiles of the one prompt, half over each other", replace(sd, unet=Tiled(
        sd.unet, SIZE // sd.vae.factor, SIZE // sd.vae.factor // 2)), 2)
    add("DemoFusion", grown(sd, prompts), 2)
    results.write_tables({"big miniature": "\n".join(rows), "big miniature measured":
                          f"`python -m benchmarks.big_miniature --count {count}` on {machine()}."})


if __name__ == "__main__":
    main()
