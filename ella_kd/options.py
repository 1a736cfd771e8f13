"""The command's options, and what is checked before any weight is read."""

import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click
from safetensors import safe_open

from ella_kd.drawing import check_multiples
from ella_kd.models.devices import check_device, check_dtype
from ella_kd.pipeline import MINIATURE, Pipeline, image_size
from ella_kd.request import MODES, Mode, Request, mode_named

Command = Callable[..., Any]
FILES = ("checkpoint", "tsc", "t5", "clip_tokenizer")


class ModeChoice(click.Choice[Any]):
    """A mode by its name, "plain" being an older one of clip."""

    def __init__(self) -> None:
        super().__init__(MODES)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return "clip" if value == "plain" else super().convert(value, param, ctx)


def model_options(command: Command) -> Command:
    """The model, its files, and where it runs."""
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


def request_options(*left_out: str) -> Callable[[Command], Command]:
    """The options that `Request` declares, and those of drawing many."""
    def add(command: Command) -> Command:
        for option in reversed([
            *(_option(each) for each in fields(Request) if "help" in each.metadata and each.name not in left_out),
            click.option("--wildcards", metavar="DIR",
                         help="A folder of text files: __name__ in a prompt becomes a line of name.txt, by the seed."),
            click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True,
                         help="Pictures drawn at once; takes memory, and changes a picture by at most one grey level "
                              "of 255 (three in bfloat16)."),
        ]):
            command = option(command)
        return command

    return add


def _option(each: Field[Any]) -> Callable[[Command], Command]:
    """A field of `Request` as an option of the command."""
    said = each.metadata
    how: dict[str, Any] = {"help": said["help"], "metavar": said.get("metavar"), "default": each.default}
    how["show_default"] = each.default not in (None, "", False)
    if each.type in (Mode, Mode | None):
        how |= {"type": ModeChoice(), "metavar": None}
    elif each.type is bool:
        how["is_flag"] = True
    elif "least" in said:
        how["type"] = click.IntRange(min=said["least"])
    elif isinstance(each.default, float):
        how["type"] = float
    return click.option(f"--{each.name.replace('_', '-')}", **how)


def read_prompts(file: str) -> list[str]:
    """The lines of a text file that say something."""
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


def check_folder(folder: Path) -> None:
    """Find out before the pictures are drawn that they cannot be saved."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot write to the folder {folder}: {error.strerror}; choose another with --out"
                      ) from error


def load(options: dict[str, Any], wanted: Iterable[tuple[str, Mode | None]]) -> Pipeline:
    """The pipeline that the model options name, which are taken out of options.

    wanted: which options need which mode. Files, modes, device and sizes are checked before any weight is read.
    """
    options.pop("model")
    dtype, fast, device = options.pop("dtype"), options.pop("fast"), check_device(options.pop("device"))
    files = {name: options.pop(name) for name in FILES}
    given = [name for name in FILES if files[name]]
    if given and not files["checkpoint"]:
        raise ValueError(f"{_flag(given[0])} belongs to a checkpoint: name it with --checkpoint")
    if given:
        _check_files(files)
        _check_modes(files, wanted)
    checkpoint = Path(files["checkpoint"] or MINIATURE / "sd.safetensors")
    own, factor = image_size(checkpoint), _factor(checkpoint)
    check_multiples(options.get("width") or own or factor, options.get("height") or own or factor, factor)
    numbers = check_dtype(dtype, device)
    if fast and (device.type != "cpu" or dtype == "float16"):
        raise ValueError(f"--fast is for float32 or bfloat16 on the CPU, got {dtype or numbers} on {device}")
    if given:
        pipeline = Pipeline.load(**files, device=device, dtype=numbers)
    else:
        pipeline = Pipeline.miniature(device=device, **({"dtype": numbers} if dtype else {}))
    return pipeline.fast_on_cpu() if fast else pipeline


def _check_files(files: dict[str, str | None]) -> None:
    for name, what in (("checkpoint", "checkpoint"), ("tsc", "connector")):
        if files[name] and not Path(str(files[name])).is_file():
            raise FileNotFoundError(f"no {what} at {files[name]}: {_flag(name)} takes a file")
    if (files["tsc"] is None) != (files["t5"] is None):
        raise ValueError("ELLA takes both --tsc, the connector, and --t5, the folder of the T5 it was trained with")
    for name, what in (("t5", "config.json"), ("clip_tokenizer", "a tokenizer")):
        folder = files[name] and Path(str(files[name]))
        wanted = ("config.json",) if name == "t5" else ("tokenizer.json", "vocab.json", "spiece.model")
        if folder and not any((folder / found).is_file() for found in wanted):
            raise FileNotFoundError(f"{_flag(name)} takes a folder that holds {what}, and {folder} does not")


def _check_modes(files: dict[str, str | None], wanted: Iterable[tuple[str, Mode | None]]) -> None:
    for said, mode in wanted:
        if not mode:
            continue
        if mode_named(mode) == "clip":
            if not files["clip_tokenizer"]:
                raise ValueError(f"{said} needs CLIP's tokenizer, which no checkpoint holds: name its folder with "
                                 "--clip-tokenizer")
        elif not files["tsc"]:
            raise ValueError(f"{said} needs ELLA: name its files with --tsc and --t5, or draw without it, --mode clip")


def _factor(checkpoint: Path) -> int:
    """Pixels per latent, from the names in the file's header; SD1.x's 8 where it has none that tells."""
    if checkpoint.suffix != ".safetensors":
        return 8
    with safe_open(checkpoint, framework="pt") as file:
        levels = {found[1] for name in file.keys()  # noqa: SIM118
                  if (found := re.match(r"first_stage_model\.encoder\.down\.(\d+)\.", name))}
    return int(2 ** (len(levels) - 1)) if levels else 8


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
