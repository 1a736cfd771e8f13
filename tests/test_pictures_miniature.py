"""What starting from a picture is for, on pictures of the miniature: judged by what is read from the pixels."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import studio
from benchmarks import score
from benchmarks.miniature.scenes import COLOUR_NAMES, SHAPES, SIZE, Scene, Thing, parse, render
from ella_kd import generate, read_settings
from ella_kd.cli import main
from ella_kd.drawing import begin_from
from ella_kd.images import to_images
from ella_kd.models.text import TextFeatures
from ella_kd.pictures.canvas import Canvas
from ella_kd.pictures.inversion import undone
from ella_kd.pictures.keep import Repaint
from ella_kd.pictures.options import FromPicture
from ella_kd.samplers import get_sampler, get_sigmas_karras, randn

STEPS, SCALE = 10, 3.0


def latent() -> int:
    return studio.miniature().vae.factor


def span(i: int) -> tuple[int, int]:
    """The pixels of the i-th third of a side, in whole latents."""
    low, high = (round(k * SIZE / 3 / latent()) * latent() for k in (i, i + 1))
    return low, high


def around(place: int) -> Image.Image:
    """A mask that is white where a thing at this place stands."""
    (left, right), (top, bottom) = span(place % 3), span(place // 3)
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (left, top, right, bottom))
    return mask


def picture(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene))


def seen(image: Image.Image) -> Scene:
    return parse(np.asarray(image))


def same(a: Scene, b: Scene) -> bool:
    """Background and what stands where, in which colour."""
    things = [{(t.place, t.shape, t.colour) for t in scene.things} for scene in (a, b)]
    return a.background == b.background and things[0] == things[1] and not b.smudges


def texts(scenes: Sequence[Scene]) -> TextFeatures:
    return studio.t5(score.write_captions(scenes, "dense"))


@torch.no_grad()
def drawn(asked: Sequence[FromPicture], wanted: Sequence[Scene], sampler: str = "dpmpp_2m",
          scale: float = SCALE) -> list[Image.Image]:
    """A picture for each of equal-sized starts, all in one batch."""
    sd = studio.miniature()
    starts = [begin_from(sd, each, "karras", STEPS, None, None) for each in asked]
    begun = replace(starts[0], picture=torch.cat([each.picture for each in starts]))
    if isinstance(begun.mask, Repaint):
        repaint = torch.stack([each.repaint for each in starts])[:, None]
        begun = replace(begun, mask=Repaint(repaint), repaint=repaint)
    seeds = list(range(len(asked)))
    x = begun.x(randn(begun.picture.shape, seeds), seeds)
    args = {"cond": texts(wanted), "uncond": studio.t5(""), "cond_scale": scale}
    out = begun.sample(sampler, sd.denoiser(), x, begun.sigmas, args, disable=True, seeds=seeds)
    return [each.canvas.back(image) for each, image in zip(starts, to_images(sd.vae.decode(out)), strict=True)]


def changed(thing: Thing, rng: random.Random) -> Thing:
    shape = rng.choice([each for each in SHAPES if each != thing.shape])
    return replace(thing, shape=shape, colour=rng.choice([each for each in COLOUR_NAMES if each != thing.colour]))


def share_right(wanted: Sequence[Scene], found: Sequence[Image.Image]) -> float:
    return float(np.mean([same(scene, seen(image)) for scene, image in zip(wanted, found, strict=True)]))


@pytest.mark.parametrize(("sampler", "scale"), [("dpmpp_2m", 3.0), ("euler_ancestral_cfg_pp", 0.6)])
def test_a_thing_repainted_in_place(sampler: str, scale: float) -> None:
    """It is there (in all of 100 scenes), and outside the mask no pixel has changed."""
    rng = random.Random("repaint")
    before = score.held_out(24, 2)
    after = [replace(scene, things=(scene.things[0], changed(scene.things[1], rng))) for scene in before]
    masks = [around(scene.things[1].place) for scene in before]
    asked = [FromPicture(start=picture(scene), mask=mask, mask_blur=0) for scene, mask in zip(before, masks)]
    found = drawn(asked, after, sampler, scale)
    for scene, mask, image in zip(before, masks, found, strict=True):
        kept = np.asarray(mask) == 0
        assert (np.asarray(image)[kept] == render(scene)[kept]).all()
    assert share_right(after, found) >= 0.95


def test_a_thing_added_beyond_the_side() -> None:
    """Outpainting: the picture without its right third, and what the prompt says stands there (in all of 60 scenes)."""
    rng = random.Random("outpaint")
    left, right = span(2)
    scenes = []
    for scene in score.held_out(20, 1):
        old = replace(scene.things[0], place=3 * rng.randrange(3) + rng.randrange(2))
        new = changed(replace(old, place=3 * rng.randrange(3) + 2), rng)
        scenes.append(Scene(scene.background, tuple(sorted((old, new)))))
    asked = [FromPicture(start=picture(scene).crop((0, 0, left, SIZE)), extend=f"right={right - left}")
             for scene in scenes]
    found = drawn(asked, scenes)
    kept = np.asarray(Canvas.of(asked[0], None, (SIZE, SIZE), latent()).soft) == 0  # farther away than the seam is wide
    assert kept.any()
    for scene, image in zip(scenes, found, strict=True):
        assert (np.asarray(image)[kept] == render(scene)[kept]).all()
    assert share_right(scenes, found) >= 0.9


def test_strength() -> None:
    """The more of it, the further from the picture; much of it draws what the prompt says."""
    before, other = score.held_out(12, 2), score.held_out(24, 2)[12:]
    away = []
    for strength in (0.01, 0.1, 0.9):
        found = drawn([FromPicture(start=picture(scene), strength=strength) for scene in before], other)
        away.append(float(np.mean([np.abs(np.asarray(image).astype(int) - render(scene)).mean()
                                   for scene, image in zip(before, found, strict=True)])))
    assert away[0] < 0.5 * away[1] < 0.5 * away[2]
    assert share_right(other, found) >= 0.9


@torch.no_grad()
@pytest.mark.parametrize(("sampler", "scale", "refine"), [("euler", 1.0, 0), ("euler_cfg_pp", 0.6, 2)])
def test_inversion_and_redraw(sampler: str, scale: float, refine: int) -> None:
    """The same prompt gives the scene back, one with another colour changes that alone."""
    sd, rng = studio.miniature(), random.Random("invert")
    before = score.held_out(12, 2)
    after = [replace(scene, things=(replace(scene.things[0], colour=rng.choice(COLOUR_NAMES)), scene.things[1]))
             for scene in before]
    model = sd.denoiser()
    sigmas = get_sigmas_karras(STEPS, model.sigma_min, model.sigma_max)
    z = torch.cat([sd.vae.encode(picture(scene)) for scene in before])
    args = {"cond": texts(before), "uncond": studio.t5(""), "cond_scale": scale}
    x = undone(model, z, sigmas[:-1].flip(0), args, sampler == "euler_cfg_pp", refine, disable=True)
    for wanted, least in ((before, 0.95), (after, 0.9)):
        out = get_sampler(sampler).function(model, x, sigmas, extra_args={**args, "cond": texts(wanted)}, disable=True)
        assert share_right(wanted, to_images(sd.vae.decode(out))) >= least


def test_an_object_by_the_command(tmp_path: Path) -> None:
    """A mask and a start by file; the PNG draws it again; a picture inverted and redrawn."""
    scene = score.held_out(1, 2)[0]
    wanted = replace(scene, things=(scene.things[0], changed(scene.things[1], random.Random(1))))
    picture(scene).save(tmp_path / "start.png")
    around(scene.things[1].place).save(tmp_path / "mask.png")
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
    assert same(wanted, seen(image))
    [again] = generate(studio.miniature(), progress=False, **read_settings(path))
    assert again.image.tobytes() == image.tobytes()

    latents = tmp_path / "latents.safetensors"
    said = command("invert", files[1], old, "--out", str(latents), "--steps", "10", "--device", "cpu")
    assert f"--latents {latents} --sampler euler --schedule karras --steps 10 --scale 1" in said
    command("generate", old, "--latents", str(latents), "--sampler", "euler", "--scale", "1", *common)
    [path] = tmp_path.glob("00002-*.png")
    with Image.open(path) as image:
        image.load()
    assert same(scene, seen(image))
