"""DPG-Bench's whole cycle on the miniature, by the code of `ella-kd bench dpg`: prompts, sheets of four, a judge that
reads pixels, both arithmetics.

Held-out dense prompts of two, three and four things. Writes `dpg.json`, the plot and the table.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import machine
from benchmarks.miniature import dpg
from benchmarks.results import Results, writes
from benchmarks.score import SCALE, STEPS, held_out, write_captions
from ella_kd import Pipeline
from ella_kd.app.dpg_answers import ask, find_sheets
from ella_kd.app.dpg_questions import read_questions
from ella_kd.app.dpg_report import plot, report
from ella_kd.app.prompt_lists import dpg_sheets
from ella_kd.app.sheets import draw_sheets
from ella_kd.request import Mode, Request

SYSTEMS: dict[str, Mode] = {"plain SD": "clip", "ELLA fixed": "fixed", "ELLA flexible": "flexible"}
CHANCE = "ELLA flexible, sheets of other prompts"
JUDGE = "pixel checker"


def measure(pipeline: Pipeline, count: int, folder: Path) -> dict[str, dict[str, Any]]:
    """A report for every system, and for sheets that belong to other prompts."""
    scenes = [scene for things in (2, 3, 4) for scene in held_out(count, things)]
    truths = dpg.write(scenes, write_captions(scenes, "dense"), folder)
    rows, judge, result = read_questions(folder / "questions.csv"), dpg.judge(truths), dict[str, dict[str, Any]]()

    def add(name: str, sheets: dict[str, Path]) -> None:
        found = ask(sheets, rows, judge, JUDGE, folder / f"{name}.jsonl", batch_size=64)
        result[name] = report(rows, found.answers, list(sheets), judge=JUDGE, missing=found.unreadable)
        click.echo(f"{name}: {result[name]['average']}")

    for name, mode in SYSTEMS.items():
        wanted = dpg_sheets(folder / "prompts", folder / name)
        asked = Request("", mode=mode, steps=STEPS, scale=SCALE)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the prompt has")  # plain SD cuts dense prompts
            for _ in draw_sheets(pipeline, wanted, asked, batch_size=48, progress=False):
                pass
        sheets = find_sheets(folder / name / "sheets")
        add(name, sheets)
    names = [*sheets]
    add(CHANCE, dict(zip(names, [sheets[name] for name in (*names[1:], names[0])], strict=True)))
    return result


def table(result: dict[str, dict[str, Any]]) -> str:
    """Percent, as meant; the average as published beside it, and the interval of the former."""
    categories = list(result["plain SD"]["level_1"])
    lines = ["| | average, published | corrected | 95 % | " + " | ".join(categories) + " |"]
    lines.append("|---" * (4 + len(categories)) + "|")
    for name, found in result.items():
        average = found["average"]
        cells = [f"{average['published']:.1f}", f"{average['corrected']:.1f}",
                 f"{average['low']:.1f} to {average['high']:.1f}"]
        cells += [f"{found['level_1'][category]['corrected']:.1f} ({found['level_1'][category]['published']:.1f})"
                  for category in categories]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--count", default=20, show_default=True, help="Prompts of two things, of three, and of four.")
@writes("dpg")
def main(count: int, results: Results) -> None:
    folder = Path(tempfile.mkdtemp()) if results.published else results.folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    result = measure(Pipeline.miniature(), count, folder)
    command = f"python -m benchmarks.dpg --count {count}"
    kept = {name: {key: value for key, value in found.items() if key != "items"} for name, found in result.items()}
    found = {"command": command, "machine": machine(), "systems": kept}
    (results.folder / "dpg.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(result["plain SD"], results.folder / "dpg.png")
    results.write_tables({"dpg": table(kept), "dpg measured": f"`{command}` on {machine()}."})
    if results.published:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
