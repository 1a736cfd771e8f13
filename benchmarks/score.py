"""The semantic score: how much of a dense prompt is in the picture, read from the pixels of the miniature's pictures.

Scores plain Stable Diffusion, ELLA fixed and ELLA flexible on held-out prompts at equal seeds, and ten samplers at 5,
10 and 20 steps. Writes `score.json`, the tables in `benchmarks/README.md` and the plot beside it.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.machine import machine
from benchmarks.miniature import captions
from benchmarks.miniature.questions import CATEGORIES, ask, summary
from benchmarks.miniature.scenes import Scene, parse, random_scene
from benchmarks.readme import between_marks
from ella_kd import Pipeline, generate
from ella_kd.samplers import SAMPLERS, get_sigmas_karras

HERE = Path(__file__).parent
STEPS, SCALE, LAMBDA, BATCH = 20, 3.0, 0.6, 50
SYSTEMS = {
    "plain SD, short tags": ("plain", "tags"),
    "plain SD, dense prompt": ("plain", "dense"),
    "ELLA fixed, dense prompt": ("fixed", "dense"),
    "ELLA flexible, dense prompt": ("flexible", "dense"),
}
NUMBERS = ("one", "two", "three")
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


def plot(result: dict[str, Any], path: Path) -> None:
    """Score against evaluations of the model, one line per sampler."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), dpi=110)
    for name, row in result.items():
        style = "--" if name.endswith("_cfg_pp") else "-"
        axes.plot([r["evaluations"] for r in row.values()], [r["score"] for r in row.values()], style + "o", label=name,
                  markersize=4)
    axes.set(xlabel="evaluations of the denoiser", ylabel="semantic score, two things", xscale="log")
    axes.set_xticks([5, 10, 20, 40], ["5", "10", "20", "40"])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path)


@click.command(help=__doc__)
@click.option("--count", default=200, show_default=True, help="Held-out prompts per row.")
@click.option("--sampler-count", default=100, show_default=True, help="Held-out prompts per sampler and step count.")
@click.option("--most", default=3, show_default=True, help="Score scenes of one up to this many things.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE, show_default="benchmarks/")
def main(count: int, sampler_count: int, most: int, out: Path) -> None:
    pipeline = Pipeline.miniature()
    result = {
        "command": f"python -m benchmarks.score --count {count} --sampler-count {sampler_count} --most {most}",
        "machine": machine(),
        "settings": {"sampler": "dpmpp_2m", "schedule": "karras", "steps": STEPS, "scale": SCALE, "lambda": LAMBDA},
        "systems": measure_systems(pipeline, count, most),
        "samplers": measure_samplers(pipeline, sampler_count),
    }
    (out / "score.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result["samplers"], out / "samplers.png")  # type: ignore[arg-type]
    readme = out / "README.md"
    text = readme.read_text()
    text = between_marks(text, "systems", systems_table(result["systems"]))  # type: ignore[arg-type]
    text = between_marks(text, "samplers", samplers_table(result["samplers"]))  # type: ignore[arg-type]
    text = between_marks(text, "machine", f"`{result['command']}` on {result['machine']}.")
    readme.write_text(text)


if __name__ == "__main__":
    main()
