"""The command's options, and what is checked before any weight is read."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ella_kd.addon_words import read
from ella_kd.models.devices import check_device, check_dtype
from ella_kd.models.files.checkpoint import parts_at
from ella_kd.models.files.connector import connector_file
from ella_kd.models.files.hub import find, find_all, is_preset, with_preset
from ella_kd.models.files.kinds import kind_of_path
from ella_kd.models.files.metadata import size_of
from ella_kd.models.files.presets import PRESETS, Part
from ella_kd.models.shapes import count_of
from ella_kd.models.tokenizers import BPE, find_clip_tokenizer
from ella_kd.pipeline import MINIATURE, Pipeline
from ella_kd.placement import Placement
from ella_kd.request import MODES, Mode, Request, mode_named
from ella_kd.starting import check_multiples

Command = Callable[..., Any]
FILES: tuple[Part, ...] = ("checkpoint", "vae", "text_encoder", "tsc", "t5", "clip_tokenizer")
NAMES = [name for name, preset in PRESETS.items() if {*preset.parts} <= {*FILES}]  # a LoRA is given as --lora
WHAT = {"checkpoint": "a Stable Diffusion checkpoint", "vae": "an autoencoder", "tsc": "ELLA's connector"}


class ModeChoice(click.Choice[Any]):
    """A mode by its name, "plain" being an older one of clip."""

    def __init__(self) -> None:
        super().__init__(MODES)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return "clip" if value == "plain" else super().convert(value, param, ctx)


def model_options(command: Command) -> Command:
    """The model, its files, and where it runs."""
    for option in reversed([
        click.option("--model", type=click.Choice(["miniature", *NAMES]), default="miniature", show_default=True,
                     metavar="NAME", help="The files of a model by its name (ella-kd models), fetched if need be; "
                                          "those named below come first."),
        click.option("--checkpoint", metavar="FILE",
                     help="Stable Diffusion: a single file or a diffusers folder; this and the next five may be "
                          "org/repo:file on the Hugging Face hub."),
        click.option("--vae", metavar="FILE", help="An autoencoder instead of the checkpoint's: a file or a folder."),
        click.option("--text-encoder", metavar="FILE", help="CLIP's text model instead of the checkpoint's."),
        click.option("--offset", metavar="FILE",
                     help="Differences to add to the UNet: IC-Light's files, which relight a --foreground."),
        click.option("--tsc", metavar="FILE", help="ELLA's connector: ella-sd1.5-tsc-t5xl.safetensors."),
        click.option("--t5", metavar="DIR", help="The folder of flan-t5-xl: model and tokenizer."),
        click.option("--clip-tokenizer", metavar="DIR",
                     help="CLIP's tokenizer folder, for plain SD and --tags.  [default: an installed package's, or the "
                          "hub's]"),
        click.option("--prediction", type=click.Choice(["eps", "v"]),
                     help="What the UNet predicts, where its files do not say (ella-kd inspect)."),
        click.option("--device", metavar="NAME", help="cuda, cpu, mps ... [default: cuda if there is one, else cpu]"),
        click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]),
                     help="[default: float16 on a GPU, float32 on a CPU]"),
        click.option("--offload", is_flag=True,
                     help="For small cards: every network waits in the CPU's memory until its turn."),
        click.option("--keep-t5", is_flag=True,
                     help="Keep T5 where it runs; else it leaves once a batch is encoded, to be read again."),
        click.option("--fast", is_flag=True,
                     help="On a CPU: faster, for more memory: 2 GB with SD1.5 in float32, 4 while loading."),
    ]):
        command = option(command)
    return command


def request_options(*left_out: str) -> Callable[[Command], Command]:
    """The options that `Request` declares, and those of drawing many."""
    def add(command: Command) -> Command:
        for option in reversed([
            *(_option(each) for each in sorted(fields(Request), key=lambda each: bool(each.kw_only))  # pictures last
              if "help" in each.metadata and each.name not in left_out),
            click.option("--wildcards", metavar="DIR",
                         help="A folder of text files: __name__ in a prompt becomes a line of name.txt, by the seed."),
            click.option("--models-dir", metavar="DIR",
                         help="A folder where the names of add-ons are looked up: flat, or A1111's or ComfyUI's."),
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
    if said.get("multiple"):
        how |= {"multiple": True, "show_default": False}
    if each.type in (Mode, Mode | None):
        how |= {"type": ModeChoice(), "metavar": None}
    elif each.type is bool:
        how["is_flag"] = True
    elif "choices" in said:
        how |= {"type": click.Choice(said["choices"]), "metavar": None}
    elif "type" in said:
        how["type"] = said["type"]
    elif "least" in said:
        how["type"] = click.IntRange(min=said["least"])
    elif isinstance(each.default, float):
        how["type"] = float
    return click.option(f"--{each.name.replace('_', '-')}", **how)


def use_presets(options: dict[str, Any]) -> None:
    """Draw with the settings of the few-step LoRAs that are named (lcm-sd15), but for what the user has said."""
    given = click.get_current_context().get_parameter_source
    for name in (read("lora", door).file for door in options["lora"]):
        for option, value in (PRESETS[name].settings if is_preset(name) else {}).items():
            if given(option) == ParameterSource.DEFAULT:
                options[option] = value


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
    model = options.pop("model")
    prediction, offload, keep_t5 = (options.pop(name) for name in ("prediction", "offload", "keep_t5"))
    dtype, fast, device = options.pop("dtype"), options.pop("fast"), check_device(options.pop("device"))
    offset = options.pop("offset")
    specs = with_preset({name: options.pop(name) for name in FILES}, None if model == "miniature" else model)
    files: dict[str, Any] = {"checkpoint": MINIATURE / "sd.safetensors"}
    given = [name for name in FILES if specs[name]]
    own = model == "miniature" and not given
    if not specs["checkpoint"] and (given or offset):
        raise ValueError(f"{_flag(given[0] if given else 'offset')} belongs to a checkpoint: name it with --checkpoint")
    if not own:
        modes = [(said, mode_named(mode)) for said, mode in wanted if mode]
        if not specs["tsc"] and (said := next((said for said, mode in modes if mode != "clip"), None)):
            raise ValueError(f"{said} needs ELLA: name its files with --tsc and --t5, or draw without it, --mode clip")
        files = {str(part): path for part, path in find_all(specs).items()}
        if said := next((said for said, mode in modes if mode == "clip"), None):
            files["clip_tokenizer"] = files["clip_tokenizer"] or _clip_tokenizer(files["checkpoint"], said)
        _check_files(files)
    if options.get("refiner"):
        _check_kind("refiner", find(options["refiner"]), WHAT["checkpoint"], "checkpoint")
    if offset:
        _check_kind("offset", find(offset), "IC-Light's file", "offset")
    checkpoint = Path(files["checkpoint"])
    factor = _factor(Path(files.get("vae") or checkpoint))
    side = size_of(checkpoint, factor) or factor
    check_multiples(options.get("width") or side, options.get("height") or side, factor)
    numbers = check_dtype(dtype, device)
    if fast and (device.type != "cpu" or dtype == "float16"):
        raise ValueError(f"--fast is for float32 or bfloat16 on the CPU, got {dtype or numbers} on {device}")
    if not own:
        pipeline = Pipeline.load(**files, offset=offset, prediction=prediction,
                                 placement=Placement(device, numbers, keep_t5=keep_t5, offload=offload))
    else:
        pipeline = Pipeline.miniature(device=device, **({"dtype": numbers} if dtype else {}))
    return pipeline.fast_on_cpu() if fast else pipeline


def _check_files(files: dict[str, Any]) -> None:
    for name, what in WHAT.items():
        if path := files.get(name):
            _check_kind(name, path, what, name)
    if (files["tsc"] is None) != (files["t5"] is None):
        raise ValueError("ELLA takes both --tsc, the connector, and --t5, the folder of the T5 it was trained with")
    for name, what in (("t5", "config.json"), ("clip_tokenizer", "a tokenizer")):
        folder = files[name] and Path(files[name])
        wanted = ("config.json",) if name == "t5" else ("tokenizer.json", "vocab.json", "spiece.model")
        if folder and folder.name != BPE and not any((folder / found).is_file() for found in wanted):
            raise FileNotFoundError(f"{_flag(name)} takes a folder that holds {what}, and {folder} does not")


def _check_kind(name: str, path: str | Path, what: str, place: str) -> None:
    if not Path(path).exists():
        raise FileNotFoundError(f"no {what.split()[-1]} at {path}: {_flag(name)} takes a file or a folder")
    kind = kind_of_path(connector_file(Path(path)) if name == "tsc" else path)
    if kind.what and kind.place != place:
        raise ValueError(f"{_flag(name)} takes {what}, and {path} looks like {kind}")


def _clip_tokenizer(checkpoint: Path, said: str) -> Path | None:
    """The published one; None for a diffusers folder, which has its own."""
    if any((checkpoint / name).is_dir() for name in ("tokenizer", "tokenizer_2")):
        return None
    try:
        return find_clip_tokenizer()
    except FileNotFoundError as error:
        raise ValueError(f"{said} needs {error}") from error


def _factor(path: Path) -> int:
    """Pixels per latent, from the names of an autoencoder's tensors; 8 where there is none that tells."""
    autoencoder = parts_at(path)[0].get("vae")
    levels = count_of(autoencoder.shapes, "encoder.down") if autoencoder else 0
    return int(2 ** (levels - 1)) if levels else 8


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
