"""What starting from a picture is for, on pictures of the miniature: judged by what is read from the pixels."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import studio
from benchmarks import pictures, score
from benchmarks.miniature.scenes import SIZE, Scene, render
from benchmarks.pictures import around, bare, changed, drawn, drawn_on, inverted, picture, recoloured, repainted, seen
from ella_kd import generate, read_settings
from ella_kd.cli import main
from ella_kd.pictures.canvas import Canvas
from ella_kd.pictures.options import FromPicture

STEPS = 10


def factor() -> int:
    return studio.miniature().vae.factor


def share_right(wanted: Sequence[Scene], found: Sequence[Image.Image]) -> float:
    return float(np.mean([bare(scene) == bare(seen(image)) for scene, image in zip(wanted, found, strict=True)]))


@pytest.mark.parametrize(("sampler", "scale"), [("dpmpp_2m", 3.0), ("euler_ancestral_cfg_pp", 0.6)])
def test_a_thing_repainted_in_place(sampler: str, scale: float) -> None:
    """It is there (in all of 100 scenes), and outside the mask no pixel has changed."""
    before = score.held_out(12, 2)
    after, masks = repainted(before), [around(scene.things[1].place, factor()) for scene in before]
    asked = [FromPicture(start=picture(scene), mask=mask, mask_blur=0) for scene, mask in zip(before, masks)]
    found = drawn(studio.miniature(), asked, after, sampler, scale, STEPS)
    for scene, mask, image in zip(before, masks, found, strict=True):
        kept = np.asarray(mask) == 0
        assert (np.asarray(image)[kept] == render(scene)[kept]).all()
    assert share_right(after, found) >= 0.9


def test_a_thing_added_beyond_the_side() -> None:
    """Outpainting: the picture without its right third, and what the prompt says stands there (all of 100 scenes)."""
    left, scenes = pictures.span(2, factor())[0], drawn_on(12)
    asked = [FromPicture(start=picture(scene).crop((0, 0, left, SIZE)), extend=f"right={SIZE - left}")
             for scene in scenes]
    found = drawn(studio.miniature(), asked, scenes, steps=STEPS)
    kept = np.asarray(Canvas.of(asked[0], None, (SIZE, SIZE), factor()).soft) == 0  # beyond the seam's width
    assert kept.any()
    for scene, image in zip(scenes, found, strict=True):
        assert (np.asarray(image)[kept] == render(scene)[kept]).all()
    assert share_right(scenes, found) >= 0.9


def test_strength() -> None:
    """The more of it, the further from the picture; much of it draws what the prompt says."""
    before, other = score.held_out(8, 2), score.held_out(16, 2)[8:]
    away = []
    for strength in (0.01, 0.2, 0.9):
        asked = [FromPicture(start=picture(scene), strength=strength) for scene in before]
        found = drawn(studio.miniature(), asked, other, steps=STEPS)
        away.append(float(np.mean([np.abs(np.asarray(image).astype(int) - render(scene)).mean()
                                   for scene, image in zip(before, found, strict=True)])))
    assert away[0] < 0.7 * away[1] < 0.5 * away[2]
    assert share_right(other, found) >= 0.85


@pytest.mark.parametrize(("sampler", "scale", "refine"), [("euler", 1.0, 2), ("euler_cfg_pp", 0.6, 2)])
def test_inversion_and_redraw(sampler: str, scale: float, refine: int) -> None:
    """Prompts that speak of one of two things give the scene back, or change that thing's colour alone; from other
    noise not one picture would be right (and with 50 steps nearly all are)."""
    before = score.held_out(6, 2)
    after = recoloured(before)
    half, half_after = ([replace(scene, things=scene.things[:1]) for scene in scenes] for scenes in (before, after))
    redraw = inverted(studio.miniature(), before, half, sampler, scale, refine, STEPS)
    assert share_right(before, redraw(half)) >= 0.8
    assert share_right(after, redraw(half_after)) >= 0.6


def test_an_object_by_the_command(tmp_path: Path) -> None:
    """A mask and a start by file; the PNG draws it again; a picture inverted and redrawn."""
    scene = score.held_out(1, 2)[0]
    wanted = replace(scene, things=(scene.things[0], changed(scene.things[1], random.Random(1))))
    picture(scene).save(tmp_path / "start.png")
    around(scene.things[1].place, factor()).save(tmp_path / "mask.png")
    [old], [new] = (score.write_captions([each], "dense") for each in (scene, wanted))
    files = ["--start", str(tmp_path / "start.png"), "--mask", str(tmp_path / "mask.png")]
    common = ["--out", str(tmp_path), "--steps", "10", "--seed", "1", "--device", "cpu"]

    def command(*words: str) -> str:
        done = CliRunner().invoke(main, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    command("generate", new, *files, "--scale", "3", *common)
    [path] = tmp_path.glob("00001-*.png")
    with Image.open(path) as image:
        image.load()
    assert bare(wanted) == bare(seen(image))
    [again] = generate(studio.miniature(), progress=False, **read_settings(path))
    assert again.image.tobytes() == image.tobytes()

    latents = tmp_path / "latents.safetensors"
    said = command("invert", files[1], old, "--out", str(latents), "--steps", "10", "--device", "cpu")
    assert f"--latents {latents} --sampler euler --schedule karras --steps 10 --scale 1" in said
    command("generate", old, "--latents", str(latents), "--sampler", "euler", "--scale", "1", *common)
    [path] = tmp_path.glob("00002-*.png")
    with Image.open(path) as image:
        image.load()
    assert bare(scene) == bare(seen(image))
