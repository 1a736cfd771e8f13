"""Trains the miniature from nothing: `python -m benchmarks.miniature.train --preset cpu`.

Five stages: the autoencoder; the T5 and the CLIP-style encoder, each with a reading task; the UNet on web captions with
CLIP frozen; the connector on dense captions with UNet and T5 frozen. Every stage resumes from its last checkpoint in
the run folder, so a stopped run is started again with the same command. `--export` writes the finished files.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.miniature.autoencoder import Autoencoder
from benchmarks.miniature.diffusion import ConnectorDiffusion, Curriculum, PlainDiffusion
from benchmarks.miniature.loop import Budget, Stage, train
from benchmarks.miniature.scenes import SIZE
from benchmarks.miniature.text import CLIPReader, T5Reader
from ella_kd.models import save_checkpoint, save_tsc


@dataclass(frozen=True)
class Preset:
    """Where and how long each stage trains. `processes`: data-parallel ones for the two diffusion stages."""

    device: str
    processes: int
    budgets: dict[str, Budget]
    curriculum: Curriculum


PRESETS = {
    "cpu": Preset(
        device="cpu",
        processes=2,
        budgets={
            "vae": Budget(samples=130_000, minutes=6.5, batch=16),
            "t5": Budget(samples=140_000, minutes=24, batch=48),
            "clip": Budget(samples=200_000, minutes=5, batch=48),
            "unet": Budget(samples=2_000_000, minutes=36, batch=32),
            "tsc": Budget(samples=1_000_000, minutes=22, batch=32),
        },
        curriculum=Curriculum(most=3),
    ),
    "gpu": Preset(
        device="cuda",
        processes=1,
        budgets={
            "vae": Budget(samples=400_000, minutes=2, batch=64),
            "t5": Budget(samples=400_000, minutes=2, batch=128),
            "clip": Budget(samples=400_000, minutes=1, batch=128),
            "unet": Budget(samples=6_000_000, minutes=9, batch=256),
            "tsc": Budget(samples=3_000_000, minutes=5, batch=256),
        },
        curriculum=Curriculum(most=3),
    ),
}
STAGES = ("vae", "t5", "clip", "unet", "tsc")


Finished = TypeVar("Finished", bound=Stage)


def finished(stage: Finished, folder: Path) -> Finished:
    """The stage with the averaged weights of its finished run. Raises FileNotFoundError or ValueError if it is not."""
    path = folder / f"{stage.name}.pt"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: train the stage {stage.name!r} first")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not state["done"]:
        raise ValueError(f"{path} is unfinished ({state['samples']} samples): run the stage {stage.name!r} to its end")
    with torch.no_grad():
        for parameter, value in zip(stage.trained().parameters(), state["average"], strict=True):
            parameter.copy_(value)
    return stage.eval().requires_grad_(False)


def plain_diffusion(preset: Preset, folder: Path) -> PlainDiffusion:
    """The untrained plain Stable Diffusion on the finished autoencoder and CLIP-style encoder."""
    vae = finished(Autoencoder(), folder).whitened()
    return PlainDiffusion(vae, finished(CLIPReader(), folder), preset.curriculum)


def connector_diffusion(preset: Preset, folder: Path) -> ConnectorDiffusion:
    """The untrained connector on the finished T5 and plain Stable Diffusion."""
    plain = finished(plain_diffusion(preset, folder), folder)
    return ConnectorDiffusion(plain.vae, finished(T5Reader(), folder), plain.unet, preset.curriculum)


def build(name: str, preset: Preset, folder: Path) -> Stage:
    """The stage `name` on top of the finished ones it needs."""
    if name == "vae":
        return Autoencoder()
    if name == "t5":
        return T5Reader()
    if name == "clip":
        return CLIPReader()
    return plain_diffusion(preset, folder) if name == "unet" else connector_diffusion(preset, folder)


def _process(rank: int, name: str, preset: Preset, folder: Path, seed: int, processes: int, meeting: str) -> None:
    if preset.device == "cpu":
        torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    log_every = 400.0 if name in ("unet", "tsc") else 60.0
    torch.manual_seed(seed)
    stage = build(name, preset, folder).to(preset.device)
    train(stage, preset.budgets[name], folder, seed, log_every)
    if processes > 1:
        dist.destroy_process_group()


def run(name: str, preset: Preset, folder: Path, seed: int) -> None:
    """Trains one stage to the end of its budget, in its own processes."""
    processes = preset.processes if name in ("unet", "tsc") else 1
    with tempfile.TemporaryDirectory() as meeting:
        args = (name, preset, folder, seed, processes, os.path.join(meeting, "rendezvous"))
        mp.spawn(_process, args=args, nprocs=processes)


def export(preset: Preset, folder: Path, seed: int, out: Path) -> None:
    """Writes the files of a finished run as those of the real models are: fp16, one checkpoint, a TSC, two folders."""
    stage = finished(connector_diffusion(preset, folder), folder)
    clip, t5 = finished(CLIPReader(), folder), stage.t5
    out.mkdir(parents=True, exist_ok=True)
    metadata = {"modelspec.resolution": f"{SIZE}x{SIZE}"}
    save_checkpoint(out / "sd.safetensors", stage.unet, stage.vae, clip.encoder, metadata, dtype=torch.float16)
    save_tsc(out / "tsc.safetensors", stage.tsc, dtype=torch.float16)
    clip.tokenizer.save_pretrained(out / "clip")
    t5.tokenizer.save_pretrained(out / "t5")
    t5.encoder.half().save_pretrained(out / "t5")
    stages = {}
    for name in STAGES:
        log = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        stages[name] = {"budget": asdict(preset.budgets[name]), "log": log}
    record = {"seed": seed, "device": preset.device, "processes": preset.processes, "stages": stages}
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")


@click.command(help=__doc__)
@click.option("--preset", type=click.Choice(list(PRESETS)), default="cpu", show_default=True,
              help="cpu: about 2 hours on 2 cores. gpu: about 20 minutes on one data-centre GPU.")
@click.option("--stage", "stages", type=click.Choice(STAGES), multiple=True, help="Only these; all of them by default.")
@click.option("--folder", type=click.Path(path_type=Path), help="Checkpoints and logs.  [default: runs/PRESET]")
@click.option("--seed", default=0, show_default=True)
@click.option("--export", "out", type=click.Path(path_type=Path), is_flag=False, flag_value=Path("models/miniature"),
              help="Write the finished files here, or over the bundled ones if no folder is given.")  # fmt: skip
def main(preset: str, stages: tuple[str, ...], folder: Path | None, seed: int, out: Path | None) -> None:
    chosen, folder = PRESETS[preset], folder or Path("runs") / preset
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in stages or STAGES:
        run(name, chosen, folder, seed)
    if out is not None:
        export(chosen, folder, seed, out)


if __name__ == "__main__":
    main()
