"""At which noise each fact of a picture can be seen: the Bayes-optimal reading of noisy latents.

A text can only help to decide what the noisy latents do not show yet. Every scene of one thing is a template; the
posterior over all of them, given latents + sigma * noise, is exact, and so is the mass on the true value of each fact.
Where a fact's mass is half-way between chance and 1 is the sigma at which sampling decides it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import astuple

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.miniature.latents import codes
from benchmarks.miniature.scenes import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    FILLS,
    RIMS,
    SHAPES,
    Scene,
    Thing,
    render,
    to_tensor,
)
from benchmarks.results import Results, writes
from ella_kd import Pipeline

EARLY, LATE = ("background", "count", "place"), ("fill", "rim")
FACTS = ("background", "count", "place", "shape", "colour", "fill", "rim")
SIGMAS = (0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 14.6)
Latents = Callable[[list[Scene]], Tensor]  # scenes -> [n, d], in the units of sigma


def every_scene() -> list[Scene]:
    """Every scene of one thing, and the four empty ones."""
    things = itertools.starmap(Thing, itertools.product(range(9), SHAPES, COLOUR_NAMES, FILLS, RIMS))
    alone = itertools.product(BACKGROUND_NAMES, things)
    return [Scene(b, ()) for b in BACKGROUND_NAMES] + [Scene(b, (thing,)) for b, thing in alone]


def facts(scenes: list[Scene]) -> dict[str, np.ndarray]:
    """The value of each fact as a number, per scene; an empty scene has values of its own."""
    nothing = ("none",) * 5
    rows = [(s.background, len(s.things), *(astuple(s.things[0]) if s.things else nothing)) for s in scenes]
    return {name: np.unique([str(row[k]) for row in rows], return_inverse=True)[1] for k, name in enumerate(FACTS)}


@torch.no_grad()
def curves(latents: Latents, draws: int = 300, sigmas: tuple[float, ...] = SIGMAS) -> dict[str, list[float]]:
    """Per fact, the posterior mass on its true value at each sigma, averaged over noisy scenes of one thing."""
    scenes = every_scene()
    rng = random.Random("bayes")
    prior = np.where(np.array([len(s.things) for s in scenes]) == 0, 0.5 / 4, 0.5 / (len(scenes) - 4))  # half are empty
    log_prior = torch.from_numpy(np.log(prior)).float()
    templates, values = latents(scenes), facts(scenes)
    squares = (templates**2).sum(1) / 2
    chosen = [rng.randrange(4, len(scenes)) for _ in range(draws)]
    generator = torch.Generator().manual_seed(0)
    result: dict[str, list[float]] = {name: [] for name in FACTS}
    for sigma in sigmas:
        noisy = templates[chosen] + sigma * torch.randn(draws, templates.shape[1], generator=generator)
        posterior = ((noisy @ templates.T - squares) / sigma**2 + log_prior).softmax(1).numpy()
        for name, value in values.items():
            right = value[chosen][:, None] == value[None]
            result[name].append(round(float((posterior * right).sum(1).mean()), 4))
    return result


def halfway(mass: list[float], sigmas: tuple[float, ...] = SIGMAS) -> float:
    """The sigma at which a fact is seen half as well as possible, between its mass at the largest sigma and 1."""
    middle = (1 + mass[-1]) / 2
    logs = np.log(sigmas)
    return float(np.exp(np.interp(-middle, -np.array(mass), logs)))


def table(result: dict[str, list[float]], sigmas: tuple[float, ...] = SIGMAS) -> str:
    lines = ["| sigma | " + " | ".join(f"{s:g}" for s in sigmas) + " | half-way |", "|---" * (len(sigmas) + 2) + "|"]
    for name, mass in result.items():
        lines.append(f"| {name} | " + " | ".join(f"{m:.2f}" for m in mass) + f" | {halfway(mass, sigmas):.2f} |")
    return "\n".join(lines)


def coded(scenes: list[Scene]) -> Tensor:
    """The latents the diffusion is trained on."""
    return codes(scenes).flatten(1)


def encoded(scenes: list[Scene]) -> Tensor:
    """The latents that the bundled autoencoder makes of the pictures."""
    vae = Pipeline.miniature().vae
    images = to_tensor([render(scene) for scene in scenes])
    return torch.cat([vae.encode(part) for part in images.split(128)]).flatten(1)


@click.command(help=__doc__)
@click.option("--latents", type=click.Choice(["coded", "encoded"]), default="coded", show_default=True,
              help="The codes that the diffusion is trained on, or what the bundled autoencoder makes of the pictures.")
@click.option("--draws", default=300, show_default=True, help="Noisy scenes per sigma.")
@writes("bayes")
def main(latents: str, draws: int, results: Results) -> None:
    found = table(curves({"coded": coded, "encoded": encoded}[latents], draws))
    click.echo(found)
    results.write_tables({"bayes": found})


if __name__ == "__main__":
    main()
