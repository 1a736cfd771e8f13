"""`ella-kd convert`."""

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ella_kd.models.devices import DTYPES
from ella_kd.models.files.checkpoint import load_checkpoint, parts_at
from ella_kd.models.files.hub import find
from ella_kd.models.files.metadata import kept
from ella_kd.models.files.saving import is_folder, save
from ella_kd.models.tokenizers import published_clip_tokenizer

SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@click.command()
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice([*SHORT, *SHORT.values()]), help="[default: the UNet's own]")
@click.option("--vae", metavar="FILE", help="An autoencoder instead of IN's.")
@click.option("--text-encoder", metavar="FILE", help="A text encoder instead of IN's.")
@click.option("--clip-tokenizer", metavar="DIR", help="CLIP's tokenizer, which a folder has and a single file lacks.")
@click.option("--prediction", type=click.Choice(["eps", "v"]), help="What the UNet predicts, where IN does not say.")
@click.option("--ema", is_flag=True, help="The moving averages of the UNet's weights, where IN has both.")
def convert(source: str, target: Path, dtype: str | None, vae: str | None, text_encoder: str | None,
            clip_tokenizer: str | None, **options: Any) -> None:
    """Write a checkpoint in the other layout, or in other numbers.

    IN is a single file or a diffusers folder. OUT.safetensors is a single file in LDM's layout, which A1111, Forge and
    ComfyUI read, any other name a diffusers folder; it appears whole or not at all.

    \b
    Examples:
      ella-kd convert v1-5-pruned.ckpt sd15.safetensors --dtype fp16 --ema
      ella-kd convert sd15.safetensors sd15/ --clip-tokenizer clip-vit-large-patch14/
    """
    folder, path = is_folder(target), find(source)
    weights = parts_at(path)[0]
    unet = weights.get("unet")
    own = Counter(str(unet.weights.dtypes[each.name]).removeprefix("torch.") for each in unet.sources.values()
                  ) if unet else Counter[str]()
    name = SHORT.get(dtype or "", dtype) or next((each for each, _ in own.most_common() if each in DTYPES), "float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "float16 on a CPU")  # nothing is computed
        found = load_checkpoint(path, dtype=name, device="cpu", vae=vae and find(vae, "vae"),
                                text_encoder=text_encoder and find(text_encoder, "text_encoder"),
                                clip_tokenizer=clip_tokenizer and find(clip_tokenizer, "clip_tokenizer"), **options)
    if folder and found.text_model is not None and found.clip_tokenizer is None:
        words = published_clip_tokenizer(found.text_model.config.vocab_size, fetch=False)
        found = replace(found, clip_tokenizer=words)
        if words is None:
            warnings.warn("the folder lacks CLIP's tokenizer, which no single file has: give it with --clip-tokenizer",
                          stacklevel=1)
    save(target, found, kept(weights["unet"].weights.metadata))
    click.echo(click.format_filename(target))
