"""What goes with what, as the page on big pictures says: what is refused is, and the rest acts together (slow)."""

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ella_kd import Pipeline, generate
from ella_kd.models import AutoencoderKL, UNet
from ella_kd.request import Request
from test_pictures_pixels import speckled
from tiny import randomised

TEXT = (Path(__file__).parent.parent / "docs" / "how-to" / "big-pictures.md").read_text()
OPTIONS: dict[str, Any] = {"hires": "1.5:0.9", "upscale": "tiles:1.5:0.9", "hidiffusion": True, "deep_shrink": True,
                           "tile": "16:8", "tiling": True, "reuse": "2", "freeu": True, "tome": 0.5, "refiner": "other",
                           "start": speckled(32, 32), "control": "edges.safetensors:room.png"}


def said() -> dict[tuple[str, str], str]:
    """The table's cells."""
    head, _, *rows = (re.findall(r"(?<=\|) *([^|]*?) *(?=\|)", line) for line in re.findall(r"^\|.*$", TEXT.split(
        "## What goes with what")[1].split("## ")[0], re.M))
    names = [row[0].strip("`-").replace("-", "_") for row in rows] + ["control"]
    assert [each.replace(" ", "_") for each in head[1:]] == names[1:]
    return {(one, names[j]): cell for i, (one, row) in enumerate(zip(names, rows)) for j, cell in enumerate(row)
            if j > i}


def together(one: str, other: str, cell: str) -> dict[str, Any]:
    return {each: "1:2" if cell == "`1:2`" and each == "reuse" else OPTIONS[each] for each in (one, other)}


def test_what_is_refused_is_in_the_table() -> None:
    table = said()
    assert set(table) == set(combinations(OPTIONS, 2)) and set(table.values()) == {"yes", "no", "first", "`1:2`"}
    for (one, other), cell in table.items():
        given = together(one, other, cell)
        if cell == "no":
            with pytest.raises(ValueError, match=r"choose|without|enlarge"):
                Request("a", **given)
        else:
            Request("a", **given)
        if cell == "first":
            with pytest.raises(ValueError, match="before it is enlarged"):
                Request("a", start=OPTIONS["start"], **given)
        if cell == "`1:2`":
            with pytest.raises(ValueError, match="alone, 1:2"):
                Request("a", **{one: OPTIONS[one], other: OPTIONS[other]})


@pytest.mark.slow
@pytest.mark.usefixtures("files")
def test_what_goes_together_acts_together(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in the latents: token merging changes this random network's pictures by one grey level or none."""
    assert isinstance(pipeline.unet, UNet)
    system = replace(pipeline, unet=randomised(UNet(pipeline.unet.config), 9, 0.12), tsc=None, t5=None, name="other")
    decoded, whole = list[Tensor](), AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z: whole(self, decoded.append(z) or z))  # type: ignore[func-returns-value]

    def drawn(given: dict[str, Any], steps: int) -> bytes:
        given = {**given, **({"refiner": system, "refiner_at": 0.1} if "refiner" in given else {})}
        size: dict[str, Any] = {} if "upscale" in given and "start" in given else {"width": 32, "height": 32}
        how: dict[str, Any] = {"strength": 0.95} if "start" in given and "upscale" not in given else {}
        how |= {"mode": "clip", "steps": steps, "seeds": 3, "progress": False}
        decoded.clear()
        generate(pipeline, "a red circle", **size, **how, **given)
        return b"".join(z.numpy().tobytes() for z in decoded)

    for (one, other), cell in said().items():
        if cell != "no":
            given = together(one, other, cell)
            steps = 4 if (one, other) == ("reuse", "refiner") else 2  # so that each model has levels to share
            ways = (given, {one: given[one]}, {other: given[other]})
            both, *alone = (drawn(each, steps) for each in ways)
            assert both not in alone, f"{one} with {other}"
