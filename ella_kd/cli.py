"""The command `ella-kd`."""

import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
from huggingface_hub.utils import enable_progress_bars
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from ella_kd.addons import AddOns
from ella_kd.commands.batch import batch
from ella_kd.commands.bench import bench
from ella_kd.commands.convert import convert
from ella_kd.commands.download import download
from ella_kd.commands.grid import grid
from ella_kd.commands.inspect import inspect as inspect_files
from ella_kd.commands.invert import invert
from ella_kd.commands.models import models
from ella_kd.commands.web import web
from ella_kd.drawing import innermost_scale
from ella_kd.generation import generate as draw_all
from ella_kd.guidance import Guidance
from ella_kd.guidance.text import known, parse
from ella_kd.images import Picture, contact_sheet, save_image
from ella_kd.jobs import jobs
from ella_kd.models.devices import out_of_memory
from ella_kd.options import check_folder, load, model_options, read_prompts, request_options, use_presets
from ella_kd.pictures.options import SOURCES
from ella_kd.pictures.reading import read_picture
from ella_kd.prompts import check_wildcards, expand_wildcards
from ella_kd.request import Mode, Request, seed_number
from ella_kd.samplers import SAMPLERS, SCHEDULES
from ella_kd.texts import FORMATS, QUALITY, format_of

COLUMNS: dict[Mode, str] = {"clip": "plain SD", "fixed": "ELLA fixed", "flexible": "ELLA flexible"}
OUT_OF_MEMORY = "the device is out of memory: try a smaller --batch, --width or --height"


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with what was saved before it."""


class Cli(click.Group):
    """What a user can put right is one line and exit code 2, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else ctx.command_path
            fail(ctx, f"{error.format_message()} See {command} --help.")
        except KeyboardInterrupt as error:
            fail(ctx, str(error) if isinstance(error, Stopped) else "stopped: nothing was saved", 130)
        except BrokenPipeError:
            raise  # the reader of a list has seen enough: click ends without a word
        except OSError as error:
            filename = f": {error.filename}" if error.filename else ""
            fail(ctx, (error.strerror or str(error)) + filename)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            fail(ctx, OUT_OF_MEMORY)
        except (ValueError, TypeError) as error:
            fail(ctx, str(error))


def fail(ctx: click.Context, text: str, code: int = 2) -> NoReturn:
    line = ("Error: " if code == 2 else "") + " ".join(text.split())
    click.echo(line.encode("utf-8", "backslashreplace").decode(), err=True)
    ctx.exit(code)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ella-kd", prog_name="ella-kd")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Draw pictures that follow long, dense prompts: Stable Diffusion with ELLA.

    Without further files it draws with the miniature, a tiny model that comes with the package: squares, rings,
    triangles, crosses and hearts in six colours, striped, barred or checked, with dark or light rims, at nine places,
    by night, in snow, forest or desert.

    \b
    Try it:
      ella-kd generate "The scene is set in a deep forest. A striped red heart sits in the top left corner." --enlarge 6
      ella-kd compare prompts.txt
      ella-kd samplers

    \b
    With the real weights (three downloads and a tokenizer folder):
      ella-kd generate "a vivid red book with a smooth, matte cover lies on an oak desk" \\
        --checkpoint v1-5-pruned-emaonly.safetensors \\
        --tsc ella-sd1.5-tsc-t5xl.safetensors --t5 flan-t5-xl/
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no letter for a prompt's
    ctx.with_resource(warnings.catch_warnings())
    warnings.showwarning = _show_warning
    disable_progress_bar()  # the one transformers shows while it reads T5, and with it those of downloads
    enable_progress_bars()


main.add_command(batch)
main.add_command(bench)
main.add_command(convert)
main.add_command(download)
main.add_command(grid)
main.add_command(models)
main.add_command(inspect_files)
main.add_command(invert)
main.add_command(web)


@main.command()
@click.argument("prompts", nargs=-1)
@click.option("--prompts", "file", metavar="FILE", help="Read prompts from a text file too, one per line.")
@click.option("--seed", type=click.IntRange(min=0),
              help="Of each prompt's first picture; the next take seed + 1, ...  [default: random]")
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures per prompt.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, metavar="DIR",
              help="Where the pictures go; made if need be, nothing in it is overwritten.")
@click.option("--enlarge", type=click.IntRange(1, 64), default=1, show_default=True, metavar="N",
              help="Save every pixel as N x N equal ones; the miniature's pictures are 48 px: try 6.")
@click.option("--format", "ending", type=click.Choice(["png", "jpeg", "webp"]), default="png", show_default=True,
              help="What the pictures are saved as.")
@click.option("--quality", type=click.IntRange(1, 100), default=QUALITY, show_default=True,
              help="Of JPEG and WebP; at 100 a WebP is lossless.")
@request_options()
@model_options
def generate(prompts: tuple[str, ...], file: str | None, count: int, out: Path, enlarge: int, ending: str,
             quality: int, batch: int, seed: int | None, **options: Any) -> None:
    """Draw one or more prompts and save them, each batch as soon as it is drawn.

    Each picture says how it was made: in the `parameters` text that the AUTOMATIC1111 web UI and others read (in EXIF
    for JPEG and WebP), and as JSON beside it.

    \b
    Examples:
      ella-kd generate "The picture shows snow. A green triangle stands in the center." --count 4 --seed 1
      ella-kd generate --prompts prompts.txt --sampler euler_ancestral --steps 30 --out pictures
      ella-kd generate "a lamp on the table" --start room.jpg --mask lamp.png
      ella-kd generate "a wide view of the room" --start room.jpg --extend left=128,right=128
    """
    texts = [*prompts, *(read_prompts(file) if file else [])]
    if not texts:
        raise ValueError("no prompt: give one in quotes, or a file of prompts with --prompts")
    asked, rule = check(texts, seed or 0, options)
    seed_number((seed or 0) + count - 1)
    check_folder(out)
    modes = {"--mode " + options["mode"]: options["mode"], "--tags": options["tags"] and "clip",
             f"--negative-mode {options['negative_mode']}": options["negative_mode"]}
    pipeline, number, total = load(options, modes.items()), last_number(out), len(texts) * count

    def requests() -> Iterator[Request]:
        for text in texts:
            for i in range(count):
                own = int(torch.randint(0, 2**32, ())) if seed is None else seed + i
                folder = options["wildcards"]
                yield replace(asked, prompt=expand_wildcards(text, folder, own) if folder else text, seed=own)

    saved = 0
    try:
        with tqdm(total=total, unit="picture", disable=total <= batch) as bar:
            for job in jobs(pipeline, requests(), guidance=rule, models_dir=options["models_dir"], batch_size=batch):
                for picture in map(Picture, job.draw(), job.requests):
                    number, path = save(picture, out, number, ending, enlarge=enlarge, quality=quality)
                    saved += 1
                    bar.update()
                    tqdm.write(click.format_filename(path), file=sys.stdout)
    except KeyboardInterrupt as error:
        raise Stopped(f"stopped: {saved} of {total} pictures are saved in {out}") from error


@main.command()
@click.argument("prompts_file")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of every picture.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("compare.png"), show_default=True,
              metavar="FILE", help="The contact sheet, .png, .jpg or .webp; one that is there is replaced.")
@request_options("mode", "negative_mode", "tags")
@model_options
def compare(prompts_file: str, out: Path, batch: int, seed: int, **options: Any) -> None:
    """Draw each prompt of a file with plain SD, ELLA fixed and ELLA flexible, from the same seeds, on one sheet.

    PROMPTS_FILE is a text file, one prompt per line. A row is a prompt, a column a way of reading it.

    \b
    Example:
      ella-kd compare prompts.txt --steps 30 --out sheet.png
    """
    texts = read_prompts(prompts_file)
    _, rule = check(texts, seed, options)
    if out.is_dir():
        raise ValueError(f"--out takes the file of the sheet, and {out} is a folder: try {out / 'compare.png'}")
    format_of(out)
    check_folder(out.parent)
    pipeline = load(options, ((f"the column {COLUMNS[mode]}", mode) for mode in COLUMNS))
    options |= {"seeds": seed, "batch_size": batch, "guidance": rule}
    drawn = [draw_all(pipeline, texts, mode=mode, **options) for mode in COLUMNS]
    rows = [(text, [picture.image for picture in row]) for text, *row in zip(texts, *drawn, strict=True)]
    save_image(contact_sheet(rows, list(COLUMNS.values())), out)
    click.echo(click.format_filename(out))


@main.command()
def samplers() -> None:
    """List the samplers and the schedules: what --sampler and --schedule take."""
    click.echo(f"{'SAMPLER':<32}{'FAMILY':<21}{'ORDER':<7}{'CALLS A STEP':<14}NOTES")
    for sampler in SAMPLERS.values():
        notes = ["adds noise"] * sampler.stochastic + ["CFG++: --scale is lambda, 0 to 1"] * sampler.cfg_pp
        click.echo(f"{sampler.name:<32}{sampler.family:<21}{sampler.order!s:<7}{sampler.evals!s:<14}{'; '.join(notes)}")
    click.echo(f"\n{'SCHEDULE':<32}STEPS ARE")
    for schedule in SCHEDULES.values():
        click.echo(f"{schedule.name:<32}{schedule.description}")


@main.command()
def rules() -> None:
    """List the guidance rules: what --guidance takes.

    \b
    Rules wrap others and are read from the inside out:
      ella-kd generate "..." --guidance "Interval(Rescale(CFG(9), 0.7), sigma_lo=0.5)"
    """
    for name, rule in known().items():
        summary, *_ = (inspect.getdoc(rule) or "").split("\n\n")
        click.echo(f"{name}{_signature(rule)}")
        click.echo(click.wrap_text(" ".join(summary.replace("`", "").split()), 100, "    ", "    "))


def _signature(rule: type) -> str:
    """Its arguments as a user writes them."""
    parameters = inspect.signature(rule).parameters.values()
    shown = (p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    return f"({', '.join(shown)})"


def check(texts: Sequence[str], seed: int, options: dict[str, Any]) -> tuple[Request, Guidance | None]:
    """What is asked of every picture, and its rule, if each prompt can be read and every option be met, as far as no
    weight is needed to tell."""
    use_presets(options)
    for name in SOURCES:
        if options[name]:
            read_picture(options[name])
    rule = parse(options["guidance"]) if options["guidance"] else None
    shelf = options["models_dir"] = AddOns(options["models_dir"])  # what is read to be checked is not read again
    asked = {each.name: options[each.name] for each in fields(Request) if each.name in options}
    if rule is not None:
        asked |= {"guidance": repr(rule), "scale": innermost_scale(rule)}
    for text in texts:
        if options["wildcards"] is not None:
            check_wildcards(text, options["wildcards"])
            text = expand_wildcards(text, options["wildcards"], seed)
        request = Request(text, **asked)
        shelf.check(request.add_ons)
    return request, rule


def save(picture: Picture, folder: Path, number: int, ending: str, **how: Any) -> tuple[int, Path]:
    """Write a picture under the next number that is free, whoever else writes there; the number and the path."""
    while True:
        number += 1
        path = folder / f"{number:05d}-{picture.settings.seed}-{slug(picture.settings.prompt)}.{ending}"
        try:
            picture.save(path, **how)
            return number, path
        except FileExistsError:
            number = max(number, last_number(folder))


def last_number(folder: Path) -> int:
    return max((int(found[0]) for path in folder.iterdir() if path.suffix and path.suffix.lower() in FORMATS
                and (found := re.match(r"\d+", path.name))), default=0)


def slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:50].strip("-") or "picture"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {message}", err=True)
