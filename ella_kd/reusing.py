"""What a run keeps of its evaluations for the next ones, where its network is a `models.reuse.Reuse`."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ella_kd.digests import digest
from ella_kd.models.context import Context
from ella_kd.models.devices import outliving
from ella_kd.models.network import Deep, Levels, Patches
from ella_kd.models.partial import rows_of
from ella_kd.models.patches import Recorder
from ella_kd.models.reuse import Reuse

if TYPE_CHECKING:
    from ella_kd.bound import BoundRun, Job


class Held(NamedTuple):
    """Of a group of noise levels, deep features or an answer of the network: [rows of the batch, ...]."""

    group: int
    tensor: Tensor


Memory = Mapping[tuple[str, Any], Held]
"""By kind ("deep", "out") and job, or the job's name where it comes from a saved run."""


def network_at(run: "BoundRun", network: Any, levels: Levels, jobs: Sequence["Job"]) -> Any:
    """A run's network for the rows of these jobs at these levels."""
    if not isinstance(network, Reuse):
        return network.at(levels)
    deep, out = network.groups(levels, run.planned)
    return network.at(levels) if deep is None and out is None else Reusing(run, network, levels, jobs, deep, out)


class Reusing:
    """One call of a network that is worked out in part: called as the network is."""

    def __init__(self, run: "BoundRun", network: Reuse, levels: Levels, jobs: Sequence["Job"], deep: int | None,
                 out: int | None) -> None:
        self.run, self.network, self.now, self.jobs = run, network, network.at(levels), jobs
        self.groups = {"deep": deep, "out": out}

    def __call__(self, x: Tensor, t: Tensor, context: Context, patches: Patches = ()) -> Tensor:
        """x [jobs * rows, C, h, w] -> the network's answer, or what is held of it."""
        rows, given = len(x) // len(self.jobs), [patch for n, patch in patches for _ in range(n)]
        answers = {job: out for job in self.jobs
                   if self._of_uncond(job) and (out := self._held("out", job)) is not None}
        left = [job for job in self.jobs if job not in answers]
        held = {job: features for job in left if (features := self._held("deep", job)) is not None
                and not isinstance(job.patch, Recorder)}
        for some in ([job for job in left if job not in held], list(held)):
            if not some:
                continue
            own = [row for i, job in enumerate(self.jobs) if job in some for row in range(i * rows, (i + 1) * rows)]
            whole = len(own) == len(x)
            args = (x, t, context) if whole else (rows_of(x, own), rows_of(t, own), context.take(own))
            parts = patches if whole or not given else tuple(
                (len(list(run)), patch) for patch, run in groupby(given[row] for row in own))
            features = torch.cat([held[job] for job in some]) if some[0] in held else None
            if self.groups["deep"] is None:
                out = self.now(*args, parts)
            else:
                out, found = self.now(*args, parts, deep=Deep(self.network.branch, features))
                if features is None:
                    self._keep("deep", some, outliving(found))
            answers |= zip(some, outliving(out).split(rows), strict=True)
            self._keep("out", [job for job in some if self._of_uncond(job)], torch.cat(
                [answers[job] for job in some if self._of_uncond(job)] or [out[:0]]))
        return torch.cat([answers[job] for job in self.jobs])

    def _of_uncond(self, job: "Job") -> bool:
        uncond = self.run.conditions.get("uncond")
        return self.groups["out"] is not None and job.patch is None and uncond is not None and (
            job.cond is self.run.of_rows(uncond))

    def _held(self, kind: str, job: "Job") -> Tensor | None:
        memory = self.run.memory
        found = memory.get((kind, job))
        if found is None and any(isinstance(key, str) for _, key in memory):
            found = memory.get((kind, name_of(self.run, job)))
        return found.tensor if found is not None and found.group == self.groups[kind] else None

    def _keep(self, kind: str, jobs: Sequence["Job"], found: Tensor) -> None:
        group = self.groups[kind]
        if group is not None and jobs:
            kept = {key: held for key, held in self.run.memory.items() if key[0] != kind or held.group == group}
            self.run.memory = kept | {(kind, job): Held(group, part) for job, part in zip(
                jobs, found.chunk(len(jobs)), strict=True)}


def name_of(run: "BoundRun", job: "Job") -> str:
    """The same for the same job of another process; reads the condition's tensors."""
    return digest((job.cond, repr(job.patch), job.model is run.denoiser))


def saved(run: "BoundRun") -> dict[str, Tensor]:
    """A run's memory as named tensors."""
    return {f"{kind}.{key if isinstance(key, str) else name_of(run, key)}.{held.group}": held.tensor
            for (kind, key), held in run.memory.items()}


def loaded(tensors: Mapping[str, Tensor]) -> Memory:
    """What `saved` made tensors of."""
    found: dict[tuple[str, Any], Held] = {}
    for name, tensor in tensors.items():
        kind, job, group = name.split(".")
        found[kind, job] = Held(int(group), tensor)
    return found
