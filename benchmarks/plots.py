"""The pictures of the measured tables, each from the numbers on file: `python -m benchmarks.plots` draws them anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS, GREY, LIGHT = "#1f5fb4", "#555555", "#d4d4d4"
WARM = "#d1660a"
Ratios = list[tuple[str, float, float, float]]  # label; slowest, median and fastest round


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "figure.dpi": 100})
    return plt


def save(plt: Any, figure: Any, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def scores(result: dict[str, Any], path: Path) -> None:
    """Semantic score at 5 steps, a row per sampler, best first; what more steps give is in the title."""
    plt = pyplot()
    rows = sorted(result.items(), key=lambda item: item[1]["5"]["score"])
    least = min(row[n]["score"] for _, row in rows for n in ("10", "20"))
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for y, (name, row) in enumerate(rows):
        few, colour = row["5"]["score"], WARM if name.endswith("_cfg_pp") else OURS
        axes.plot([few, row["20"]["score"]], [y, y], color=LIGHT, lw=2, zorder=1)
        axes.plot(few, y, "o", color=colour, markersize=7, zorder=3)
        axes.plot(row["20"]["score"], y, "o", color="white", mec=GREY, markersize=5, zorder=2)
        axes.annotate(f"{few:.0f}", (few, y), (-8, 0), textcoords="offset points", ha="right", va="center",
                      color=colour)
    axes.set_yticks(range(len(rows)), [f"{name}  ({row['5']['evaluations']})" for name, row in rows])
    for label, (name, _) in zip(axes.get_yticklabels(), rows):
        label.set_color(WARM if name.endswith("_cfg_pp") else OURS)
    axes.set(xlim=(0, 104),
             xlabel="semantic score, two things; filled: 5 steps (evaluations in brackets), open: 20 steps")
    axes.tick_params(axis="y", length=0)
    reached = "all score 100" if least == 100 else f"all score {math.floor(least)} or more"
    axes.set_title(f"At 5 steps the samplers differ; at 10 and 20 {reached}", loc="left")
    save(plt, figure, path)


def orders(result: dict[str, Any], groups: Sequence[Sequence[str]], path: Path) -> None:
    """Error against evaluations, a panel per order; methods that are equal without their noise share a line."""
    plt = pyplot()
    lines = [(", ".join(names), result[names[0]]["order"],
              list(zip(*(result[names[0]]["errors"] + result[names[0]]["many"][1:3])))) for names in groups]
    kinds = sorted({round(order) for _, order, _ in lines})
    figure, panels = plt.subplots(2, -(-len(kinds) // 2), figsize=(11, 8.2), sharex=True, sharey=True, squeeze=False,
                                  layout="constrained")
    for axes, kind in zip(panels.flat, kinds):
        for _, _, (evaluations, error) in lines:
            axes.loglog(evaluations, error, color=LIGHT, lw=0.8, zorder=1)
        here = sorted((line for line in lines if round(line[1]) == kind), key=lambda line: -line[2][1][-1])
        colours = plt.get_cmap("viridis")
        ends = spread([line[2][1][-1] for line in here], 1.75)
        for i, ((label, order, (evaluations, error)), y) in enumerate(zip(here, ends)):
            colour = colours(0.85 * i / max(1, len(here) - 1))
            axes.loglog(evaluations, error, color=colour, lw=1.6, marker="o", markersize=2.5, zorder=2)
            axes.annotate(f"{label}  {order:.2f}", (evaluations[-1], error[-1]), (560, y), color=colour, fontsize=8,
                          va="center", arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "relpos": (0, 0.5)})
        axes.set_title(f"order {kind}", loc="left")
        axes.set(xlim=(3.5, 12000), xticks=[4, 10, 40, 100, 400], xticklabels=["4", "10", "40", "100", "400"])
        axes.minorticks_off()
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.2)
    for axes in panels.flat[len(kinds):]:
        axes.set_visible(False)
    figure.supxlabel("evaluations of the denoiser")
    figure.supylabel("error against the exact flow (rms)")
    save(plt, figure, path)


def spread(values: Sequence[float], factor: float) -> list[float]:
    """Falling values moved apart so that each is at least `factor` below the one before it."""
    placed: list[float] = []
    for value in values:
        placed.append(min(value, placed[-1] / factor) if placed else value)
    return placed


def speed(settings: dict[str, Ratios], path: Path) -> None:
    """Steps per second over the published way's, a panel per setting: the median round, and slowest to fastest."""
    plt = pyplot()
    shown = {title: rows for title, rows in settings.items() if rows}
    if not shown:
        return
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(4.2 * columns, 2.7 * lines), sharex=True, squeeze=False,
                                  layout="constrained")
    for axes, (title, rows) in zip(panels.flat, shown.items()):
        for y, (label, low, middle, high) in enumerate(reversed(rows)):
            colour = OURS if label.startswith("ELLA") else GREY
            axes.plot([low, high], [y, y], color=colour, lw=4, alpha=0.35, solid_capstyle="butt")
            axes.plot(middle, y, "o", color=colour, markersize=5)
            axes.annotate(f"{middle:.2f}", (high, y), (5, 0), textcoords="offset points", va="center", color=colour,
                          fontsize=7.5)
        axes.axvline(1, color=GREY, lw=0.7, zorder=0)
        axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)], fontsize=8)
        for tick, row in zip(axes.get_yticklabels(), reversed(rows)):
            tick.set_color(OURS if row[0].startswith("ELLA") else GREY)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelbottom=True)
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(axis="x", alpha=0.2)
    for axes in panels.flat[len(shown):]:
        axes.set_visible(False)
    figure.supxlabel("steps/s, published = 1; dot: median of the rounds, bar: slowest to fastest round, each against "
                     "the published way in the same round", fontsize=9)
    save(plt, figure, path)


def main() -> None:
    import json

    from benchmarks import samplers, steps_per_second
    from benchmarks.results import HERE

    measured = {name: json.loads((HERE / f"{name}.json").read_text())
                for name in ("score", "samplers", "steps_per_second")}
    scores(measured["score"]["samplers"], HERE / "samplers.png")
    methods = measured["samplers"]["orders"]
    orders(methods, samplers.same(methods), HERE / "orders.png")
    speed({steps_per_second.title(result): steps_per_second.ratios(result) for result in measured["steps_per_second"]},
          HERE / "steps_per_second.png")


if __name__ == "__main__":
    main()
