"""What the samplers are: measured order of convergence, error against evaluations, and the driver's own time.

All on the exact mixture of `benchmarks/mixture.py`, in float64, from sigma 20 to .05 on a Karras grid without the jump
to 0. Writes `samplers.json`, `orders.png` and the tables.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks import plots, readme
from benchmarks.machine import machine
from benchmarks.mixture import Mixture
from benchmarks.results import Results, writes
from ella_kd.samplers import SAMPLERS, Solver, get_sigmas_karras, sample
from ella_kd.samplers.upstream import k_diffusion

SIGMA_MIN, SIGMA_MAX = 0.05, 20.0
COUNTS = (40, 80, 160, 320, 640)
FEW = (4, 6, 8, 12, 16, 20, 28, 40, 64)
FLOOR = 1e-11  # below this an error is rounding
QUANTILES = np.linspace(0.03, 0.97, 12)


def deterministic(solver: Solver) -> Solver | None:
    """The method without its noise; None for one that is nothing without it."""
    for option, value in (("eta", 0.0), ("tau", lambda sigma: 0.0)):
        if hasattr(solver, option):
            solver = dataclasses.replace(solver, **{option: value})
    return None if any(step.noises for step in solver.steps((4.0, 2.0, 1.0, 0.5))) else solver


def methods() -> dict[str, Solver]:
    """The deterministic form of every method on a fixed grid, and the corrected 3M."""
    found: dict[str, Solver] = {}
    for name, row in SAMPLERS.items():
        if row.cfg_pp:
            continue
        solver = deterministic(row.solver)
        if solver is not None:
            found[name] = solver
            if hasattr(solver, "corrected"):
                found[f"{name}, corrected"] = dataclasses.replace(solver, **{"corrected": True})
    return found


def errors(solver: Solver, counts: tuple[int, ...]) -> list[tuple[int, float]]:
    """(evaluations, root mean square error against the exact flow) at each number of steps."""
    mixture = Mixture()
    start, end = (
        torch.tensor([mixture.quantile(u, sigma) for u in QUANTILES]).view(1, 1, 3, 4)
        for sigma in (SIGMA_MAX, SIGMA_MIN)
    )
    found = []
    for n in counts:
        sigmas = get_sigmas_karras(n + 1, SIGMA_MIN, SIGMA_MAX)[:-1]
        x, _ = sample(solver, mixture, start, sigmas, disable=True)
        found.append((len(solver.eval_sigmas(sigmas)), float((x - end).square().mean().sqrt())))
    return found


def order(found: list[tuple[int, float]]) -> float:
    """Slope of log error against log n over the last three counts whose error is not rounding."""
    kept = [(n, error) for n, (_, error) in zip(COUNTS, found, strict=True) if error > FLOOR][-3:]
    n, error = zip(*kept, strict=True)
    return float(-np.polyfit(np.log(n), np.log(error), 1)[0])


def measure_orders() -> dict[str, Any]:
    """Per method: the order, and [evaluations, error] from 4 to 640 steps."""
    result = {}
    for name, solver in methods().items():
        many = errors(solver, COUNTS)
        result[name] = {"order": round(order(many), 2), "errors": errors(solver, FEW), "many": many}
        click.echo(f"{name}: order {result[name]['order']:.2f}")
    return result


def fixed_noise(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return lambda sigma, sigma_next: noise


def measure_overhead(rounds: int, steps: int = 40) -> dict[str, dict[str, float]]:
    """Microseconds per step around a model that does nothing, [1, 4, 64, 64], ours and k-diffusion's in turn; the
    smallest of the rounds, which other work on the machine disturbs least."""
    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1)) * 14.6
    sigmas = get_sigmas_karras(steps, 0.03, 14.6)
    upstream = k_diffusion().sampling

    def nothing(x: Tensor, sigma: Tensor) -> Tensor:
        return x

    result = {}
    for name, row in SAMPLERS.items():
        theirs = getattr(upstream, f"sample_{name}", None)
        if theirs is None or row.cfg_pp:
            continue
        options = {"noise_sampler": fixed_noise(x)} if row.stochastic else {}
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for k in range(rounds + 2):
            for which, function in (("ours", row.function), ("theirs", theirs)):
                begin = time.perf_counter()
                function(nothing, x, sigmas, disable=True, **options)
                if k >= 2:  # the first two warm up
                    times[which].append(1e6 * (time.perf_counter() - begin) / steps)
        result[name] = {which: round(min(each), 1) for which, each in times.items()}
        click.echo(f"{name}: {result[name]['ours']} us a step, k-diffusion {result[name]['theirs']}")
    return result


def orders_table(result: dict[str, Any]) -> str:
    counts = (8, 12, 20, 40)
    lines = ["| method, without its noise | order | " + " | ".join(f"error, {n} steps" for n in counts) + " |"]
    lines.append("|---" * (2 + len(counts)) + "|")
    for name, row in result.items():
        few = dict(zip(FEW, row["errors"], strict=True))
        lines.append(f"| {name} | {row['order']:.2f} | " + " | ".join(f"{few[n][1]:.1e}" for n in counts) + " |")
    return "\n".join(lines)


def overhead_table(result: dict[str, dict[str, float]]) -> str:
    lines = ["| sampler | ours | k-diffusion |", "|---|---|---|"]
    lines += [f"| {name} | {row['ours']:.0f} | {row['theirs']:.0f} |" for name, row in result.items()]
    return "\n".join(lines)


def same(result: dict[str, Any]) -> list[list[str]]:
    """The names, those of equal errors together."""
    groups: list[list[str]] = []
    for name, row in result.items():
        for group in groups:
            if np.allclose(row["errors"], result[group[0]]["errors"], rtol=1e-6, atol=0):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


@click.command(help=__doc__)
@click.option("--rounds", default=40, show_default=True, help="Runs of each side of the overhead.")
@writes("samplers")
def main(rounds: int, results: Results) -> None:
    overhead = measure_overhead(rounds)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        orders = measure_orders()
    finally:
        torch.set_default_dtype(before)
    result = {"machine": machine(), "rounds": rounds, "orders": orders, "overhead": overhead}
    path = results.folder / "samplers.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plots.orders(orders, same(orders), results.folder / "orders.png")
    results.write_tables({
        "orders": orders_table(orders), "overhead": overhead_table(overhead),
        "samplers machine": f"`python -m benchmarks.samplers --rounds {rounds}` on {result['machine']}.",
    })
    if results.published:
        readme.publish()
    click.echo(f"wrote {path}")


if __name__ == "__main__":
    main()
