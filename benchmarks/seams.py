"""Seams of pictures that are enlarged tile by tile, and every way to a large one: `python -m benchmarks.seams`.

A seam is a jump between neighbouring pixels on the two sides of a tile's border that is larger than between other
neighbours. The miniature's autoencoder knows one size: sharpness is not to be judged by these pictures.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from benchmarks.big_miniature import grown
from benchmarks.machine import machine
from benchmarks.miniature.captions import dense, text
from benchmarks.miniature.scenes import SIZE, random_scene
from benchmarks.results import Results, writes
from ella_kd import Pipeline, generate
from ella_kd.images import contact_sheet, save_image
from ella_kd.models.tiled import Tiles
from ella_kd.pictures.upscale import upscale

STRENGTH, SCALE, OVERLAP = 0.3, 3.0, 8  # the overlap: px, what `upscale` takes for pictures of this size
GENTLE = 0.2  # of the sheet, from sigma .17: the miniature decides late what stands where, .3 draws most of it anew


def borders(side: int, overlap: int, factor: int) -> list[int]:
    """Along a side of so many px, the pixels at which a tile begins or ends, but for the picture's own edges."""
    cells = SIZE // factor
    starts = {box[0] for box in Tiles((cells, cells), (overlap // factor,) * 2).boxes(side // factor, cells)}
    return sorted({factor * n for start in starts for n in (start, start + cells)} - {0, side})


def jump(picture: Image.Image, at: list[int]) -> tuple[float, float]:
    """The mean difference of neighbours across these columns and rows, and of all other neighbours, of 255."""
    pixels = np.asarray(picture, dtype=np.float64)
    across, elsewhere = [], []
    for turned in (pixels, pixels.swapaxes(0, 1)):
        steps = np.abs(np.diff(turned, axis=1)).mean((0, 2))  # entry n - 1 is the step from n - 1 to n
        chosen = np.isin(np.arange(1, len(steps) + 1), at)
        across.append(steps[chosen].mean())
        elsewhere.append(steps[~chosen].mean())
    return float(np.mean(across)), float(np.mean(elsewhere))


def enlargements(sd: Pipeline, prompt: str, steps: int, seed: int) -> Iterator[tuple[str, Image.Image, int]]:
    """The way, the picture twice as large, and the overlap of the tiles by whose borders it is judged."""
    options: dict[str, Any] = {"steps": steps, "seeds": seed, "scale": SCALE, "progress": False}
    small = generate(sd, prompt, **options)[0].image
    size, cond = (2 * SIZE, 2 * SIZE), sd.encode(prompt)
    yield "enlarged alone, Lanczos", small.resize(size, Image.Resampling.LANCZOS), OVERLAP
    yield "a second pass over the whole", generate(sd, prompt, hires=f"2:{STRENGTH}", **options)[0].image, OVERLAP
    for overlap in (OVERLAP, 0):
        yield f"tiles that overlap by {overlap} px", upscale(
            sd, small, cond, uncond=sd.encode(""), strength=STRENGTH, steps=steps, seed=seed, overlap=overlap,
            guidance=SCALE, progress=False), overlap


def sheet(sd: Pipeline, prompt: str, steps: int) -> Image.Image:
    """Each way at two and at three times the model's own size."""
    rows = []
    for k in (2, 3):
        large = {"width": k * SIZE, "height": k * SIZE}
        ways: dict[str, dict[str, Any]] = {
            "plain": large, "HiDiffusion": {**large, "hidiffusion": True}, "hires fix": {"hires": f"{k}:{GENTLE}"},
            "upscaled in tiles": {"upscale": f"tiles:{k}:{GENTLE}"}, "one run in tiles": {**large, "tile": "48:16"}}
        images = [generate(sd, prompt, seeds=1, scale=SCALE, steps=steps, progress=False, **how)[0].image
                  for how in ways.values()]
        rows.append((f"{prompt} ({k * SIZE} px)", [*images, *grown(sd, [prompt], k, steps)]))
    return contact_sheet(rows, [*ways, "DemoFusion"])


@click.command()
@click.option("--count", type=int, default=8, show_default=True, help="Pictures.")
@click.option("--steps", type=int, default=6, show_default=True, help="Of each pass.")
@writes("seams")
def main(results: Results, count: int, steps: int) -> None:
    """What jumps at the borders of tiles, and one sheet of all ways to a large picture."""
    torch.manual_seed(0)
    rng, sd = random.Random(0), Pipeline.miniature()
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(count):
        for name, picture, overlap in enlargements(sd, text(dense(random_scene(rng, 2), rng)), steps, seed):
            found.setdefault(name, []).append(jump(picture, borders(2 * SIZE, overlap, sd.vae.factor)))
    rows = ["| two times as large | jump at borders of tiles | elsewhere | ratio |", "|---|---|---|---|"]
    for name, jumps in found.items():
        at, elsewhere = np.mean(jumps, 0)
        rows.append(f"| {name} | {at:.2f} | {elsewhere:.2f} | {at / elsewhere:.2f} |")
    said = "\n".join([*rows, "", f"{count} pictures of two things, {steps} steps, strength {STRENGTH}, {machine()}."])
    click.echo(said)
    results.write_tables({"seams": said})
    prompt = "The scene is set in snow. A red heart sits in the center."
    save_image(sheet(sd, prompt, steps + 2), results.folder / "big.png")


if __name__ == "__main__":
    main()
