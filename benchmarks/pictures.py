"""What starting from a picture is for, on the miniature: repainted, drawn on, changed, inverted, judged by the parser.

Each row is a share of held-out scenes of which the right one came out. Writes `pictures.json` and the table.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.miniature.scenes import COLOUR_NAMES, SHAPES, SIZE, Scene, Thing, parse, render
from benchmarks.results import Results, writes
from benchmarks.score import LAMBDA, SCALE, held_out, write_captions
from ella_kd import Pipeline
from ella_kd.images import to_images
from ella_kd.models.text import TextFeatures
from ella_kd.pictures.inversion import undone
from ella_kd.pictures.keep import Repaint
from ella_kd.pictures.options import FromPicture
from ella_kd.samplers import get_sampler, get_sigmas_karras, randn
from ella_kd.starting import over

STEPS = 20
STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.6, 0.9)
#: Sampler, guidance, refinements of a step (-1: not inverted, for comparison), steps.
INVERSIONS = (("euler", 1.0, -1, 20), ("euler", 1.0, 0, 10), ("euler", 1.0, 0, 50), ("euler_cfg_pp", LAMBDA, 3, 10),
              ("euler", SCALE, 3, 10))


def span(i: int, factor: int) -> tuple[int, int]:
    """The pixels of the i-th third of a side, in whole latents."""
    low, high = (round(k * SIZE / 3 / factor) * factor for k in (i, i + 1))
    return low, high


def around(place: int, factor: int) -> Image.Image:
    """A mask that is white where a thing at this place stands."""
    (left, right), (top, bottom) = span(place % 3, factor), span(place // 3, factor)
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (left, top, right, bottom))
    return mask


def picture(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene))


def seen(image: Image.Image) -> Scene:
    return parse(np.asarray(image))


def bare(scene: Scene) -> Scene:
    """Background and what stands where, in which colour: without fills and rims."""
    return replace(scene, things=tuple(replace(thing, fill="plain", rim="no") for thing in scene.things))


def texts(sd: Pipeline, scenes: Sequence[Scene]) -> TextFeatures:
    assert sd.t5 is not None
    return sd.t5(write_captions(scenes, "dense"))


def changed(thing: Thing, rng: random.Random) -> Thing:
    """Of another shape and colour."""
    shape = rng.choice([each for each in SHAPES if each != thing.shape])
    return replace(thing, shape=shape, colour=rng.choice([each for each in COLOUR_NAMES if each != thing.colour]))


def repainted(before: Sequence[Scene]) -> list[Scene]:
    """Each scene with another thing in the place of its second."""
    rng = random.Random("repaint")
    return [replace(scene, things=(scene.things[0], changed(scene.things[1], rng))) for scene in before]


def drawn_on(count: int) -> list[Scene]:
    """Scenes of two things, one of them in the right third."""
    rng = random.Random("outpaint")
    scenes = []
    for scene in held_out(count, 1):
        old = replace(scene.things[0], place=3 * rng.randrange(3) + rng.randrange(2))
        new = changed(replace(old, place=3 * rng.randrange(3) + 2), rng)
        scenes.append(Scene(scene.background, tuple(sorted((old, new)))))
    return scenes


def recoloured(before: Sequence[Scene]) -> list[Scene]:
    """Each scene with its first thing in another colour."""
    rng = random.Random("invert")
    return [replace(scene, things=(replace(first, colour=rng.choice([c for c in COLOUR_NAMES if c != first.colour])),
                                   *rest)) for scene in before for first, *rest in [scene.things]]


@torch.no_grad()
def drawn(sd: Pipeline, asked: Sequence[FromPicture], wanted: Sequence[Scene], sampler: str = "dpmpp_2m",
          scale: float = SCALE, steps: int = STEPS) -> list[Image.Image]:
    """A picture for each of equal-sized starts, from seeds 0, 1, 2, ..., all in one batch."""
    starts = [over(sd, each, "karras", steps) for each in asked]
    begun = replace(starts[0], picture=torch.cat([each.picture for each in starts]))
    if isinstance(begun.mask, Repaint):
        repaint = torch.stack([each.repaint for each in starts])[:, None]
        begun = replace(begun, mask=Repaint(repaint), repaint=repaint)
    seeds = list(range(len(asked)))
    x = begun.x(randn(begun.picture.shape, seeds), seeds)
    assert sd.t5 is not None
    args = {"cond": texts(sd, wanted), "uncond": sd.t5(""), "cond_scale": scale}
    sample = begun.method(sampler, begun.sigmas)
    out = sample(begun.kept(sd.denoiser(), x.device), x, begun.sigmas, extra_args=args, disable=True, seeds=seeds)
    return [each.canvas.back(image) for each, image in zip(starts, to_images(sd.vae.decode(out)), strict=True)]


@torch.no_grad()
def inverted(sd: Pipeline, before: Sequence[Scene], said: Sequence[Scene], sampler: str, scale: float, refine: int,
             steps: int) -> Callable[[Sequence[Scene]], list[Image.Image]]:
    """Pictures of the first scenes taken to the noise that draws them by the prompts of the second: a function that
    redraws them by other prompts. refine -1: noise that has nothing to do with them."""
    model = sd.denoiser()
    assert sd.t5 is not None
    sigmas = get_sigmas_karras(steps, model.sigma_min, model.sigma_max)
    args: dict[str, Any] = {"cond": texts(sd, said), "uncond": sd.t5(""), "cond_scale": scale}
    z = torch.cat([sd.vae.encode(picture(scene)) for scene in before])
    row = get_sampler(sampler)
    if refine < 0:
        x = sigmas[0] * randn(z.shape, list(range(len(z))))
    else:
        x = undone(model, z, sigmas[:-1].flip(0), args, row.cfg_pp, refine, disable=True)

    @torch.no_grad()
    def redraw(wanted: Sequence[Scene]) -> list[Image.Image]:
        out: Tensor = row.function(model, x, sigmas, extra_args={**args, "cond": texts(sd, wanted)}, disable=True)
        return to_images(sd.vae.decode(out))

    return redraw


Row = Callable[[str, Sequence[Scene], Sequence[Image.Image]], None]  # its name, what was asked, what came


def measure_starts(sd: Pipeline, count: int, row: Row) -> None:
    """Repainted, drawn on beyond the side, and changed by a strength."""
    factor, model = sd.vae.factor, sd.denoiser()
    before, other = held_out(count, 2), held_out(2 * count, 2)[count:]
    after, wider, edge = repainted(before), drawn_on(count), span(2, factor)[0]
    hidden = [FromPicture(start=picture(old), mask=around(old.things[1].place, factor), mask_blur=0) for old in before]
    cut = [FromPicture(start=picture(scene).crop((0, 0, edge, SIZE)), extend=f"right={SIZE - edge}") for scene in wider]
    for sampler, scale in (("dpmpp_2m", SCALE), ("euler_ancestral_cfg_pp", LAMBDA)):
        row(f"repainted in place, {sampler}", after, drawn(sd, hidden, after, sampler, scale))
        row(f"added beyond the side, {sampler}", wider, drawn(sd, cut, wider, sampler, scale))
    for strength in STRENGTHS:
        sigma = float(model.t_to_sigma(torch.tensor(strength * 999.0)))
        asked = [FromPicture(start=picture(scene), strength=strength) for scene in before]
        at = f"strength {strength:g} (sigma {sigma:.2g})"
        row(f"{at}, its own prompt: the scene is kept", before, drawn(sd, asked, before))
        images = drawn(sd, asked, other)
        row(f"{at}, another scene's prompt: the scene is kept", before, images)
        row(f"{at}, another scene's prompt: the other is drawn", other, images)


def measure_inversions(sd: Pipeline, count: int, row: Row) -> None:
    """Taken to noise and redrawn, by prompts that say everything and by ones that leave a thing out."""
    before = held_out(count, 2)
    half, swapped = [replace(scene, things=scene.things[:1]) for scene in before], recoloured(before)
    half_swapped = [replace(scene, things=scene.things[:1]) for scene in swapped]
    for sampler, scale, refine, steps in INVERSIONS:
        how = f"{sampler}, {'lambda' if 'cfg_pp' in sampler else 'scale'} {scale:g}, {steps} steps"
        at = f"from new noise, {how}" if refine < 0 else f"inverted, {how}, refine {refine}"
        redraw = inverted(sd, before, before, sampler, scale, refine, steps)
        row(f"{at}: the scene again", before, redraw(before))
        row(f"{at}: one colour swapped", swapped, redraw(swapped))
        redraw = inverted(sd, before, half, sampler, scale, refine, steps)
        row(f"{at}, one of two things in the prompts: the scene again", before, redraw(half))
        row(f"{at}, one of two things in the prompts: its colour swapped", swapped, redraw(half_swapped))


def measure(sd: Pipeline, count: int) -> dict[str, tuple[float, float]]:
    """Of each row the share of scenes that came out as asked, in percent, without and with fills and rims."""
    result = dict[str, tuple[float, float]]()

    def row(name: str, wanted: Sequence[Scene], images: Sequence[Image.Image]) -> None:
        pairs = [(scene, seen(image)) for scene, image in zip(wanted, images, strict=True)]
        result[name] = (100 * float(np.mean([bare(w) == bare(f) for w, f in pairs])),
                        100 * float(np.mean([w == f for w, f in pairs])))
        click.echo(f"{name}: {result[name]}")

    measure_starts(sd, count, row)
    measure_inversions(sd, count, row)
    return result


def table(result: dict[str, tuple[float, float]]) -> str:
    lines = ["| | right | with fills and rims |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {right:.0f} % | {all_:.0f} % |" for name, (right, all_) in result.items()])


@click.command(help=__doc__)
@click.option("--count", default=100, show_default=True, help="Held-out scenes of two things in each row.")
@writes("pictures")
def main(count: int, results: Results) -> None:
    result = measure(Pipeline.miniature(), count)
    command = f"python -m benchmarks.pictures --count {count}"
    found = {"command": command, "machine": machine(), "rows": result}
    (results.folder / "pictures.json").write_text(json.dumps(found, indent=1) + "\n")
    results.write_tables({"pictures": table(result), "pictures measured": f"`{command}` on {machine()}."})


if __name__ == "__main__":
    main()
