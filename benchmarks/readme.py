"""The README's tables, from the library's own and from what was measured: `python -m benchmarks.readme --publish`."""

from __future__ import annotations

import json
import re
from typing import Any

import click

from benchmarks.results import HERE, Results, between_marks, writes
from ella_kd.samplers import SAMPLERS, Sampler

README = HERE.parent / "README.md"


def samplers_table() -> str:
    """A Markdown row per method; the orders are those that `python -m benchmarks.samplers` measured."""
    orders = json.loads((HERE / "samplers.json").read_text())["orders"]
    rows = ["| `sample_` | family, paper | evaluations a step | measured order | adds noise | CFG++ |"]
    rows.append("|---" * 6 + "|")
    for name, sampler in SAMPLERS.items():
        if sampler.cfg_pp:
            continue
        order = f"{orders[name]['order']:.2f}" if name in orders else ""
        noise = f"yes ({sampler.solver.noise.capitalize()})" if sampler.stochastic else ""
        forms = [other for other in SAMPLERS if re.fullmatch(rf"{name}(_paper|_comfyui)?_cfg_pp", other)]
        cfg_pp = ", ".join(f"`{form.removeprefix(name)}`" for form in forms)
        family = f"{sampler.family}{paper(sampler)}"
        rows.append(f"| `{name}` | {family} | {sampler.evals} | {order} | {noise} | {cfg_pp} |")
    return "\n".join(rows)


def paper(sampler: Sampler) -> str:
    """The first arXiv number that the function's docstring names, or else the method's."""
    for text in (sampler.function.__doc__, type(sampler.solver).__doc__):
        found = re.search(r"\d{4}\.\d{5}", text or "")
        if found:
            return f", [{found[0]}](https://arxiv.org/abs/{found[0]})"
    return ""


def measured_table(systems: dict[str, Any]) -> str:
    """What each system draws of two, three and four things, from `systems` in score.json."""
    counts = [things for things in ("two", "three", "four") if things in systems]
    lines = ["| | " + " | ".join(f"{things} things: score | all right" for things in counts) + " |"]
    lines.append("|---" * (1 + 2 * len(counts)) + "|")
    rows = {name: [systems[things][name]["right"] for things in counts] for name in systems["one"]}
    rows["ELLA flexible, pictures of other prompts (chance)"] = [
        systems[things]["ELLA flexible, dense prompt"]["shuffled"] for things in counts]
    lines += [f"| {name} | " + " | ".join(f"{row['score']:.1f} | {row['all_right']:.1f} %" for row in found) + " |"
              for name, found in rows.items()]
    return "\n".join(lines)


def wordings_table(modes: dict[str, Any]) -> str:
    """A row per wording that stands out, from `rows` in wordings.json: the worst of the single forms and the rest."""
    lines = ["| three things, said | " + " | ".join(f"ELLA {mode}" for mode in modes) + " |"]
    lines.append("|---" * (1 + len(modes)) + "|")

    def worst(rows: dict[str, Any], start: str) -> float:
        return min(row["all_right"] for name, row in rows.items() if name.startswith(start))

    shown = {"in one trained form throughout, the worst of ten": 'only "',
             "in a form that no training had, the worse of two": 'held-out form "'}
    names = ["as in training", *shown, "held-out orders of attributes", "six orders", "everything said twice",
             "no marks", "upper case", "places by relation where possible"]
    for name in names:
        cells = [worst(rows, shown[name]) if name in shown else rows[name]["all_right"] for rows in modes.values()]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.0f} %" for cell in cells) + " |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """The README's tables by the names of their marks."""
    score = json.loads((HERE / "score.json").read_text())
    return {"samplers": samplers_table(), "measured": measured_table(score["systems"]),
            "wordings": wordings_table(json.loads((HERE / "wordings.json").read_text())["rows"])}


def publish() -> None:
    """Writes them into the README."""
    text = README.read_text()
    for name, table in tables().items():
        text = between_marks(text, name, table)
    README.write_text(text)


@click.command(help=__doc__)
@writes("readme")
def main(results: Results) -> None:
    if results.published:
        publish()
    else:
        results.write_tables(tables())


if __name__ == "__main__":
    main()
