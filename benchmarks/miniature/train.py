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

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.miniature.autoencoder import Autoencoder
from benchmarks.miniature.diffusion import ConnectorDiffusion, Curriculum, PlainDiffusion
from benchmarks.miniature.loop import Budget, Stage, train
from benchmarks.miniature.text import Reader
from ella_kd.models import AutoencoderKL, save_checkpoint, save_tsc


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
            "t5": Budget(samples=160_000, minutes=13, batch=48),
            "clip": Budget(samples=200_000, minutes=5, batch=48),
            "unet": Budget(samples=2_000_000, minutes=52, batch=32),
            "tsc": Budget(samples=1_000_000, minutes=34, batch=32),
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


def finished(stage: Stage, folder: Path) -> Stage:
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


def trained_vae(folder: Path) -> AutoencoderKL:
    autoencoder = Autoencoder()
    finished(autoencoder, folder)
    autoencoder.whiten()
    return autoencoder.vae


def trained_reader(kind: str, folder: Path) -> Reader:
    reader = Reader(kind)
    finished(reader, folder)
    return reader


def build(name: str, preset: Preset, folder: Path, seed: int) -> Stage:
    """The stage `name` on top of the finished ones it needs."""
    torch.manual_seed(seed)
    stage: Stage
    if name == "vae":
        stage = Autoencoder().to(memory_format=torch.channels_last)
    elif name in ("t5", "clip"):
        stage = Reader(name)
    elif name == "unet":
        stage = PlainDiffusion(trained_vae(folder), trained_reader("clip", folder), preset.curriculum, seed)
    else:
        plain = build("unet", preset, folder, seed)
        finished(plain, folder)
        assert isinstance(plain, PlainDiffusion)
        stage = ConnectorDiffusion(plain.vae, trained_reader("t5", folder), plain.unet, preset.curriculum, seed)
    return stage.to(preset.device)


def _process(rank: int, name: str, preset: Preset, folder: Path, seed: int, processes: int, meeting: str) -> None:
    if preset.device == "cpu":
        torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    log_every = 400.0 if name in ("unet", "tsc") else 60.0
    train(build(name, preset, folder, seed), preset.budgets[name], folder, seed, log_every)
    if processes > 1:
        dist.destroy_process_group()


def run(name: str, preset: Preset, folder: Path, seed: int) -> None:
    """Trains one stage to the end of its budget, in its own processes."""
    processes = preset.processes if name in ("unet", "tsc") else 1
    with tempfile.TemporaryDirectory() as meeting:
        args = (name, preset, folder, seed, processes, os.path.join(meeting, "rendezvous"))
        mp.spawn(_process, args=args, nprocs=processes)  # type: ignore[no-untyped-call]


def export(preset: Preset, folder: Path, seed: int, out: Path) -> None:
    """Writes the files of a finished run as those of the real models are: fp16, one checkpoint, a TSC, two folders."""
    stage = build("tsc", preset, folder, seed)
    finished(stage, folder)
    assert isinstance(stage, ConnectorDiffusion)
    clip, t5 = trained_reader("clip", folder), trained_reader("t5", folder)
    out.mkdir(parents=True, exist_ok=True)
    unet = stage.denoiser.inner_model
    metadata = {"modelspec.resolution": "32x32"}
    save_checkpoint(out / "sd.safetensors", unet, stage.vae, clip.encoder, metadata, dtype=torch.float16)
    save_tsc(out / "tsc.safetensors", stage.tsc, dtype=torch.float16)
    clip.save(out / "clip")
    t5.save(out / "t5")
    logs = {}
    for name in STAGES:
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        logs[name] = {"budget": asdict(preset.budgets[name]), "end": lines[-1], "log": lines}
    record = {"seed": seed, "device": preset.device, "processes": preset.processes, "stages": logs}
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
