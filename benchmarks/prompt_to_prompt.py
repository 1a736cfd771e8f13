"""Prompt-to-prompt on the miniature: one word of a prompt swapped, same seed; did that change, and nothing else?

A pair is two prompts that differ in the colour, or the shape, of one thing. What the picture of the second should be is
what the parser finds in the picture of the first, with that one fact changed. Writes `prompt_to_prompt.json` and the
table.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.miniature import captions
from benchmarks.miniature.scenes import COLOUR_NAMES, SHAPES, Scene, parse, to_pictures
from benchmarks.results import Results, writes
from benchmarks.score import SCALE, held_out
from ella_kd import Pipeline
from ella_kd.guidance import CFG, Guidance, GuidedDenoiser, PromptToPrompt
from ella_kd.models.blocks import TransformerBlock
from ella_kd.models.network import as_network
from ella_kd.models.prompt_to_prompt import SourceAttention
from ella_kd.request import Mode
from ella_kd.samplers import get_sigmas_karras, randn, sample_dpmpp_2m

STEPS, BATCH = 10, 10
FACTS = ("colour", "shape")
Write = Callable[[Scene, random.Random], list[captions.Word]]
#: How the prompts are read and written; in the last, facts are left unsaid and decided by the noise.
SYSTEMS: dict[str, tuple[Mode, Write]] = {
    "ELLA, dense": ("flexible", captions.dense),
    "plain SD, tags that leave two facts in five unsaid": (
        "clip", lambda scene, rng: captions.tags(scene, rng, noise=0.4)),
}
OFF = math.inf
#: Above which sigma the text's attention is the source's, and above which the self-attention; .57 and 2.3 are t = 200
#: and 600, the paper's .8 and .4 of the steps.
WINDOWS = {
    "drawn by the new prompt": None, "text, sigma > 2.3": (2.3, OFF), "text, sigma > .57": (0.57, OFF),
    "text": (0.0, OFF), "self-attention": (OFF, 0.0),
    "text, sigma > .57, self-attention, sigma > 2.3": (0.57, 2.3), "both": (0.0, 0.0),
}  # fmt: skip


def changed(scene: Scene, place: int, fact: str, value: str) -> Scene:
    """The scene with one fact of the thing at this place changed."""
    change: dict[str, Any] = {fact: value}
    return replace(scene, things=tuple(replace(thing, **change) if thing.place == place else thing
                                       for thing in scene.things))


@dataclass(frozen=True)
class Triple:
    """A scene, the prompt of it, and for each fact what its thing is to be and the prompt that says so."""

    scene: Scene
    place: int
    prompt: str
    edits: tuple[tuple[str, str], ...]

    def expected(self, found: Scene, fact: str, value: str) -> Scene:
        """What was found in the source's picture, with the one fact changed."""
        return changed(found, self.place, fact, value)


def triples(write: Write, count: int) -> list[Triple]:
    """Of held-out scenes of two things those whose prompts differ in one word, for the colour and for the shape."""
    found: list[Triple] = []
    for i, scene in enumerate(held_out(40 * count, 2)):
        rng = random.Random(f"pairs {i}")
        thing = rng.choice(scene.things)
        new = (rng.choice([each for each in COLOUR_NAMES if each != thing.colour]),
               rng.choice([each for each in SHAPES if each != thing.shape]))
        scenes = [scene, *(changed(scene, thing.place, fact, value) for fact, value in zip(FACTS, new))]
        source, *edits = (write(each, random.Random(f"prompt {i}")) for each in scenes)
        if all(_swapped(source, edit) == value for edit, value in zip(edits, new)):
            said = tuple((value, captions.text(edit)) for value, edit in zip(new, edits, strict=True))
            found.append(Triple(scene, thing.place, captions.text(source), said))
        if len(found) == count:
            return found
    raise ValueError(f"{len(found)} pairs of prompts that differ in one word, wanted {count}")


def _swapped(source: Sequence[captions.Word], edit: Sequence[captions.Word]) -> str | None:
    """The one word that differs."""
    different = [new.text for old, new in zip(source, edit) if old.text != new.text]
    return different[0] if len(source) == len(edit) and len(different) == 1 else None


@dataclass(frozen=True)
class OfThrees(SourceAttention):
    """In a batch of threes: the first of each is the source of the other two."""

    def __call__(self, block: TransformerBlock, x: Tensor, context: Tensor, mask: Tensor | None,
                 size: tuple[int, int]) -> Tensor:
        masks = [None] * len(x) if mask is None else mask.split(3)
        return torch.cat([super(OfThrees, self).__call__(block, *each, size)
                          for each in zip(x.split(3), context.split(3), masks)])


@torch.no_grad()
def draw(sd: Pipeline, asked: Sequence[Triple], mode: Mode, rule: Guidance) -> Iterator[list[np.ndarray]]:
    """Of each triple, pictures of the source and its edits from one seed."""
    model = GuidedDenoiser(sd.denoiser().inner_model, rule)
    sigmas = get_sigmas_karras(STEPS, model.sigma_min, model.sigma_max)
    for first in range(0, len(asked), BATCH):
        some = asked[first:first + BATCH]
        prompts = [prompt for each in some for prompt in (each.prompt, *(prompt for _, prompt in each.edits))]
        args = {"cond": sd.encode(prompts, mode), "uncond": sd.encode("", mode)}
        x = randn((len(some), 4, 6, 6), range(first, first + len(some))).repeat_interleave(3, 0) * sigmas[0]
        pictures = to_pictures(sd.vae.decode(sample_dpmpp_2m(model, x, sigmas, extra_args=args, disable=True)))
        yield from (pictures[i:i + 3] for i in range(0, len(pictures), 3))


def judge(triple: Triple, pictures: Sequence[np.ndarray]) -> dict[str, list[float]] | None:
    """Per fact: exactly as expected, the fact there, the rest kept, mean change of the pixels of the other cells.

    None where the source's picture has not got the thing.
    """
    source, *edits = (parse(picture) for picture in pictures)
    there = [thing for thing in source.things if thing.place == triple.place]
    old = next(thing for thing in triple.scene.things if thing.place == triple.place)
    if not there or (there[0].shape, there[0].colour) != (old.shape, old.colour):
        return None
    rows, columns = (slice(16 * n, 16 * n + 16) for n in divmod(triple.place, 3))
    result = {}
    for fact, (value, _), found, picture in zip(FACTS, triple.edits, edits, pictures[1:], strict=True):
        new = [getattr(thing, fact) for thing in found.things if thing.place == triple.place]
        back = triple.expected(found, fact, getattr(old, fact))
        away = np.abs(picture.astype(float) - pictures[0])
        away[rows, columns] = 0
        result[fact] = [100.0 * (found == triple.expected(source, fact, value)), 100.0 * (new == [value]),
                        100.0 * (back == source), away.sum() / (away.size * 8 / 9)]
    return result


def measure(sd: Pipeline, count: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """System -> window -> fact -> the means of what `judge` says; and the number of pairs that were judged."""
    result: dict[str, dict[str, dict[str, list[float]]]] = {}
    attention = OfThrees(tuple(as_network(sd.unet).places), pixels=256)
    for system, (mode, write) in SYSTEMS.items():
        asked = triples(write, count)
        for name, window in WINDOWS.items():
            rule: Guidance = CFG(SCALE) if window is None else PromptToPrompt(CFG(SCALE), attention, *window)
            told = [judge(*each) for each in zip(asked, draw(sd, asked, mode, rule), strict=True)]
            judged = [each for each in told if each is not None]
            row = {fact: [*np.mean([each[fact] for each in judged], 0).tolist(), len(judged)] for fact in FACTS}
            result.setdefault(system, {})[name] = row
            click.echo(f"{system} | {name}: {row}")
    return result


def table(result: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    each = "asked fact alone changed | it changed | the rest kept | other cells, of 255"
    lines = ["| prompts | attention of the source | " + " | ".join(f"{fact}: {each}" for fact in FACTS) + " | pairs |"]
    lines.append("|---" * 11 + "|")
    for system, rows in result.items():
        for name, row in rows.items():
            cells = [cell for fact in FACTS for cell in [*(f"{v:.0f} %" for v in row[fact][:3]), f"{row[fact][3]:.1f}"]]
            lines.append(f"| {system} | {name} | " + " | ".join(cells) + f" | {row['colour'][4]:.0f} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--count", default=60, show_default=True, help="Pairs of each system.")
@writes("prompt_to_prompt")
def main(count: int, results: Results) -> None:
    result = measure(Pipeline.miniature(), count)
    command = f"python -m benchmarks.prompt_to_prompt --count {count}"
    found = {"command": command, "machine": machine(), "rows": result}
    (results.folder / "prompt_to_prompt.json").write_text(json.dumps(found, indent=1) + "\n")
    name = "prompt to prompt"
    results.write_tables({name: table(result), f"{name} measured": f"`{command}` on {machine()}."})


if __name__ == "__main__":
    main()
