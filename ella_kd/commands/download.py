"""`ella-kd download`."""

from typing import get_args

import click

from ella_kd.models.files.hub import Name, find, find_all, with_preset
from ella_kd.models.files.presets import PRESETS, Part


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--part", type=click.Choice([part.replace("_", "-") for part in get_args(Part)]),
              help="What it is for, of a repository that holds several things: its vae, its clip-tokenizer.")
def download(names: tuple[str, ...], part: str | None) -> None:
    """Fetch models into the cache of the Hugging Face hub (HF_HOME), and print where they are.

    NAMES are those that `ella-kd models` lists, or org/repo:file, or org/repo for the files of it that make a model.
    What is there is not fetched again. Files are compared with their sha256.

    \b
    Examples:
      ella-kd download ella-sd15
      ella-kd download google/flan-t5-xl stabilityai/sdxl-vae:sdxl_vae.safetensors
    """
    for name in names:
        if part is None and name in PRESETS:
            paths = list(find_all(with_preset({}, name)).values())
        else:
            paths = [find(Name(name), (part or "checkpoint").replace("-", "_"))]  # type: ignore[arg-type]
        for path in paths:
            if path is None or not path.exists():
                raise FileNotFoundError(f"nothing is named {name}: expected one of the names that `ella-kd models` "
                                        "lists, org/repo or org/repo:file")
            click.echo(click.format_filename(path))
