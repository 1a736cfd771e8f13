"""Does the wording matter? The same scenes said in every form, order and dress of the grammar, drawn and read back.

Held-out scenes, one picture a prompt, ELLA fixed and flexible. Writes `wordings.json` and the table.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from functools import partial

import click

from benchmarks import readme
from benchmarks.machine import machine
from benchmarks.miniature import captions
from benchmarks.miniature.captions import FORMS, HELD_FORMS, Wording
from benchmarks.miniature.questions import ask, summary
from benchmarks.miniature.scenes import Scene
from benchmarks.results import Results, writes
from benchmarks.score import SCALE, STEPS, draw, held_out
from ella_kd import Pipeline

MODES = ("fixed", "flexible")
Find = Callable[[Sequence[str]], list[Scene]]  # prompts -> what the parser finds in a picture of each

#: What is said otherwise than in training's mixture; the forms and orders called held out were in no stage of it.
WORDINGS = {
    "as in training": Wording(),
    **{f'only "{name}"': Wording(form=name) for name in FORMS},
    **{f'held-out form "{name}"': Wording(form=name) for name in HELD_FORMS},
    "held-out orders of attributes": Wording(held=True),
    "everything said twice": Wording(twice=True),
    "commas for full stops": Wording(marks="commas"),
    "no marks": Wording(marks="none"),
    "places by relation where possible": Wording(relations=1.0),
    "places by name only": Wording(relations=0.0),
    "four distractors": Wording(distractors=4),
}


def write(scenes: Sequence[Scene], wording: Wording, upper: bool = False) -> list[str]:
    rng = random.Random("wordings")
    return [captions.text(captions.dense(scene, rng, wording), upper) for scene in scenes]


def scored(scenes: Sequence[Scene], found: Sequence[Scene]) -> dict[str, float]:
    result = summary([ask(wanted, got) for wanted, got in zip(scenes, found, strict=True)])
    return {key: result[key] for key in ("score", "all_right", "early_right", "detail")}


def orders(find: Find, scenes: Sequence[Scene]) -> dict[str, float]:
    """Every scene of three things in all six orders of its sentences: how many are right, and right in every order."""
    right = [[False] * 6 for _ in scenes]
    for column, order in enumerate(itertools.permutations(range(3))):
        found = find(write(scenes, Wording(order=order, relations=0.0)))
        for row, wanted, got in zip(right, scenes, found, strict=True):
            row[column] = wanted == got
    every = [all(row) for row in right]
    mean = [sum(row) / 6 for row in right]
    return {"all_right": 100 * sum(mean) / len(mean), "in_every_order": 100 * sum(every) / len(every),
            "in_none": 100 * sum(not any(row) for row in right) / len(right)}  # fmt: skip


def measure(find: Find, count: int) -> dict[str, dict[str, float]]:
    scenes = held_out(count, 3)
    rows = {}
    for name, wording in WORDINGS.items():
        rows[name] = scored(scenes, find(write(scenes, wording)))
        click.echo(f"{name}: {rows[name]}")
    rows["upper case"] = scored(scenes, find(write(scenes, Wording(), upper=True)))
    rows["six orders"] = orders(find, scenes[: max(1, count // 4)])
    return rows


def table(result: dict[str, dict[str, dict[str, float]]]) -> str:
    """All right, without the details, and details, in percent, for each mode."""
    head = " | ".join(f"{mode}: all right | but for details | details" for mode in result)
    lines = [f"| three things, said | {head} |", "|---" * (1 + 3 * len(result)) + "|"]
    for name in next(iter(result.values())):
        cells = [f"{rows[name][key]:.1f}" if key in rows[name] else "" for rows in result.values()
                 for key in ("all_right", "early_right", "detail")]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for mode, rows in result.items():
        six = rows["six orders"]
        lines.append(f"\n{mode}: right in every one of six orders {six['in_every_order']:.0f} %, in none "
                     f"{six['in_none']:.0f} %.")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--count", default=96, show_default=True, help="Held-out prompts per row.")
@writes("wordings")
def main(count: int, results: Results) -> None:
    pipeline = Pipeline.miniature()
    result = {mode: measure(partial(draw, pipeline, mode=mode, steps=STEPS, scale=SCALE), count) for mode in MODES}
    command = f"python -m benchmarks.wordings --count {count}"
    found = {"command": command, "machine": machine(), "rows": result}
    (results.folder / "wordings.json").write_text(json.dumps(found, indent=1) + "\n")
    results.write_tables({"wordings": table(result), "wordings measured": f"`{command}` on {machine()}."})
    if results.published:
        readme.publish()


if __name__ == "__main__":
    main()
