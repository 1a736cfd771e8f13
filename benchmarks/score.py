"""The semantic score: how much of a dense prompt is in the picture, read from the pixels of the miniature's pictures.

In two parts: plain Stable Diffusion, ELLA fixed and ELLA flexible on held-out prompts at equal seeds; ten samplers at
5, 10 and 20 steps. Writes `score.json`, where a part that is not measured stays as it is, the tables, and the samplers'
plot. What other wordings of a prompt do is `benchmarks.wordings`.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import click
import numpy as np

from benchmarks import plots, readme
from benchmarks.machine import machine
from benchmarks.miniature import captions
from benchmarks.miniature.questions import CATEGORIES, ask, summary
from benchmarks.miniature.scenes import Scene, parse, random_scene
from benchmarks.results import Results, writes
from ella_kd import Pipeline, generate
from ella_kd.samplers import SAMPLERS, get_sigmas_karras

STEPS, SCALE, LAMBDA, BATCH = 20, 3.0, 0.6, 50
SYSTEMS = {
    "plain SD, short tags": ("plain", "tags"),
    "plain SD, dense prompt": ("plain", "dense"),
    "ELLA fixed, dense prompt": ("fixed", "dense"),
    "ELLA flexible, dense prompt": ("flexible", "dense"),
}
NUMBERS = ("one", "two", "three", "four")
PARTS = ("systems", "samplers")
#: The samplers that are scored: what most scripts use, with and without CFG++.
SCORED = (
    "euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_2m", "dpmpp_2m_sde",
    "euler_cfg_pp", "euler_ancestral_cfg_pp", "dpmpp_2m_cfg_pp",
)  # fmt: skip


def held_out(count: int, things: int) -> list[Scene]:
    """Scenes with at least one (shape, colour, place) that no training stage has seen."""
    rng = random.Random(f"score {things}")
    return [random_scene(rng, things, unseen=True) for _ in range(count)]


def write_captions(scenes: Sequence[Scene], style: str) -> list[str]:
    rng = random.Random(f"score {style}")
    if style == "tags":
        return [captions.text(captions.tags(scene, rng, noise=0.0)) for scene in scenes]
    return [captions.text(captions.dense(scene, rng)) for scene in scenes]


def draw(pipeline: Pipeline, prompts: Sequence[str], **options: Any) -> list[Scene]:
    """What the parser finds in one picture per prompt, seeds 0, 1, 2, ..."""
    seeds = list(range(len(prompts)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the prompt has")  # plain SD cuts dense prompts: that is the point
        pictures = generate(pipeline, prompts, seeds=seeds, batch_size=BATCH, progress=False, **options)
    return [parse(np.asarray(picture.image)) for picture in pictures]


def score(wanted: Sequence[Scene], found: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """The score against the prompts' scenes, and against those of other prompts: what chance would give."""
    shuffled = [*wanted[1:], wanted[0]]
    return {
        "right": summary([ask(w, f) for w, f in zip(wanted, found, strict=True)]),
        "shuffled": summary([ask(w, f) for w, f in zip(shuffled, found, strict=True)]),
    }


def measure_systems(pipeline: Pipeline, count: int, most: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for things in range(1, most + 1):
        wanted = held_out(count, things)
        for name, (mode, style) in SYSTEMS.items():
            found = draw(pipeline, write_captions(wanted, style), mode=mode, steps=STEPS, scale=SCALE)
            result.setdefault(NUMBERS[things - 1], {})[name] = score(wanted, found)
            click.echo(f"{NUMBERS[things - 1]} | {name}: {result[NUMBERS[things - 1]][name]['right']}")
    return result


def measure_samplers(pipeline: Pipeline, count: int) -> dict[str, Any]:
    wanted = held_out(count, 2)
    prompts = write_captions(wanted, "dense")
    result: dict[str, Any] = {}
    for name in SCORED:
        sampler = SAMPLERS[name]
        for steps in (5, 10, 20):
            scale = LAMBDA if sampler.cfg_pp else SCALE
            found = draw(pipeline, prompts, sampler=name, steps=steps, scale=scale)
            sigmas = get_sigmas_karras(steps, pipeline.noise_schedule.sigma_min, pipeline.noise_schedule.sigma_max)
            evaluations = len(sampler.solver.eval_sigmas(sigmas))
            row = {"evaluations": evaluations, **score(wanted, found)["right"]}
            result.setdefault(name, {})[str(steps)] = row
        click.echo(f"{name}: " + ", ".join(f"{n} steps {row['score']:.1f}" for n, row in result[name].items()))
    return result


def systems_table(result: dict[str, Any]) -> str:
    lines = ["| things | system | score | all right | " + " | ".join(CATEGORIES) + " | shuffled: score | all right |"]
    lines.append("|---" * (6 + len(CATEGORIES)) + "|")
    for things, systems in result.items():
        for name, row in systems.items():
            right, chance = row["right"], row["shuffled"]
            cells = [f"{right[key]:.1f}" if key in right else "" for key in ("score", "all_right", *CATEGORIES)]
            cells += [f"{chance['score']:.1f}", f"{chance['all_right']:.1f}"]
            lines.append(f"| {things} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def samplers_table(result: dict[str, Any]) -> str:
    lines = ["| sampler | 5 steps | 10 steps | 20 steps | all right at 20 |", "|---|---|---|---|---|"]
    for name, row in result.items():
        scores = " | ".join(f"{row[n]['score']:.1f}" for n in ("5", "10", "20"))
        lines.append(f"| {name} | {scores} | {row['20']['all_right']:.1f} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="Only this; again for more.  [all]")
@click.option("--count", default=200, show_default=True, help="systems: held-out prompts per row.")
@click.option("--most", default=4, show_default=True, help="systems: scenes of one up to this many things.")
@click.option("--sampler-count", default=100, show_default=True, help="samplers: prompts per sampler and step count.")
@writes("score")
def main(parts: tuple[str, ...], count: int, most: int, sampler_count: int, results: Results) -> None:
    path = results.folder / "score.json"
    found = json.loads(path.read_text()) if path.exists() else {"settings": {}, "measured": {}}
    pipeline = Pipeline.miniature()
    found["settings"] = {"sampler": "dpmpp_2m", "schedule": "karras", "steps": STEPS, "scale": SCALE, "lambda": LAMBDA}
    for part, measure, options in (
        ("systems", lambda: measure_systems(pipeline, count, most), f"--count {count} --most {most}"),
        ("samplers", lambda: measure_samplers(pipeline, sampler_count), f"--sampler-count {sampler_count}"),
    ):
        if part in (parts or PARTS):
            found[part] = measure()
            command = f"python -m benchmarks.score --part {part} {options}"
            found["measured"][part] = {"command": command, "machine": machine()}
            path.write_text(json.dumps(found, indent=1) + "\n")
    write(found, results)
    click.echo(f"wrote {path}")


def write(found: dict[str, Any], results: Results) -> None:
    """The tables of the parts that were measured, and the plot."""
    tables = {part: TABLES[part](found[part]) for part in PARTS if part in found}
    tables |= {f"{part} measured": f"`{by['command']}` on {by['machine']}." for part, by in found["measured"].items()}
    results.write_tables(tables)
    if "samplers" in found:
        plots.scores(found["samplers"], results.folder / "samplers.png")
    if results.published:
        readme.publish()


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "systems": systems_table, "samplers": samplers_table}


if __name__ == "__main__":
    main()
