"""One training loop for every part of the miniature: budgeted, averaged, and exactly resumable after any stop."""

from __future__ import annotations

import json
import random
import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ella_kd.files import writing

WARM_UP = 200  # steps
DECAY = 0.25  # the last share of a budget, in which the learning rate falls to a fiftieth
EMA = 0.999


@dataclass(frozen=True)
class Budget:
    """How many samples a stage sees, and how.

    samples may be raised between two runs while the learning rate has not begun to fall. bf16: for the products, where
    they are large enough to gain by it (those of text encoders of width 128 are not).
    """

    samples: int
    batch: int
    lr: float = 1e-3
    bf16: bool = False


class Stage(nn.Module, ABC):
    """A module that is its own training task.

    `forward(rng, step, batch, progress)` draws the batch of a step and returns the loss. It must take everything random
    from `rng` and torch's own generator, both seeded anew at every step, so that a step does not depend on the past.
    """

    name: str

    @abstractmethod
    def forward(self, rng: random.Random, step: int, batch: int, progress: float) -> Tensor:
        ...

    def trained(self) -> nn.Module:
        """The submodule that learns; the rest is frozen."""
        return self

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Scores for the record, on held-out scenes."""


def precision(device: str, bf16: bool) -> AbstractContextManager[Any]:
    """bf16 where it pays: with AMX a training step takes two thirds of fp32's time, but not through torch's own bf16
    attention kernel, whose backward pass on a CPU takes a third of the step."""
    stack = ExitStack()
    if bf16:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.autocast(device, torch.bfloat16))
    return stack


def _learning_rate(budget: Budget, step: int, progress: float) -> float:
    return budget.lr * min(1.0, (step + 1) / WARM_UP) * max(0.02, min(1.0, (1 - progress) / DECAY))


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


def train(stage: Stage, budget: Budget, folder: Path, seed: int, log_every: float = 300.0,
          save_every: float = 60.0) -> None:  # fmt: skip
    """Trains `stage` to the end of its budget, then leaves its averaged weights in place and in `folder/NAME.pt`.

    Saves `folder/NAME.pt` every `save_every` seconds and resumes from it: a run that was killed and started again ends
    with the bits of one that was not. Writes `folder/NAME.jsonl`, a record every `log_every` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / f"{stage.name}.pt", folder / f"{stage.name}.jsonl"
    trained = stage.trained()
    stage.requires_grad_(False)
    trained.requires_grad_(True)
    device = next(trained.parameters()).device
    optimizer = torch.optim.AdamW(trained.parameters(), lr=budget.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average = _Average(trained)
    step, seconds, done = 0, 0.0, False
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        trained.load_state_dict(state["weights"])
        average.values = state["average"]
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, done = state["step"], state["seconds"], state["done"]
    losses: list[Tensor] = []
    before = saved = logged = time.monotonic()

    def save() -> None:
        state = {"weights": trained.state_dict(), "average": average.values, "optimizer": optimizer.state_dict()}
        with writing(path) as temporary:
            torch.save(state | {"step": step, "seconds": seconds, "done": done}, temporary)

    def record() -> None:
        average.swap()
        scores = stage.eval().evaluate()
        stage.train()
        average.swap()
        loss = torch.stack(losses).mean().item() if losses else None
        line = {"samples": step * budget.batch, "minutes": round(seconds / 60, 2), "loss": loss, **scores}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(stage.name, json.dumps(line), flush=True)
        losses.clear()

    while not done:
        progress = step * budget.batch / budget.samples
        rng = random.Random(f"{seed} {stage.name} {step}")
        torch.manual_seed(rng.getrandbits(32))
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(budget, step, progress)
        with precision(device.type, budget.bf16):
            loss = stage(rng, step, budget.batch, progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        step += 1
        average.update(step)
        losses.append(loss.detach())
        done = step * budget.batch >= budget.samples
        now = time.monotonic()
        seconds, before = seconds + now - before, now
        if done or now - saved > save_every:
            save()
            saved = now
        if done or now - logged > log_every:
            record()
            logged = before = time.monotonic()  # scoring is not training time
    average.swap()
