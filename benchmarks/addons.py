"""What the miniature's add-ons do to its pictures, read from their pixels.

Held-out scenes of one to three things, equal seeds, 10 steps, scale 3 (lambda .6 with CFG++). The add-ons are those of
`python -m benchmarks.miniature.addons`, whose ControlNet is not bundled: without its file its rows are left out.
"""

from __future__ import annotations

import json
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
from benchmarks.miniature.addons import AZURE_RGB, BUNDLED, MASCOT, PLACED, placeless
from benchmarks.miniature.scenes import PLACES, Scene, colour_at, parse, random_scene, stripes_at
from benchmarks.results import Results, writes
from ella_kd import Pipeline, draw
from ella_kd.conditioning import Conditioning
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
        for sampler in SAMPLERS if 1.0 in loras.values() else SAMPLERS[1:2]:
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
    wanted = [Scene(background, (replace(MASCOT, place=place),)) for background in captions.SCENERY for place in range(9)]
    prompts = [f"mascot {PLACES[scene.things[0].place]}, {scene.background}" for scene in wanted]
    rows = ["| | exactly right |", "|---|---|"]
    for name, system in (("the word, learned", known), ("the word, unknown", sd)):
        found = [parse(picture) for picture in drawn(system, system.encode(prompts, "clip"), len(prompts), mode="clip")]
        rows.append(f"| {name} | {np.mean([a == b for a, b in zip(wanted, found, strict=True)]):.0%} |")
        click.echo(rows[-1])
    return "\n".join(rows)


def placed(sd: Pipeline, control: Any, count: int) -> str:
    """Prompts that say no place, edges that do: of the things asked for, how many stand where the edges say."""
    wanted = held_out(count)
    prompts = written(wanted, placeless)
    hints = [Image.fromarray(render(scene)) for scene in wanted]
    rows = ["| | things where the edges say | also of the right shape and colour | all right |", "|---|---|---|---|"]
    runs: list[tuple[str, float, dict[str, Any]]] = [("no control, `dpmpp_2m`", 0.0, {})]
    runs += [(f"`{sampler}`", 1.0, {"sampler": sampler}) for sampler in SAMPLERS]
    runs += [("`dpmpp_2m`, strength .5", 0.5, {}), ("`dpmpp_2m`, PAG", 1.0, {"guidance": PAG(CFG(SCALE), 1.0)})]
    for said, strength, options in runs:
        cond, uncond = (sd.encode(text).with_control(control, hints, strength, preprocess="canny")
                        for text in (prompts, [""] * count))
        found = [parse(picture) for picture in drawn(sd, cond, count, uncond=uncond, **options)]
        pairs = list(zip(wanted, found, strict=True))
        total = sum(len(scene.things) for scene in wanted)
        where = sum(len({t.place for t in a.things} & {t.place for t in b.things}) for a, b in pairs)
        same = sum(len(_bare(a) & _bare(b)) for a, b in pairs)
        right = np.mean([a == b for a, b in pairs])
        rows.append(f"| {said} | {where / total:.0%} | {same / total:.0%} | {right:.0%} |")
        click.echo(rows[-1])
    return "\n".join(rows)


def _bare(scene: Scene) -> set[tuple[str, str, int]]:
    return {(thing.shape, thing.colour, thing.place) for thing in scene.things}
