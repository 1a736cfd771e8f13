"""The command `ella-kd`."""

import inspect
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
from transformers.utils.logging import disable_progress_bar

from ella_kd.generation import generate as draw
from ella_kd.guidance.text import known, parse
from ella_kd.images import contact_sheet, save_image, save_png
from ella_kd.pipeline import Pipeline
from ella_kd.request import MODES, Mode
from ella_kd.samplers import SAMPLERS, SCHEDULES, get_sampler, get_schedule

Command = Callable[..., Any]
COLUMNS: dict[Mode, str] = {"clip": "plain SD", "fixed": "ELLA fixed", "flexible": "ELLA flexible"}


class Cli(click.Group):
    """What a user can put right is one line and exit code 2, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else ctx.command_path
            fail(ctx, f"{error.format_message()} See {command} --help.")
        except OSError as error:
            filename = f": {error.filename}" if error.filename else ""
            fail(ctx, (error.strerror or str(error)) + filename)
        except torch.OutOfMemoryError:
            fail(ctx, "the device is out of memory: try a smaller --batch, --width or --height")
        except (ValueError, TypeError) as error:
            fail(ctx, str(error))


def fail(ctx: click.Context, text: str) -> NoReturn:
    click.echo("Error: " + " ".join(text.split()), err=True)
    ctx.exit(2)


def model_options(command: Command) -> Command:
    for option in reversed([
        click.option("--model", type=click.Choice(["miniature"]), default="miniature", show_default=True,
                     help="The model that comes with the package, unless --checkpoint names another."),
        click.option("--checkpoint", metavar="FILE", help="A Stable Diffusion 1.x single file."),
        click.option("--tsc", metavar="FILE", help="ELLA's connector: ella-sd1.5-tsc-t5xl.safetensors."),
        click.option("--t5", metavar="DIR", help="The folder of flan-t5-xl: model and tokenizer."),
        click.option("--clip-tokenizer", metavar="DIR", help="CLIP's tokenizer folder: for plain SD and --tags."),
        click.option("--device", metavar="NAME", help="cuda, cpu, mps ... [default: cuda if there is one, else cpu]"),
        click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]),
                     help="[default: float16 on a GPU, float32 on a CPU]"),
        click.option("--fast", is_flag=True,
                     help="On a CPU: faster, for more memory: 2 GB with SD1.5 in float32, 4 while loading."),
    ]):
        command = option(command)
    return command


def drawing_options(command: Command) -> Command:
    for option in reversed([
        click.option("--negative", default="", metavar="TEXT", help="What the picture should not show."),
        click.option("--sampler", default="dpmpp_2m", show_default=True, metavar="NAME", help="See ella-kd samplers.",
                     callback=lambda ctx, option, name: get_sampler(name).name),
        click.option("--schedule", default="karras", show_default=True, metavar="NAME", help="See ella-kd samplers.",
                     callback=lambda ctx, option, name: get_schedule(name).name),
        click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True),
        click.option("--scale", type=float, default=7.0, show_default=True,
                     help="Guidance: how much the prompt counts; with a _cfg_pp sampler lambda, 0 to 1."),
        click.option("--guidance", metavar="RULE", callback=lambda ctx, option, text: text and parse(text),
                     help='A guidance rule in place of --scale: "Rescale(CFG(7), 0.7)". See ella-kd rules.'),
        click.option("--syntax", is_flag=True,
                     help="Read (phrase:1.3), [phrase] and AND in prompts, as the AUTOMATIC1111 web UI does."),
        click.option("--wildcards", metavar="DIR",
                     help="A folder of text files: __name__ in a prompt becomes a line of name.txt, by the seed."),
        click.option("--clip-skip", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
                     help="CLIP's layer, counted from the last."),
        click.option("--width", type=int, metavar="PX", help="[default: the model's own: 512 for SD1.5]"),
        click.option("--height", type=int, metavar="PX", help="[default: the model's own]"),
        click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True,
                     help="Pictures drawn at once; takes memory, changes no picture."),
    ]):
        command = option(command)
    return command


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ella-kd", prog_name="ella-kd")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Draw pictures that follow long, dense prompts: Stable Diffusion with ELLA.

    Without further files it draws with the miniature, a tiny model that comes with the package: squares, rings,
    triangles, crosses and hearts in six colours and nine places, by night, in snow, forest or desert.

    \b
    Try it:
      ella-kd generate "The scene is set in a deep forest. A red heart sits in the top left corner." --enlarge 8
      ella-kd compare prompts.txt
      ella-kd samplers

    \b
    With the real weights (three downloads and a tokenizer folder):
      ella-kd generate "a vivid red book with a smooth, matte cover lies on an oak desk" \\
        --checkpoint v1-5-pruned-emaonly.safetensors \\
        --tsc ella-sd1.5-tsc-t5xl.safetensors --t5 flan-t5-xl/
    """
    ctx.with_resource(warnings.catch_warnings())
    warnings.showwarning = _show_warning
    disable_progress_bar()  # the one transformers shows while it reads T5


@main.command()
@click.argument("prompts", nargs=-1)
@click.option("--prompts", "file", metavar="FILE", help="Read prompts from a text file too, one per line.")
@click.option("--mode", type=click.Choice(MODES), default="flexible", show_default=True,
              help="flexible: ELLA, prompts of any length; fixed: ELLA on 128 tokens, as it was trained; "
                   "plain: CLIP, no ELLA.")
@click.option("--seed", type=click.IntRange(min=0),
              help="Of each prompt's first picture; the next take seed + 1, ...  [default: random]")
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures per prompt.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, metavar="DIR",
              help="Where the pictures go; made if need be, nothing in it is overwritten.")
@click.option("--enlarge", type=click.IntRange(1, 64), default=1, show_default=True, metavar="N",
              help="Save every pixel as N x N equal ones; the miniature's pictures are 32 px: try 8.")
@click.option("--negative-mode", type=click.Choice(MODES),
              help="How the negative prompt is read, if not as the prompt: plain leaves ELLA to the prompt alone.")
@click.option("--tags", metavar="TEXT", help="A text for CLIP, whose tokens follow ELLA's: trigger words, styles.")
@drawing_options
@model_options
def generate(prompts: tuple[str, ...], file: str | None, mode: Mode, count: int, out: Path, enlarge: int, batch: int,
             seed: int | None, **options: Any) -> None:
    """Draw one or more prompts and save them as PNG.

    Each PNG says how it was made: in the `parameters` text that the AUTOMATIC1111 web UI and others read, and as JSON
    in the text `ella_kd`.

    \b
    Examples:
      ella-kd generate "The picture shows snow. A green triangle stands in the center." --count 4 --seed 1
      ella-kd generate --prompts prompts.txt --sampler euler_ancestral --steps 30 --out pictures
    """
    texts = [*prompts, *(_read_prompts(file) if file else [])]
    if not texts:
        raise ValueError("no prompt: give one in quotes, or a file of prompts with --prompts")
    _check_writable(out)
    pipeline, number, some = _load(options), _last_number(out), max(1, batch // count)
    for i in range(0, len(texts), some):  # saved as they come: a run that is stopped keeps what it has drawn
        drawn = draw(pipeline, texts[i : i + some], mode=mode, count=count, seeds=seed, batch_size=batch, **options)
        for picture in drawn:
            number += 1
            path = out / f"{number:05d}-{picture.settings.seed}-{_slug(picture.settings.prompt)}.png"
            save_png(picture, path, enlarge)
            click.echo(path)


@main.command()
@click.argument("prompts_file")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of every picture.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("compare.png"), show_default=True,
              metavar="FILE", help="The contact sheet, a PNG.")
@drawing_options
@model_options
def compare(prompts_file: str, out: Path, batch: int, seed: int, **options: Any) -> None:
    """Draw each prompt of a file with plain SD, ELLA fixed and ELLA flexible, from the same seeds, on one sheet.

    PROMPTS_FILE is a text file, one prompt per line. A row is a prompt, a column a way of reading it.

    \b
    Example:
      ella-kd compare prompts.txt --steps 30 --out sheet.png
    """
    texts = _read_prompts(prompts_file)
    _check_writable(out.parent)
    pipeline = _load(options)
    drawn = [draw(pipeline, texts, mode=mode, seeds=seed, batch_size=batch, **options) for mode in COLUMNS]
    rows = [(text, [picture.image for picture in row]) for text, *row in zip(texts, *drawn, strict=True)]
    save_image(contact_sheet(rows, list(COLUMNS.values())), out)
    click.echo(out)


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


def _load(options: dict[str, Any]) -> Pipeline:
    """The pipeline that the model options name; takes them out of options."""
    options.pop("model")
    dtype, fast = options.pop("dtype"), options.pop("fast")
    where = {"device": _device(options.pop("device"))} | ({"dtype": getattr(torch, dtype)} if dtype else {})
    files = {name: options.pop(name) for name in ("checkpoint", "tsc", "t5", "clip_tokenizer")}
    given = [f"--{name.replace('_', '-')}" for name, value in files.items() if value]
    if given and not files["checkpoint"]:
        raise ValueError(f"{given[0]} belongs to a checkpoint: name it with --checkpoint")
    pipeline = Pipeline.load(**files, **where) if files["checkpoint"] else Pipeline.miniature(**where)
    return pipeline.fast_on_cpu() if fast else pipeline


def _device(name: str | None) -> str | None:
    if name is not None:
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"this machine, or this build of torch, has no device {name!r}: {reason}") from error
    return name


def _read_prompts(file: str) -> list[str]:
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at {path}")
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    if not prompts:
        raise ValueError(f"{path} holds no prompt: expected one per line")
    return prompts


def _check_writable(folder: Path) -> None:
    """Find out before the pictures are drawn that they cannot be saved."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot write to the folder {folder}: {error.strerror}; choose another with --out"
                      ) from error


def _last_number(folder: Path) -> int:
    return max((int(found[0]) for path in folder.glob("*.png") if (found := re.match(r"\d+", path.name))), default=0)


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:50].strip("-") or "picture"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {message}", err=True)
