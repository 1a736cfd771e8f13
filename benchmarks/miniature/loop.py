"""One training loop for every part of the miniature: budgeted, resumable, averaged, on one or several processes."""

from __future__ import annotations

import json
import math
import os
import random
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

WARM_UP = 200  # steps
EMA = 0.999
MEETING = 8  # steps between two averagings of the processes' weights: 22 MB at every step would make each wait


@dataclass(frozen=True)
class Budget:
    """Training ends at whichever comes first; the learning rate falls with the larger share of the two."""

    samples: int
    minutes: float
    batch: int  # per process
    lr: float = 1e-3


class Stage(nn.Module, ABC):
    """A module that is its own training task: `forward(rng, batch, progress)` draws a batch and returns the loss."""

    name: str

    @abstractmethod
    def forward(self, rng: random.Random, batch: int, progress: float) -> Tensor:
        ...

    def trained(self) -> nn.Module:
        """The submodule that learns; the rest is frozen."""
        return self

    def evaluate(self) -> dict[str, Any]:
        """Scores to log; called with the averaged weights in place."""
        return {}


def write_atomically(path: Path, state: Any) -> None:
    """`torch.save` under a temporary name, then rename: a killed run leaves the last whole checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _learning_rate(budget: Budget, step: int, progress: float) -> float:
    warm = min(1.0, (step + 1) / WARM_UP)
    return budget.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class _Average:
    """Exponential moving average of the trained weights, with the usual ramp at the start."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.values = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(EMA, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.module.parameters()], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        for value, parameter in zip(self.values, self.module.parameters(), strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def train(stage: Stage, budget: Budget, folder: Path, seed: int, log_every: float = 120.0) -> None:
    """Trains `stage` to the end of its budget, then leaves its averaged weights in place and in `folder/NAME.pt`.

    Resumes from `folder/NAME.pt`; a finished stage is only loaded. Writes `folder/NAME.jsonl`, a record every
    `log_every` seconds. Under `torch.distributed` the processes train side by side and average their weights now and
    then (local SGD, arXiv 1805.09767).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    path, log = folder / f"{stage.name}.pt", folder / f"{stage.name}.jsonl"
    trained = stage.trained()
    for parameter in stage.parameters():
        parameter.requires_grad_(False)
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=budget.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average = _Average(trained)
    step, samples, seconds, progress, done = 0, 0, 0.0, 0.0, False
    if path.exists():
        state = torch.load(path, map_location=next(trained.parameters()).device, weights_only=True)
        trained.load_state_dict(state["weights"])
        average.values = state["average"]
        optimizer.load_state_dict(state["optimizer"])
        step, samples, seconds, done = state["step"], state["samples"], state["seconds"], state["done"]
    averager = PeriodicModelAverager(period=MEETING) if world > 1 else None
    rng = random.Random(f"{seed} {stage.name} {rank} {step}")
    torch.manual_seed(rng.getrandbits(32))
    losses: list[Tensor] = []
    before, logged = time.monotonic(), time.monotonic()

    def save() -> None:
        state = {"weights": trained.state_dict(), "average": average.values, "optimizer": optimizer.state_dict()}
        counters = {"step": step, "samples": samples, "seconds": seconds, "done": done}
        write_atomically(path, state | counters)

    def record() -> None:
        average.swap()
        scores = stage.eval().evaluate()
        stage.train()
        average.swap()
        loss = torch.stack(losses).mean().item() if losses else None
        line = {"samples": samples, "minutes": round(seconds / 60, 2), "loss": loss, "processes": world, **scores}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(stage.name, json.dumps(line), flush=True)
        losses.clear()

    while not done:
        if world == 1 or step % MEETING == 0:
            progress = max(samples / budget.samples, seconds / 60 / budget.minutes)
            if world > 1:  # clocks differ: the processes must agree on when to stop
                agreed = torch.tensor([progress])
                dist.all_reduce(agreed, dist.ReduceOp.MAX)
                progress = agreed.item()
            done = progress >= 1
        if not done:
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(budget, step, progress)
            loss = stage(rng, budget.batch, progress)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            if averager is not None:
                averager.average_parameters(trained.parameters())
            step, samples = step + 1, samples + budget.batch * world
            average.update(step)
            losses.append(loss.detach())
        now = time.monotonic()
        seconds, before = seconds + now - before, now
        if rank == 0 and (done or now - logged > log_every):
            logged = now
            record()
            save()
            before = time.monotonic()  # scoring is not training time
    average.swap()
