"""A denoiser made ready for one run: conditions lifted and planned, and few network calls for every evaluation.

What depends on sigma is decided on the host, from the levels as numbers; nothing is read back from the device.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ella_kd.conditioning import Conditioning, Levels, Plan
from ella_kd.conditioning.base import Weight
from ella_kd.digests import digest
from ella_kd.models.context import Context
from ella_kd.models.devices import upload
from ella_kd.models.network import as_network
from ella_kd.models.patches import Patch
from ella_kd.models.reuse import Reuse
from ella_kd.reusing import Memory, loaded, network_at, saved
from ella_kd.samplers.model import Prediction

Conditions = Mapping[str, Conditioning]
Plans = dict[tuple[float, ...], Plan]  # by the timesteps that they are for


class Preconditioned(Protocol):
    """A network with what its noise schedule says: an `LDMDenoiser`."""

    inner_model: Any

    def sigma_to_t(self, sigma: Tensor) -> Tensor: ...

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class Branch:
    """One answer that a rule asks for.

    cond: the name of the condition among those of the call ("cond", "uncond", "image"). patch: what its rows change in
    the UNet. model: another denoiser than the guided one, which sees the same x, sigma and conditions.
    """

    cond: str = "cond"
    patch: Patch | None = None
    model: Preconditioned | None = None


COND, UNCOND = Branch("cond"), Branch("uncond")
"""The answers with the prompt and without it, as rules name them."""


class Job(NamedTuple):
    """One row of network work per sample."""

    cond: Conditioning
    patch: Patch | None
    model: Preconditioned


class Work(NamedTuple):
    """What an evaluation asks: the jobs of each network call, each branch as a weighted sum of answers, and where in
    the picture a job's answer counts: bool [h, w] on the CPU, None for everywhere."""

    calls: tuple[tuple[Job, ...], ...]
    sums: Mapping[Branch, list[tuple[Job, Weight]]]
    where: Mapping[Job, Tensor | None]


class Point(NamedTuple):
    """What a denoiser's schedule says of noise levels: sigma and scalings [1 or B, 1, 1, 1], t [1 or B] fp32."""

    sigma: Tensor
    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    t: Tensor


class Moments:
    """One denoiser at the noise levels of a run: its network, its schedule's numbers, the conditions planned for it.

    together: the levels are those of one call's rows, rather than of one call after another.
    """

    def __init__(self, model: Preconditioned, levels: Levels, together: bool, like: Tensor,
                 plans: Plans, leaves: Iterable[Conditioning]) -> None:
        self.network = as_network(model.inner_model)
        self.dtype = self.network.dtype or like.dtype
        sigma = torch.tensor(levels, dtype=like.dtype)  # on the CPU: nothing is read back from the device
        t = model.sigma_to_t(sigma)
        numbers = [c[:, None, None, None] for c in (sigma, *model.get_scalings(sigma))]
        rows = Point(*(upload(c, like.device) for c in (*numbers, t)))
        each = zip(*(number.split(1) for number in rows), strict=True)
        self.points: dict[Levels, Point] = {levels: rows} if together else {
            (level,): Point(*point) for level, point in zip(levels, each, strict=True)}
        times = tuple(t.tolist())
        if times not in plans:  # two denoisers of one schedule share it
            plans[times] = Plan(levels, rows.t, times)
        self.plan = plans[times]
        self.seen: dict[Conditioning, Conditioning] = {}
        for leaf in leaves:
            leaf.planned(self.plan)

    def context(self, cond: Conditioning, levels: Levels, t: Tensor) -> Context:
        """What a condition gives the network at these levels, [len(t)] rows."""
        if cond not in self.seen:
            self.seen[cond] = cond.map(lambda leaf: leaf.planned(self.plan))
        return self.seen[cond].at(levels)(t)


class BoundRun:
    """A denoiser bound to the conditions of one run: `bound(x, levels, scale=None) -> Prediction`.

    conditions: by name, lifted, each of one row or of as many as the batch. levels: every sigma of the run, planned
    together; empty where nobody knows them, and each level is planned as it comes. together: one network call for all
    the rows of an evaluation. This one answers `cond` alone; `GuidedRun` asks for what its rule wants.
    """

    def __init__(self, denoiser: Preconditioned, x: Tensor, levels: Levels, conditions: Conditions,
                 together: bool = True) -> None:
        check_x(x)
        self.denoiser, self.conditions, self.together = denoiser, conditions, together
        self.rows, self.size, self.like = len(x), (x.shape[2], x.shape[3]), x.new_empty(0)
        self.planned, self._known = levels, frozenset(levels)
        self._current: Levels = ()
        for name, condition in conditions.items():
            if condition.rows not in (1, self.rows):
                raise ValueError(f"{name} has {condition.rows} rows and the batch {self.rows}: give one row, or one "
                                 "per sample (conditioning.repeat(n) makes n samples of each prompt)")
        self.fixed = not any(condition.weights_vary for condition in conditions.values())
        # Of the planned levels, and of those of one call: each denoiser's moments, and the plans that they share.
        self._found: dict[bool, tuple[dict[Preconditioned, Moments], Plans]] = {True: ({}, {}), False: ({}, {})}
        self._works: dict[tuple[Branch, ...], Work] = {}
        self._repeated: dict[Conditioning, Conditioning] = {}
        self.memory: Memory = {}  # replaced, never changed

    @cached_property
    def digests(self) -> dict[str, str]:
        """What the run is made with, by name: `samplers.model.digests`."""
        found = {name: digest(condition) for name, condition in self.conditions.items()}
        network = self.denoiser.inner_model
        return {**found, "reuse": digest(network.how)} if isinstance(network, Reuse) else found

    def saved(self) -> dict[str, Tensor]:
        """What is kept of evaluations for later ones, as named tensors: `samplers.model.memory`."""
        return saved(self)

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Begins with what another run of the same kept, nothing if there is nothing."""
        self.memory = loaded(tensors)

    def prepare(self, levels: Levels) -> None:
        """Works out, before the loop, what the run asks at these of its levels. Raises what the evaluation would."""
        for level in levels:
            _, branches = self.asks((level,), None)
            for jobs in self._work(branches, (level,)).calls:
                self._at(jobs[0].model, (level,))

    def asks(self, levels: Levels, scale: float | None) -> tuple[Any, Mapping[Branch, Patch | None]]:
        """What `finish` is told, and the branches to evaluate, each with the patch of its rows."""
        if scale is not None:
            raise TypeError(f"{type(self.denoiser).__name__} has no guidance scale: put a CFGDenoiser around it")
        return None, {COND: None}

    def finish(self, told: Any, x: Tensor, sigma: Tensor, denoised: Mapping[Branch, Tensor]) -> Prediction:
        """The prediction made of the answers."""
        return Prediction(denoised[COND], denoised[COND])

    def __call__(self, x: Tensor, levels: float | Levels, scale: float | None = None,
                 only: Branch | None = None) -> Prediction:
        """x [B, C, h, w] fp32 or fp64; levels: the sigma of all rows, or one per row -> answers like x.

        scale: in place of the run's guidance scale. only: answer this branch alone, unguided. ValueError for x or
        levels that cannot be, TypeError for a scale that nothing takes.
        """
        if (len(x), *x.shape[2:]) != (self.rows, *self.size) or x.dtype != self.like.dtype:
            check_x(x)
            raise ValueError(f"this run is bound to {self.rows} latents of {self.size} in {self.like.dtype}, got x "
                             f"{list(x.shape)} {x.dtype}: bind the denoiser to x")
        levels = self._levels(x, levels)
        told, branches = self.asks(levels, scale) if only is None else (None, {only: only.patch})
        work = self._work(branches, levels)
        answers: dict[Job, Tensor] = {}
        for jobs in work.calls:
            moments = self._at(jobs[0].model, levels)
            point = moments.points[levels]
            n, dtype, t = len(jobs), moments.dtype, point.t.expand(len(x))
            context = Context.stack([moments.context(job.cond, levels, t) for job in jobs])
            _check_seen(context)
            patches = tuple((len(x), job.patch) for job in jobs) if any(job.patch for job in jobs) else ()
            x_in = x * point.c_in
            if n > 1:
                x_in, t = x_in.repeat(n, 1, 1, 1), t.repeat(n)
            network = moments.network.at(levels) if only else network_at(self, moments.network, levels, jobs)
            where = tuple(work.where[job] for job in jobs)
            parts = (where,) if any(area is not None for area in where) and hasattr(network, "takes_where") else ()
            out = network(x_in.to(dtype), t, context.to(dtype), patches, *parts)
            skipped = point.c_skip * x
            answers |= zip(jobs, (skipped + point.c_out * part for part in out.to(x.dtype).chunk(n)), strict=True)
        denoised = {branch: _sum([(answers[job], weight) for job, weight in terms])
                    for branch, terms in work.sums.items()}
        if only is not None:
            return Prediction(denoised[only], denoised[only])
        return self.finish(told, x, point.sigma.expand(len(x), 1, 1, 1), denoised)

    def _levels(self, x: Tensor, levels: float | Levels) -> Levels:
        levels = tuple(levels) if isinstance(levels, (tuple, list)) else (float(levels),)
        if len(levels) not in (1, len(x)):
            raise ValueError(f"levels must be one sigma, or one per sample, so {len(x)}, got {len(levels)}")
        return check_levels(levels[:1] if len(set(levels)) == 1 else levels)

    def _at(self, model: Preconditioned, levels: Levels) -> Moments:
        """A denoiser's moments, which are made for all the planned levels or, where these are others, for them."""
        planned = len(levels) == 1 and levels[0] in self._known
        if not planned and levels != self._current:
            self._current, self._found[False] = levels, ({}, {})
        moments, plans = self._found[planned]
        if model not in moments:
            leaves = [leaf for condition in self.conditions.values() for leaf in condition.leaves()]
            wanted = self.planned if planned else levels
            moments[model] = Moments(model, wanted, not planned, self.like, plans, leaves)
        return moments[model]

    def _work(self, branches: Mapping[Branch, Patch | None], levels: Levels) -> Work:
        key = tuple(branches)
        kept = self.fixed and all(branch.patch is patch for branch, patch in branches.items())  # no recorder
        if kept and key in self._works:
            return self._works[key]
        sums = {branch: [(Job(self.of_rows(cond), patch, branch.model or self.denoiser), weight)
                         for cond, weight in self._terms(branch.cond, levels)] for branch, patch in branches.items()}
        jobs = dict.fromkeys(job for terms in sums.values() for job, _ in terms)
        calls: list[tuple[Job, ...]] = []
        for model in dict.fromkeys(job.model for job in jobs):
            same = tuple(job for job in jobs if job.model is model)
            calls += [same] if self.together else [(job,) for job in same]
        where = {job: _where([w for terms in sums.values() for own, w in terms if own == job]) for job in jobs}
        there = {branch: [(job, self._there(weight)) for job, weight in terms] for branch, terms in sums.items()}
        work = Work(tuple(calls), there, where)
        if kept:
            self._works[key] = work
        return work

    def _terms(self, name: str, levels: Levels) -> list[tuple[Conditioning, Weight]]:
        terms: list[tuple[Conditioning, Weight]] = []
        for part, weight in self.conditions[name].terms(*self.size, levels):
            if part is not None:
                terms.append((part, weight))
            elif name == "uncond" or "uncond" not in self.conditions:
                advice = ("give Regions a background, or weights that sum to 1" if name == "uncond"
                          else 'pass uncond=t5("") to a guided denoiser')
                raise ValueError(f"the weights of {name} do not sum to 1 everywhere, the rest would be uncond's: "
                                 f"{advice}")
            else:
                terms += [(c, weight * w) for c, w in self._terms("uncond", levels)]
        return terms

    def _there(self, weight: Weight) -> Weight:
        return upload(weight.to(self.like.dtype), self.like.device) if isinstance(weight, Tensor) else weight

    def of_rows(self, cond: Conditioning) -> Conditioning:
        """The condition with as many rows as the batch."""
        if cond not in self._repeated:
            self._repeated[cond] = cond if cond.rows == self.rows else cond.repeat(self.rows)
        return self._repeated[cond]


def check_x(x: Tensor, sigma: Tensor | None = None) -> None:
    """Raises ValueError unless x is [B, C, h, w], fp32 or fp64, and sigma, where there is one, [B]."""
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64 [B, C, h, w], got {x.dtype} {list(x.shape)}: keep latents in "
                         "fp32, the network inside may be half")
    if sigma is not None and sigma.shape != x.shape[:1]:
        raise ValueError(f"sigma must have shape [{len(x)}], one per sample, got {list(sigma.shape)}")


def check_levels(levels: Levels) -> Levels:
    """The levels. Raises ValueError unless each is finite and above 0."""
    if not all(0 < level < math.inf for level in levels):
        raise ValueError(f"a denoiser needs finite sigmas above 0, got {list(levels)}")
    return levels


def _check_seen(context: Context) -> None:
    """A row without a token to see would be NaN; the mask is read on the CPU only, elsewhere that would wait."""
    mask = context.mask if context.mask is not None and context.mask.device.type == "cpu" else None
    if not context.tokens.shape[1] or (mask is not None and not bool(mask.any(1).all())):
        raise ValueError("the conditioning has a row without a token to see: a closed window without `otherwise` "
                         "belongs beside other tokens, Concat(ella, window(...)), and a mask needs one that is seen")


def _where(weights: list[Weight]) -> Tensor | None:
    """Where one of the weights of an answer is not 0, in any row: bool [h, w]; None for everywhere."""
    areas = [(weight.abs() > 1e-9).view(-1, *weight.shape[-2:]).any(0) for weight in weights
             if isinstance(weight, Tensor) and weight.shape[-2:] != (1, 1)]
    if len(areas) < len(weights):
        return None
    area = torch.stack(areas).any(0)
    return None if bool(area.all()) else area


def _sum(terms: list[tuple[Tensor, Weight]]) -> Tensor:
    if len(terms) == 1 and isinstance(terms[0][1], float) and terms[0][1] == 1.0:
        return terms[0][0]
    return torch.stack([answer * weight for answer, weight in terms]).sum(0)
