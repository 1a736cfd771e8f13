"""Steps per second of ella_kd with ELLA, beside the published way, diffusers and k-diffusion.

All draw with DPM++ 2M and guidance on the same random weights and the same noise; `benchmarks/speed/ways.py` says what
each does. Every way runs once to warm up (compilation included, reported apart), then each has its turn in every round.
A run is timed from an idle device to an idle device, the connector's planning included. Reported are the median over
the rounds, its spread, and the median of the ratios to `published, eager` within each round; for bf16 on a CPU, where
the published way is fp32, to that.

Writes `steps_per_second.json`, the plot and the tables; settings measured before stay in them.

On a CPU set OMP_WAIT_POLICY, MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_ as the Makefile does. Examples:

\b
    python benchmarks/steps_per_second.py                                      # the miniature, a minute or two
    python benchmarks/steps_per_second.py --network sd15 --pixels 512 --steps 2 --dtype fp32 --dtype bf16
    python benchmarks/steps_per_second.py --network sd15 --device cuda --dtype fp16 \\
        --pixels 512 --pixels 768 --pixels 1024 --batch 1 --batch 4 --batch 16 --steps 20
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path.insert(0, str(Path(__file__).parents[1]))

import click
import diffusers
import torch

from benchmarks import plots
from benchmarks.machine import machine
from benchmarks.results import Results, device, writes
from benchmarks.speed.clock import Measured, Way, interleave
from benchmarks.speed.ways import MODES, WAYS, Setting, networks, published_in_fp32, ways

HERE = Path(__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FACTOR = {"miniature": 4, "sd15": 8}  # pixels of a latent
REFERENCES = (("published", "fp32"), ("published", "eager"))  # the first that was measured


def measure(setting: Setting, pixels: int, dtype: str, names: tuple[str, ...], modes: tuple[str, ...],
            rounds: int, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The ways of one setting, as they are written to the file."""
    measured = commit()
    chosen = ways(setting, networks(setting.network, setting.dtype, setting.device), names, modes)
    if setting.dtype == torch.bfloat16 and setting.device.type == "cpu":
        chosen.append(published_in_fp32(setting))
    chosen = [way for way in chosen if f"{way.name}, {way.mode}" not in skip]
    found, peaks = interleave(chosen, rounds, setting.device, setting.dtype, click.echo)
    by_way = {(way.name, way.mode): measured for way, measured in zip(chosen, found)}
    return {
        "network": setting.network, "pixels": pixels, "batch": setting.batch, "dtype": dtype, "steps": setting.steps,
        "rounds": rounds, "device": torch.cuda.get_device_name() if setting.device.type == "cuda" else "CPU",
        "machine": f"{machine()}, diffusers {diffusers.__version__}", "commit": measured,
        "matrix_peak_gflops": [round(peak / 1e9, 1) for peak in peaks],
        "ways": [row(way, by_way, setting.steps, median(peaks)) for way in chosen],
    }


def row(way: Way, found: dict[tuple[str, str], Measured], steps: int, peak: float) -> dict[str, Any]:
    """One way: steps/s, ratio to the reference, FLOPs of a step as its eager form counts them, share of the peak."""
    measured = found[way.name, way.mode]
    reference = next((found[name] for name in REFERENCES if name in found), None)
    eager = found.get((way.name, "eager"))
    seconds = median(measured.seconds)
    result: dict[str, Any] = {
        "way": way.name, "mode": way.mode, "steps_per_second": steps / seconds, "seconds": measured.seconds,
        "first_run": measured.first, "peak_mib": None if math.isnan(measured.peak) else measured.peak,
    }
    if eager is not None and way.mode != "fp32":  # the peak is that of the others' dtype
        result["gflop_per_step"] = eager.flops / steps / 1e9
        result["share_of_peak"] = eager.flops / seconds / peak
    if reference is not None:
        result["ratio"] = median(theirs / ours for theirs, ours in zip(reference.seconds, measured.seconds))
    same = reference if way.name in ("ELLA", "k-diffusion", "published") else found.get(("diffusers", "eager"))
    if same is not None and "flexible" not in way.name:
        result["error"] = float((measured.answer - same.answer).norm() / same.answer.norm())
    return result


def commit() -> str:
    """The commit that was measured, with a plus if files differ from it; empty outside a clone."""
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def key(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("network", "device", "pixels", "dtype", "batch"))


def title(result: dict[str, Any]) -> str:
    network = {"miniature": "The miniature", "sd15": "SD1.5"}[result["network"]]
    return f"{network}, {result['pixels']} px, batch {result['batch']}, {result['dtype']}, {result['device']}"


def table(results: list[dict[str, Any]]) -> str:
    """The settings as Markdown, a table each."""
    parts = []
    for result in results:
        peak = median(result["matrix_peak_gflops"])
        lines = [f"**{title(result)}**: {result['steps']} steps, {result['rounds']} rounds, matrix peak {peak:.0f} "
                 f"GFLOP/s ({min(result['matrix_peak_gflops']):.0f} to {max(result['matrix_peak_gflops']):.0f})", "",
                 "| way | mode | steps/s | slowest to fastest round | x published | GFLOP a step | "
                 "of the matrix peak | MiB above the weights | first run, s | error |", "|---" * 10 + "|"]
        for way in result["ways"]:
            slow, fast = (result["steps"] / f(way["seconds"]) for f in (max, min))
            cells = [way["way"], way["mode"], f"{way['steps_per_second']:.3g}", f"{slow:.3g} to {fast:.3g}"]
            cells += [_cell(way.get(name), form) for name, form in
                      (("ratio", ".2f"), ("gflop_per_step", ".4g"), ("share_of_peak", ".0%"), ("peak_mib", ".0f"),
                       ("first_run", ".1f"), ("error", ".0e"))]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join([*lines, "", f"On {result['machine']}, commit {result['commit']}."]))
    return "\n\n".join(parts)


def ratios(result: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Per way its name, and the slowest, the median and the fastest round over the reference in the same round."""
    seconds = {(way["way"], way["mode"]): way["seconds"] for way in result["ways"]}
    reference = next((seconds[name] for name in REFERENCES if name in seconds), None)
    if reference is None:
        return []
    rounds = {name: [theirs / ours for theirs, ours in zip(reference, seconds[name])] for name in seconds}
    return [(f"{way}, {mode}", min(found), median(found), max(found)) for (way, mode), found in rounds.items()]


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def write(measured: list[dict[str, Any]], results: Results) -> None:
    """Adds the measured to the file, in place of those of the same setting, and draws tables and plot anew."""
    path = results.folder / "steps_per_second.json"
    before = json.loads(path.read_text()) if path.exists() else []
    new = {key(result) for result in measured}
    merged = sorted([*(result for result in before if key(result) not in new), *measured], key=key)
    path.write_text(json.dumps(merged, indent=1) + "\n")
    plots.speed({title(result): ratios(result) for result in merged}, results.folder / "steps_per_second.png")
    results.write_tables({"speed": table(merged)})


@click.command(help=__doc__)
@click.option("--network", type=click.Choice(list(FACTOR)), default="miniature", show_default=True)
@click.option("--pixels", type=int, multiple=True, help="Side of the pictures.  [default: 32 or 512]")
@click.option("--batch", type=int, multiple=True, help="Pictures at once.  [default: 1, 4 and 16, or 1]")
@click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, default=("fp32",), show_default=True)
@click.option("--device", default="cpu", show_default=True, callback=device, help="cpu or cuda.")
@click.option("--steps", default=10, show_default=True, help="Solver steps of a run; one evaluation each.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--way", "names", type=click.Choice(WAYS), multiple=True, default=WAYS, help="Only these; default all.")
@click.option("--mode", "modes", type=click.Choice(MODES), multiple=True, default=MODES, help="The same.")
@click.option("--skip", multiple=True, help='Without this one: "constant, compiled".')
@click.option("--threads", type=int, help="Of the CPU.  [default: torch's]")
@writes("speed")
def main(network: str, pixels: tuple[int, ...], batch: tuple[int, ...], dtypes: tuple[str, ...], device: torch.device,
         steps: int, rounds: int, names: tuple[str, ...], modes: tuple[str, ...], skip: tuple[str, ...],
         threads: int | None, results: Results) -> None:
    if steps < 2:
        raise click.BadParameter("a run of DPM++ 2M takes at least 2 steps", param_hint="--steps")
    if threads:
        torch.set_num_threads(threads)
    small = network == "miniature"
    for side, dtype, b in product(pixels or (32 if small else 512,), dtypes, batch or ((1, 4, 16) if small else (1,))):
        setting = Setting(network, side // FACTOR[network], b, steps, DTYPES[dtype], device)
        click.echo(f"{network}, {side} px, batch {b}, {dtype}, {device}")
        found = [measure(setting, side, dtype, names, modes, rounds, skip)]
        click.echo("\n" + table(found) + "\n")
        write(found, results)
    click.echo(f"wrote {results.folder / 'steps_per_second.json'}")


if __name__ == "__main__":
    main()
