"""What the miniature's add-ons do to its pictures, read from their pixels: `python -m benchmarks.addons`.

Held-out scenes of one to three things, equal seeds, 10 steps, scale 3 (lambda .6 with CFG++). The add-ons are the
bundled ones; `python -m benchmarks.miniature.addons` trains them, and a T2I-Adapter that is not bundled.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks.machine import machine
from benchmarks.miniature import captions
from benchmarks.miniature.addons import AZURE_RGB, BUNDLED, MASCOT
from benchmarks.miniature.scenes import (
    BACKGROUND_NAMES,
    PLACES,
    Scene,
    Thing,
    colour_at,
    parse,
    random_scene,
    render,
    stripes_at,
)
from benchmarks.results import Results, writes
from ella_kd import CFG, PAG, Pipeline, draw
from ella_kd.conditioning import Conditioning
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.addons.t2i import T2IAdapter
from ella_kd.samplers import SAMPLERS as KNOWN

STEPS, SCALE, LAMBDA = 10, 3.0, 0.6
SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "euler_cfg_pp")


def held_out(count: int) -> list[Scene]:
    rng = random.Random("add-ons")
    return [random_scene(rng, 1 + i % 3, unseen=True) for i in range(count)]


def drawn(sd: Pipeline, cond: Conditioning, count: int, sampler: str = "dpmpp_2m", mode: str = "flexible",
          **options: Any) -> list[np.ndarray]:
    """One picture per row of a conditioning, seeds 0, 1, 2, ..."""
    scale = LAMBDA if KNOWN[sampler].cfg_pp else SCALE
    options = {"guidance": scale, "uncond": sd.encode("", mode), **options}  # type: ignore[arg-type]
    pictures = draw(sd, cond, sampler=sampler, steps=STEPS, seeds=list(range(count)), progress=False, **options)
    return [np.asarray(picture) for picture in pictures]


def written(scenes: Sequence[Scene], write: Callable[[Scene, random.Random], Any]) -> list[str]:
    rng = random.Random("add-ons, written")
    return [captions.text(write(scene, rng)) for scene in scenes]


def styles(sd: Pipeline, folder: Path, count: int) -> str:
    """Every prompt says which colour and which fill: what is drawn instead, by the weights of two LoRAs."""
    wanted = held_out(count)
    prompts = written(wanted, captions.dense)
    rows = [f"| LoRA | {' | '.join(STYLE_COLUMNS)} |", "|---" * (1 + len(STYLE_COLUMNS)) + "|"]
    weights: list[dict[str, float]] = [{}, {"striped": 0.5}, {"striped": 1.0}, {"azure": 0.5}, {"azure": 1.0},
                                       {"striped": 1.0, "azure": 1.0}]
    for loras in weights:
        twin = sd.with_lora([(folder / f"{name}.safetensors", weight) for name, weight in loras.items()])
        for sampler in SAMPLERS if len(loras) == 2 else SAMPLERS[1:2]:
            said = ", ".join(f"{name} {weight:g}" for name, weight in loras.items()) or "none"
            seen = look(wanted, drawn(twin, twin.encode(prompts), count, sampler))
            rows.append(f"| {said}, `{sampler}` | {seen.striped:.0%} | {seen.stripes:.2f} | {seen.from_azure:.0f} | "
                        f"{seen.layout:.0%} |")
            click.echo(rows[-1])
    return "\n".join(rows)


STYLE_COLUMNS = ("striped", "stripes, 1 as rendered", "from azure, of 255", "shapes and places right")


@dataclass(frozen=True)
class Look:
    """Of all things asked for: the share that is striped, how strongly (1: as rendered), how far their colour is from
    azure (of 255), and the share of pictures whose shapes stand where they should, and nothing else."""

    striped: float
    stripes: float
    from_azure: float
    layout: float


def look(wanted: Sequence[Scene], pictures: Sequence[np.ndarray]) -> Look:
    found = [parse(picture) for picture in pictures]
    things = [(picture, thing) for scene, picture in zip(wanted, pictures, strict=True) for thing in scene.things]
    return Look(sum(thing.fill == "striped" for scene in found for thing in scene.things) / len(things),
                float(np.mean([stripes_at(*each) for each in things])),
                float(np.mean([np.square(colour_at(*each) - AZURE_RGB).mean() ** 0.5 for each in things])),
                float(np.mean([_layout(a) == _layout(b) for a, b in zip(wanted, found, strict=True)])))


def _layout(scene: Scene) -> set[tuple[str, int]]:
    return {(thing.shape, thing.place) for thing in scene.things}


def word(sd: Pipeline, folder: Path) -> str:
    """The word at each place on each background, in tags for CLIP: how often it is exactly what it stands for."""
    known = sd.with_embeddings([folder / "mascot.safetensors"])
    rows = ["| | exactly right |", "|---|---|"]
    for name, system in (("the word, learned", known), ("the word, unknown", sd)):
        rows.append(f"| {name} | {np.mean([a == b for a, b in mascots(system)]):.0%} |")
        click.echo(rows[-1])
    return "\n".join(rows)


def mascots(sd: Pipeline, backgrounds: Sequence[str] = BACKGROUND_NAMES) -> list[tuple[Scene, Scene]]:
    """The one thing that the word stands for, at each place, as asked for and as found."""
    wanted = [Scene(name, (replace(MASCOT, place=place),)) for name in backgrounds for place in range(9)]
    prompts = [f"mascot {PLACES[scene.things[0].place]}, {scene.background}" for scene in wanted]
    found = drawn(sd, sd.encode(prompts, "clip"), len(prompts), mode="clip")
    return [(scene, parse(picture)) for scene, picture in zip(wanted, found, strict=True)]


def placed(sd: Pipeline, folder: Path, count: int) -> str:
    """Prompts that say no place, edges that do: of the things asked for, how many stand where the edges say."""
    wanted = held_out(count)
    controls: dict[str, ControlNet | T2IAdapter] = {
        "ControlNet": ControlNet.load(folder / "edges.safetensors", base=sd.unet)}
    if (folder / "outline.safetensors").exists():
        controls["T2I-Adapter"] = T2IAdapter.load(folder / "outline.safetensors")
    rows = ["| | where the edges say | shape too | colour too | fill and rim too |", "|---|---|---|---|---|"]
    runs: list[tuple[str, float, dict[str, Any]]] = [(f"`{name}`", 1.0, {"sampler": name}) for name in SAMPLERS]
    runs += [("`dpmpp_2m`, PAG", 1.0, {"guidance": PAG(CFG(SCALE), 1.0)}), ("`dpmpp_2m`, strength .5", 0.5, {})]
    runs += [("`dpmpp_2m`, strength 0", 0.0, {})]
    for name, control in controls.items():
        for said, strength, options in runs:
            shares = placement(wanted, steered(sd, control, wanted, strength, **options))
            rows.append(f"| {name}, {said} | {' | '.join(f'{share:.0%}' for share in shares)} |")
            click.echo(rows[-1])
    return "\n".join(rows)


def steered(sd: Pipeline, control: ControlNet | T2IAdapter, wanted: Sequence[Scene], strength: float = 1.0,
            **options: Any) -> list[Scene]:
    """What is found in pictures of prompts without places, on both sides of guidance steered by the scenes' edges."""
    hints = [Image.fromarray(render(scene)) for scene in wanted]
    cond, uncond = (sd.encode(texts).with_control(control, hints, strength, preprocess="canny")
                    for texts in (written(wanted, captions.placeless), [""] * len(wanted)))
    return [parse(picture) for picture in drawn(sd, cond, len(wanted), uncond=uncond, **options)]


def placement(wanted: Sequence[Scene], found: Sequence[Scene]) -> tuple[float, ...]:
    """The shares of things that stand where they should; of the right shape too; colour too; fill and rim too."""
    facts: tuple[Callable[[Thing], Any], ...] = (
        lambda t: t.place, lambda t: (t.place, t.shape), lambda t: (t.place, t.shape, t.colour), lambda t: t)
    total = sum(len(scene.things) for scene in wanted)
    return tuple(sum(len({*map(fact, a.things)} & {*map(fact, b.things)})
                     for a, b in zip(wanted, found, strict=True)) / total for fact in facts)


@click.command(help=__doc__)
@click.option("--count", default=24, show_default=True, help="Held-out scenes.")
@click.option("--files", type=click.Path(path_type=Path, exists=True), default=BUNDLED, help="Folder of the add-ons.")
@writes("addons")
def main(count: int, files: Path, results: Results) -> None:
    sd = Pipeline.miniature()
    tables = {"styles": styles(sd, files, count), "word": word(sd, files), "placed": placed(sd, files, count)}
    tables["add-ons measured"] = f"`python -m benchmarks.addons --count {count}` on {machine()}."
    results.write_tables(tables)


if __name__ == "__main__":
    main()
