"""A batch of many requests beside the bare loop: pictures a second, and memory from beginning to end.

    python -m benchmarks.batch --requests 10000 --steps 4
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.machine import machine
from ella_kd import Pipeline
from ella_kd.app.batch import Batch
from ella_kd.images import Picture
from ella_kd.jobs import jobs
from ella_kd.request import Request

PLACES = ["top left corner", "top right corner", "center", "bottom left corner", "bottom right corner"]
COLOURS, SHAPES = ["red", "blue", "green", "yellow"], ["heart", "ring", "cross", "square"]
ROUND = 320  # requests of a round, of each


def requests(count: int, steps: int) -> list[Request]:
    """Eighty prompts, each request with a seed of its own."""
    return [Request(f"The scene is set in snow. A {COLOURS[i % 4]} {SHAPES[i // 4 % 4]} sits in the "
                    f"{PLACES[i // 16 % 5]}.", seed=i, steps=steps, scale=3.0, version="") for i in range(count)]


def bare(sd: Pipeline, asked: list[Request], folder: Path, size: int) -> None:
    """The loop that anybody would write."""
    number = 0
    for job in jobs(sd, asked, batch_size=size, progress=False):
        for picture in map(Picture, job.draw(), job.requests):
            picture.save(folder / f"{number:08d}.png")
            number += 1


def batched(sd: Pipeline, asked: list[Request], folder: Path, size: int) -> None:
    """A batch, its lock, markers and manifest included."""
    Batch(folder, {"": asked}, {}, batch=size).run(lambda name: sd)


def timed(way: Callable[[Path], None]) -> tuple[float, float]:
    """Seconds, and seconds of the processor, which others on the machine change less."""
    with tempfile.TemporaryDirectory() as folder:
        began, busy = time.perf_counter(), time.process_time()
        way(Path(folder))
        return time.perf_counter() - began, time.process_time() - busy


def memory() -> float:
    """MB that this process holds."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@click.command()
@click.option("--requests", "count", default=10_000, show_default=True, help="Of the long run.")
@click.option("--steps", default=4, show_default=True)
@click.option("--batch", "size", default=16, show_default=True)
@click.option("--rounds", default=6, show_default=True, help="Of bare loop and batch in turns, 320 requests each.")
def main(count: int, steps: int, size: int, rounds: int) -> None:
    """Bare loop and batch in turns, so that both see the same machine; then one long run, and its memory."""
    sd = Pipeline.miniature()
    asked = requests(max(count, ROUND), steps)
    ways = [lambda folder: bare(sd, asked[:ROUND], folder, size),
            lambda folder: batched(sd, asked[:ROUND], folder, size)]
    ratios: list[tuple[float, float]] = []
    for each in range(rounds + 1):
        first = each % 2
        times = {first: timed(ways[first]), 1 - first: timed(ways[1 - first])}
        if each:  # the first is to warm up
            ratios.append((times[0][0] / times[1][0], times[0][1] / times[1][1]))
            click.echo("; ".join(f"{name} {ROUND / times[i][0]:.2f} pictures/s, {times[i][1] / ROUND * 1000:.1f} ms of "
                                 "the processor each" for i, name in enumerate(("bare loop", "batch"))))
    for name, found in zip(("the clock", "the processor"), zip(*ratios, strict=True), strict=True):
        click.echo(f"batch / bare loop by {name}: {statistics.median(found):.3f} (median of {rounds}, {min(found):.3f} "
                   f"to {max(found):.3f})")
    if not count:
        return
    seen: list[tuple[int, float, float]] = []
    began, settled = time.perf_counter(), 0

    def told(more: int) -> None:
        nonlocal settled
        settled += more
        if settled // 1000 > (settled - more) // 1000:
            seen.append((settled, time.perf_counter() - began, memory()))
            click.echo(f"{settled:6} requests, {settled / seen[-1][1]:.2f} a second, {seen[-1][2]:.0f} MB")

    with tempfile.TemporaryDirectory() as folder:
        done = Batch(folder, {"": asked[:count]}, {}, batch=size).run(lambda name: sd, told=told)
        files = sum(1 for _ in Path(folder).glob("0*/*.png"))
    click.echo(f"{done.pictures} pictures, {files} files, {len(done.failed)} failed; {machine()}")


if __name__ == "__main__":
    main()
