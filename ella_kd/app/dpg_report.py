"""DPG-Bench's scores as JSON, as a table in Markdown and as a plot, the published arithmetic beside what is meant."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ella_kd.app.dpg_answers import Answers
from ella_kd.app.dpg_questions import Question, by_item, problems
from ella_kd.app.dpg_score import CELLS, Mean, Zeroing, published, score
from ella_kd.files import writing

SHOWN = 5  # names of what is missing, in the table; the JSON has all


def report(questions: Sequence[Question], answers: Answers, sheets: Sequence[str], *, judge: str, cells: int = CELLS,
           zeroing: Zeroing = "dpg", missing: dict[str, str] | None = None) -> dict[str, Any]:
    """Everything that is known of a run, ready for JSON (None for a number that is not there).

    sheets: the names of the pictures that the published script would have found. missing: prompts without a sheet
    that could be read, and why. Raises ValueError as `score` does.
    """
    meant = score(questions, answers, cells=cells, zeroing=zeroing, missing=missing)
    try:
        old: dict[str, Any] = asdict(published(questions, answers, sheets, cells=cells, exact=False))
    except ValueError as error:
        old = {"average": None, "level_1": {}, "level_2": {}, "prompts": 0, "dropped": {}, "stops": str(error)}
    known = by_item(questions)
    found = {"judge": judge, "cells": cells, "zeroing": zeroing, "prompts": len(meant.items), "of": len(known),
             "questions": sum(map(len, known.values())), "unclear": meant.unclear,
             "average": _row(meant.average, old["average"])}
    for level in ("level_1", "level_2"):
        means: dict[str, Mean] = getattr(meant, level)
        found[level] = {name: _row(means.get(name), old[level].get(name))
                        for name in sorted({*means, *old[level]})}
    found["published"] = {name: old[name] for name in ("prompts", "dropped", "stops") if name in old}
    found |= {"missing": meant.missing, "without_questions": sorted({*sheets} - {*known}),
              "problems": problems(questions), "items": meant.items}
    return found


def _row(mean: Mean | None, old: float | None) -> dict[str, float | None]:
    old = None if old is None or math.isnan(old) else old
    return {"published": old, "corrected": None, "low": None, "high": None, "questions": 0} if mean is None else {
        "published": old, "corrected": mean.value, "low": mean.low, "high": mean.high, "questions": mean.count}


def markdown(found: dict[str, Any]) -> str:
    """The table, and under it what it was made of and what is missing."""
    meaning = {"dpg": "through parents of parents", "dsg": "of direct parents"}[found["zeroing"]]
    lines = [f"| judge: {_plain(found['judge'])} | published | corrected | 95 % | n |", "|---|---|---|---|---|"]
    rows = {"**average**": found["average"], **{f"**{_plain(name)}**": row for name, row in found["level_1"].items()},
            **{_plain(name): row for name, row in found["level_2"].items()}}
    for name, row in rows.items():
        between = "" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
        n = f"{found['prompts']} prompts" if row is found["average"] else row["questions"]
        lines.append(f"| {name} | {_number(row['published'])} | {_number(row['corrected'])} | {between} | {n} |")
    said = [f"{found['prompts']} of {found['of']} prompts, {found['cells']} pictures each; zeroing "
            f"`{found['zeroing']}` ({meaning}); categories before zeroing. Another judge's answers cannot be compared."]
    if found["unclear"]:
        said.append(f"{found['unclear']} answers are neither yes nor no, and count as no.")
    old = found["published"]
    said.append(f"The published script: {old['stops']}." if "stops" in old else
                f"The published arithmetic counts {old['prompts']} prompts" + _named(old["dropped"], ", drops ") + ".")
    if found["missing"]:
        said.append(f"Without a score:{_named(found['missing'], ' ')}.")
    if found["without_questions"]:
        said.append("Sheets without questions:" + _named(dict.fromkeys(found["without_questions"], ""), " ") + ".")
    if found["problems"]:
        said.append(f"The questions: {len(found['problems'])} rows with a fault, the first: {found['problems'][0]}.")
    return "\n".join([*lines, "", *said, ""])


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "(none)"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _named(reasons: dict[str, str], before: str) -> str:
    if not reasons:
        return ""
    few = [f"{name} ({reason})" if reason else name for name, reason in list(reasons.items())[:SHOWN]]
    return f"{before}{len(reasons)}: " + "; ".join(few) + "; ..." * (len(reasons) > SHOWN)


def pyplot() -> Any:
    """matplotlib's, without a window. Raises ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the plot needs matplotlib: pip install matplotlib, or leave it out with --no-plot"
                         ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(found: dict[str, Any], path: Path) -> None:
    """Average, level 1 and level 2 as dots with their intervals; the published arithmetic's numbers as rings."""
    plt = pyplot()
    rows = [("average", found["average"], "#111111")]
    rows += [(name or "(none)", row, "#1f5fb4") for name, row in found["level_1"].items()]
    rows += [(name or "(none)", row, "#6d6d6d") for name, row in found["level_2"].items()]
    figure, axes = plt.subplots(figsize=(7.5, 1.3 + 0.26 * len(rows)), layout="constrained")
    for y, (_, row, colour) in enumerate(reversed(rows)):
        if row["corrected"] is not None:
            axes.plot([row["low"], row["high"]], [y, y], color=colour, lw=3.5, alpha=0.3, solid_capstyle="butt")
            axes.plot(row["corrected"], y, "o", color=colour, markersize=5)
        if row["published"] is not None:
            axes.plot(row["published"], y, "o", mfc="none", mec="#d1660a", markersize=8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
    for label, (*_, colour) in zip(axes.get_yticklabels(), reversed(rows), strict=True):
        label.set_color(colour)
    axes.axhline(len(rows) - 1.5, color="#d4d4d4", lw=0.8)
    axes.axhline(len(found["level_2"]) - 0.5, color="#d4d4d4", lw=0.8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.2)
    least = min(value for _, row, _ in rows for value in (row["low"], row["published"]) if value is not None)
    axes.set_xlim(max(-1.0, min(90.0, least - 3)), 101)
    axes.set_xlabel("percent; dot: as meant, bar: 95 % of resampled prompts, ring: as published", fontsize=9)
    axes.set_title(f"DPG-Bench, {found['prompts']} of {found['of']} prompts, judge: {found['judge']}", loc="left",
                   fontsize=10)
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def write(found: dict[str, Any], folder: Path, with_plot: bool = True) -> list[Path]:
    """scores.json, scores.md and, if asked for, scores.png; which files there are."""
    texts = {"scores.json": json.dumps(found, indent=1, ensure_ascii=False) + "\n", "scores.md": markdown(found)}
    for name, text in texts.items():
        with writing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if with_plot:
        plot(found, folder / "scores.png")
    return [folder / name for name in (*texts, *["scores.png"] * with_plot)]
