"""What it is worth that the connector sees the timestep the network sees: the same pictures with other timesteps.

Nothing is trained anew: in each row the UNet gets its own timestep t and the connector some function of it. Early facts
(background, count, shape, colour, place) and late ones (fill, rim) are scored apart, beside other prompts' scenes. For
img2img the start is a picture of the same scene with other fills and rims. Writes `exactness.json` and the table.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import click
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.miniature import captions
from benchmarks.miniature.questions import ask
from benchmarks.miniature.scenes import Scene, parse, random_scene, random_thing, render, to_pictures, to_tensor
from benchmarks.results import Results, writes
from ella_kd import CFGDenoiser, ELLADenoiser, Pipeline
from ella_kd.models import TSC, NoiseSchedule
from ella_kd.samplers import get_sigmas_karras, randn, sample_dpmpp_2m

STEPS, SCALE, BATCH = 20, 3.0, 50
Change = Callable[[Tensor], Tensor]  # the network's timesteps -> the connector's
Rows = dict[str, dict[str, tuple[float, float]]]  # what the connector sees -> early, late, ...: mean, half an interval


class AskedAt(nn.Module):
    """A connector that is asked at `change(t)` where the network is at t."""

    def __init__(self, tsc: TSC, change: Change) -> None:
        super().__init__()
        self.tsc, self.change, self.input_dim = tsc, change, tsc.input_dim

    def forward(self, features: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.tsc(features, self.change(t), mask)


def by_step(timesteps: Sequence[float]) -> Change:
    """ComfyUI-ELLA's tokens: those of the run's step i over the i-th of equal parts of 999 to 0, whatever the schedule.

    Exact where a whole run's timesteps are equally spaced (its `normal` schedule), and only there.
    """
    values, n = torch.tensor(timesteps), len(timesteps)
    return lambda t: values.to(t)[((1 - t / 999) * n).floor().long().clamp(0, n - 1)]


def changes(timesteps: Sequence[float]) -> dict[str, Change]:
    """What the connector is told, by name; the first is right."""
    fixed = {f"always {n}": (lambda t, n=n: torch.full_like(t, n)) for n in (80, 500, 999)}
    return {"t": lambda t: t, "t, rounded": torch.round, "step-indexed (ComfyUI-ELLA)": by_step(timesteps), **fixed,
            "999 - t": lambda t: 999 - t}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A schedule of STEPS steps; with `denoise` below 1 the last ones of a longer schedule, from a picture on."""

    spacing: str  # "karras", or "normal": equal steps of t
    denoise: float = 1.0

    @property
    def name(self) -> str:
        return self.spacing if self.denoise == 1 else f"{self.spacing}, img2img {self.denoise:g}"

    def sigmas(self, schedule: NoiseSchedule) -> Tensor:
        steps = round(STEPS / self.denoise)
        if self.spacing == "normal":
            whole = torch.cat([schedule.t_to_sigma(torch.linspace(999, 0, steps)), torch.zeros(1)])
        else:
            whole = get_sigmas_karras(steps, schedule.sigma_min, schedule.sigma_max)
        return whole[-STEPS - 1 :]


RUNS = (Run("normal"), Run("karras"), Run("normal", 0.5), Run("karras", 0.5))


def scenes(count: int, things: int) -> list[Scene]:
    rng = random.Random(f"exactness {things}")
    return [random_scene(rng, things, unseen=True) for _ in range(count)]


def redecorated(scene: Scene, rng: random.Random) -> Scene:
    """The same early facts with other fills and rims."""
    things = []
    for thing in scene.things:
        other = random_thing(rng, thing.place)
        while other.fill == thing.fill or other.rim == thing.rim:
            other = random_thing(rng, thing.place)
        things.append(replace(thing, fill=other.fill, rim=other.rim))
    return Scene(scene.background, tuple(things))


@torch.no_grad()
def draw(pipeline: Pipeline, wanted: Sequence[Scene], run: Run, change: str, mode: str = "fixed") -> list[Scene]:
    """What is read from one picture per scene, seeds 0, 1, 2, ..."""
    assert pipeline.t5 is not None and pipeline.tsc is not None
    exact = ELLADenoiser(pipeline.unet, pipeline.tsc, pipeline.noise_schedule)
    assert isinstance(pipeline.noise_schedule, NoiseSchedule)
    sigmas = run.sigmas(pipeline.noise_schedule)
    told = changes(exact.sigma_to_t(sigmas[:-1]).tolist())[change]
    connector = AskedAt(pipeline.tsc, told)
    model = CFGDenoiser(ELLADenoiser(pipeline.unet, connector, pipeline.noise_schedule))  # type: ignore[arg-type]
    rng = random.Random("exactness prompts")
    prompts = [captions.text(captions.dense(scene, rng)) for scene in wanted]
    length = 128 if mode == "fixed" else None
    side, found = pipeline.size // pipeline.vae.factor, []
    for first in range(0, len(wanted), BATCH):
        part = wanted[first : first + BATCH]
        x = randn((len(part), 4, side, side), list(range(first, first + len(part)))) * sigmas[0]
        if run.denoise < 1:
            begin = random.Random(f"exactness start {first}")
            x = x + pipeline.vae.encode(to_tensor([render(redecorated(scene, begin)) for scene in part]))
        extra_args = {"cond": pipeline.t5(prompts[first : first + BATCH], length), "uncond": pipeline.t5("", length),
                      "cond_scale": SCALE}  # fmt: skip
        latents = sample_dpmpp_2m(model, x, sigmas, extra_args=extra_args, disable=True)
        found += [parse(picture) for picture in to_pictures(pipeline.vae.decode(latents))]
    return found


def shares(wanted: Sequence[Scene], found: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Per picture, the share of early and of late facts that are right, in percent."""
    rows = []
    for scene, got in zip(wanted, found, strict=True):
        answers = ask(scene, got).answers
        late = [right for category, right in answers if category == "detail"]
        early = [right for category, right in answers if category in ("global", "count", "entity", "attribute")]
        rows.append((100 * sum(early) / len(early), 100 * sum(late) / len(late)))
    early, late = np.array(rows).T
    return early, late


def mean_and_interval(values: np.ndarray) -> tuple[float, float]:
    """The mean over pictures and half of its 95 % interval."""
    return round(float(values.mean()), 2), round(1.96 * float(values.std(ddof=1)) / math.sqrt(len(values)), 2)


def measure(pipeline: Pipeline, count: int, things: int, mode: str = "fixed") -> dict[str, Rows]:
    wanted = scenes(count, things)
    result: dict[str, Rows] = {}
    for run in RUNS:
        rows: Rows = {}
        right: tuple[np.ndarray, np.ndarray] | None = None
        for name in changes([0.0]):
            found = draw(pipeline, wanted, run, name, mode)
            early, late = shares(wanted, found)
            right = right or (early, late)
            rows[name] = {"early": mean_and_interval(early), "late": mean_and_interval(late),
                          "early_change": mean_and_interval(early - right[0]),
                          "late_change": mean_and_interval(late - right[1])}  # fmt: skip
            click.echo(f"{run.name} | {name}: {rows[name]}")
            if name == "t":
                early, late = shares([*wanted[1:], wanted[0]], found)
                rows["chance: other prompts"] = {"early": mean_and_interval(early), "late": mean_and_interval(late)}
        result[run.name] = rows
    return result


def table(result: dict[str, Rows]) -> str:
    """Percent of facts right with 95 % intervals over pictures; the change against t is taken picture by picture."""
    head = "| schedule | the connector sees | early facts | late facts | early, against t | late, against t |"
    lines = [head, "|---" * 6 + "|"]
    for run, rows in result.items():
        for name, row in rows.items():
            cells = [f"{row[key][0]:.1f} ± {row[key][1]:.1f}" for key in ("early", "late")]
            cells += [f"{row[key][0]:+.1f} ± {row[key][1]:.1f}" if key in row and name != "t" else ""
                      for key in ("early_change", "late_change")]  # fmt: skip
            lines.append(f"| {run} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--count", default=200, show_default=True, help="Held-out prompts.")
@click.option("--things", default=3, show_default=True, help="Things in each.")
@click.option("--mode", type=click.Choice(["fixed", "flexible"]), default="fixed", show_default=True)
@writes("exactness")
def main(count: int, things: int, mode: str, results: Results) -> None:
    result = measure(Pipeline.miniature(), count, things, mode)
    command = f"python -m benchmarks.exactness --count {count} --things {things} --mode {mode}"
    found = {"command": command, "machine": machine(), "runs": result}
    (results.folder / "exactness.json").write_text(json.dumps(found, indent=1) + "\n")
    results.write_tables({"exactness": table(result), "exactness measured": f"`{command}` on {machine()}."})


if __name__ == "__main__":
    main()
