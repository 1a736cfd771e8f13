"""`make demo`: eight dense prompts drawn by the bundled miniature, and what the scene checker finds in each picture."""

from __future__ import annotations

import random
import time
import warnings
from pathlib import Path

import click
import numpy as np
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from benchmarks.miniature import captions
from benchmarks.miniature.questions import ask
from benchmarks.miniature.scenes import PLACES, Scene, parse, random_scene
from ella_kd import CFGDenoiser, ELLADenoiser, Pipeline, generate
from ella_kd.images import contact_sheet, save_image, save_png, to_images
from ella_kd.samplers import get_sigmas_karras, randn
from ella_kd.samplers.upstream import k_diffusion

STEPS, SCALE, SEED = 20, 3.0, 1001
ENLARGE = 6  # 48 px pictures are shown as 288 px


def scenes() -> list[Scene]:
    """Two scenes of two things, three of three and three of four; each has a combination never seen in training."""
    rng = random.Random("demo")
    return [random_scene(rng, count, unseen=True) for count in (2, 2, 3, 3, 3, 4, 4, 4)]


def describe(scene: Scene) -> str:
    things = [" ".join([thing.fill, f"{thing.rim}-rimmed", thing.colour, thing.shape, PLACES[thing.place]])
              .replace("plain ", "").replace("no-rimmed ", "") for thing in scene.things]
    smudges = [f"{scene.smudges} unclear"] if scene.smudges else []
    return ", ".join([*(things or ["nothing"]), *smudges, scene.background])


def drawn_by_k_diffusion(pipeline: Pipeline, prompt: str, seed: int) -> Image.Image:
    """The same picture from the k-diffusion package's own DPM++ 2M, on our denoiser as it is."""
    assert pipeline.t5 is not None and pipeline.tsc is not None
    denoiser = CFGDenoiser(ELLADenoiser(pipeline.unet, pipeline.tsc, pipeline.noise_schedule))
    sigmas = get_sigmas_karras(STEPS, denoiser.sigma_min, denoiser.sigma_max)
    side = pipeline.size // pipeline.vae.factor
    extra_args = {"cond": pipeline.t5(prompt), "uncond": pipeline.t5(""), "cond_scale": SCALE}
    latents = k_diffusion().sampling.sample_dpmpp_2m(
        denoiser, randn((1, 4, side, side), [seed]) * sigmas[0], sigmas, extra_args=extra_args, disable=True
    )
    return to_images(pipeline.vae.decode(latents).detach())[0]


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("out/demo"), show_default=True)
def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    pipeline = Pipeline.miniature()
    wanted = scenes()
    rng = random.Random("demo prompts")
    prompts = [captions.text(captions.dense(scene, rng)) for scene in wanted]
    seeds = [SEED + i for i in range(len(prompts))]
    options = {"steps": STEPS, "scale": SCALE, "seeds": seeds, "progress": False}

    started = time.perf_counter()
    ella = generate(pipeline, prompts, mode="flexible", **options)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as cut:  # a warning per prompt too long for CLIP
        warnings.simplefilter("always")
        plain = generate(pipeline, prompts, mode="plain", **options)  # type: ignore[arg-type]
    again = drawn_by_k_diffusion(pipeline, prompts[0], seeds[0])
    seconds = time.perf_counter() - started

    right = 0
    for number, (scene, prompt, picture) in enumerate(zip(wanted, prompts, ella, strict=True), start=1):
        found = parse(np.asarray(picture.image))
        answers = ask(scene, found)
        right += answers.all_right
        save_png(picture, out / f"{number:02d}.png", enlarge=ENLARGE)
        click.echo(f"{number}. {prompt}")
        click.echo(f"   found: {describe(found)}  [{answers.score:.0f} of 100]")
    sheet = contact_sheet(
        [(prompt, [p.image, e.image]) for prompt, p, e in zip(prompts, plain, ella, strict=True)],
        ["plain SD", "ELLA"],
    )
    save_image(sheet, out / "sheet.png")
    difference = np.abs(np.asarray(again, int) - np.asarray(ella[0].image, int)).max()
    click.echo(f"\n{right} of {len(prompts)} pictures are exactly the scene of their prompt.")
    click.echo(f"Plain SD's own encoder had to cut {len(cut)} of the prompts (see the sheet).")
    click.echo(f"k-diffusion's own sample_dpmpp_2m on the same denoiser: largest difference {difference} of 255.")
    click.echo(f"{2 * len(prompts) + 1} pictures in {seconds:.1f} s; see {out / 'sheet.png'}")


if __name__ == "__main__":
    main()
