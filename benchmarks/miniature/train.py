"""Trains the miniature from nothing: `python -m benchmarks.miniature.train`.

Five stages: the autoencoder; the CLIP-style and the T5 encoder, each with a reading task; the UNet on web captions with
CLIP frozen; the connector on dense captions with UNet and T5 frozen. Every stage resumes from its last checkpoint in
the run folder, so a stopped run is started again with the same command, and ends with the same bits. `--export` writes
the finished files.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import click
import torch

from benchmarks.machine import machine
from benchmarks.miniature.autoencoder import Autoencoder
from benchmarks.miniature.diffusion import ConnectorDiffusion, Curriculum, PlainDiffusion
from benchmarks.miniature.loop import Budget, Stage, train
from benchmarks.miniature.scenes import SIZE
from benchmarks.miniature.text import CLIPReader, T5Reader
from ella_kd.models import save_checkpoint, save_tsc

BUDGETS = {
    "vae": Budget(samples=80_000, batch=8, bf16=True),
    "clip": Budget(samples=100_000, batch=48),
    "unet": Budget(samples=350_000, batch=64, bf16=True),
    "t5": Budget(samples=240_000, batch=48),
    "tsc": Budget(samples=180_000, batch=48, bf16=True),
}
STAGES = tuple(BUDGETS)
BUNDLED = Path(__file__).parents[2] / "models" / "miniature"

Finished = TypeVar("Finished", bound=Stage)


def finished(stage: Finished, folder: Path) -> Finished:
    """The stage with the averaged weights of its finished run. Raises FileNotFoundError or ValueError if it is not."""
    path = folder / f"{stage.name}.pt"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: train the stage {stage.name!r} first")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not state["done"]:
        raise ValueError(f"{path} is unfinished ({state['step']} steps): run the stage {stage.name!r} to its end")
    with torch.no_grad():
        for parameter, value in zip(stage.trained().parameters(), state["average"], strict=True):
            parameter.copy_(value)
    return stage.eval().requires_grad_(False)


def build(name: str, folder: Path) -> Stage:
    """The stage `name` on top of the finished ones it needs."""
    if name == "vae":
        return Autoencoder()
    if name == "clip":
        return CLIPReader()
    if name == "t5":
        return T5Reader()
    plain = PlainDiffusion(finished(CLIPReader(), folder), Curriculum())
    if name == "unet":
        return plain
    return ConnectorDiffusion(finished(T5Reader(), folder), finished(plain, folder).unet, Curriculum())


def run(name: str, folder: Path, seed: int, device: str) -> None:
    """Trains one stage to the end of its budget."""
    torch.manual_seed(seed)
    train(build(name, folder).to(device), BUDGETS[name], folder, seed)


def export(folder: Path, seed: int, out: Path) -> None:
    """Writes the files of a finished run as those of the real models are: fp16, one checkpoint, a TSC, two folders."""
    stage = build("tsc", folder)
    assert isinstance(stage, ConnectorDiffusion)
    stage = finished(stage, folder)
    vae, clip = finished(Autoencoder(), folder).model(), finished(CLIPReader(), folder)
    out.mkdir(parents=True, exist_ok=True)
    metadata = {"modelspec.resolution": f"{SIZE}x{SIZE}"}
    save_checkpoint(out / "sd.safetensors", stage.unet, vae, clip.encoder, metadata, dtype=torch.float16)
    save_tsc(out / "tsc.safetensors", stage.tsc, dtype=torch.float16)
    clip.tokenizer.save_pretrained(out / "clip")
    stage.t5.tokenizer.save_pretrained(out / "t5")
    stage.t5.encoder.half().save_pretrained(out / "t5")
    stages = {
        name: {"budget": asdict(BUDGETS[name]),
               "log": [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]}
        for name in STAGES
    }  # fmt: skip
    record = {"seed": seed, "machine": machine(), "stages": stages}
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")


@click.command(help=__doc__)
@click.option("--stage", "stages", type=click.Choice(STAGES), multiple=True, help="Only these stages.  [all, in order]")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/miniature"), show_default=True,
              help="Checkpoints and records of the run.")  # fmt: skip
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True, help="Of the CPU. Another number gives other bits.")
@click.option("--export", "out", type=click.Path(path_type=Path), is_flag=False, flag_value=BUNDLED,
              help="Write the finished files here, or over the bundled ones if no folder is given.")  # fmt: skip
def main(stages: tuple[str, ...], folder: Path, seed: int, device: str, threads: int, out: Path | None) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch.set_num_threads(threads)
    for name in stages or STAGES:
        run(name, folder, seed, device)
    if out is not None:
        export(folder, seed, out)


if __name__ == "__main__":
    main()
