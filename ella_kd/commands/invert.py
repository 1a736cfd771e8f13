"""`ella-kd invert`."""

from pathlib import Path
from typing import Any

import click

from ella_kd.options import ModeChoice, check_folder, load, model_options
from ella_kd.pictures.inversion import invert as inverted
from ella_kd.pictures.inversion import save_latents
from ella_kd.pictures.reading import read_picture
from ella_kd.request import Request, method_named
from ella_kd.samplers import get_schedule


@click.command()
@click.argument("picture")
@click.argument("prompt")
@click.option("--out", type=click.Path(path_type=Path), default=Path("latents.safetensors"), show_default=True,
              metavar="FILE", help="Where the latents go; a file that is there is replaced.")
@click.option("--negative", default="", metavar="TEXT", help="As in generate.")
@click.option("--mode", type=ModeChoice(), default=Request.mode, show_default=True, help="How the prompt is read.")
@click.option("--scale", type=float, default=1.0, show_default=True, help="Guidance; at 1 the picture returns best.")
@click.option("--sampler", metavar="NAME", default="euler", show_default=True,
              help="euler (DDIM), euler_cfg_pp, or any that adds no noise, such as heun.")
@click.option("--schedule", metavar="NAME", default=Request.schedule, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=50, show_default=True)
@model_options
def invert(picture: str, prompt: str, out: Path, negative: str, mode: Any, scale: float, sampler: str, schedule: str,
           steps: int, **options: Any) -> None:
    """Find the noise from which PROMPT draws PICTURE, for another prompt to redraw it.

    \b
    Example:
      ella-kd invert cat.png "a cat on a sofa" --out cat.safetensors
      ella-kd generate "a dog on a sofa" --latents cat.safetensors --sampler euler --steps 50 --scale 1
    """
    read_picture(picture)
    sampler, schedule = method_named(sampler, schedule)
    check_folder(out.parent)
    pipeline = load(options, [(f"--mode {mode}", mode)])
    latents = inverted(pipeline, picture, prompt, negative=negative, mode=mode, guidance=scale, sampler=sampler,
                       schedule=schedule, steps=steps)
    first = float(get_schedule(schedule).sigmas(steps, pipeline.denoiser())[0])
    save_latents(out, latents, first, sampler=sampler, schedule=schedule, steps=steps, prompt=prompt, scale=scale)
    name = click.format_filename(out)
    click.echo(f"{name}\nredraw it with: ella-kd generate \"...\" --latents {name} --sampler {sampler} "
               f"--schedule {schedule} --steps {steps} --scale {scale:g}")
