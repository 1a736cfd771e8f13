"""DPM-Solver-12 and -23 with adaptive steps: error control per sample, in a loop of its own.

The rows of a batch go on side by side, each with its own sigma, step size and controller, so that a sample does not
depend on its batch mates (k-diffusion takes one error norm over the batch). Rows that are done wait for the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ella_kd.samplers.checks import check_latents
from ella_kd.samplers.dpm_solver import stages
from ella_kd.samplers.model import Callback, Model, NoiseSampler, bind, check_answer, rounded
from ella_kd.samplers.noise import NormalNoise, check_seeds, like, random_seeds
from ella_kd.samplers.registry import RANGE_SAMPLERS, Seeds, range_of, sampler
from ella_kd.samplers.solver import ancestral_step, refuse_negative

__all__ = ["sample_dpm_adaptive"]

_CLOSE = 1e-5  # in log sigma: nearer than this to the end is there (k-diffusion)


@dataclass
class Row:
    """One sample's run: its place l = -log sigma, its next step h, and a PID controller (k-diffusion's)."""

    place: float
    h: float
    end: float
    powers: tuple[float, float, float]
    accept_safety: float
    errors: list[float] = field(default_factory=list)  # inverse ones: now, last accepted, the one before
    accepted: int = 0
    rejected: int = 0

    @property
    def active(self) -> bool:
        return (self.end - self.place) * math.copysign(1.0, self.h) > _CLOSE

    def target(self) -> float:
        return min(self.end, self.place + self.h) if self.h > 0 else max(self.end, self.place + self.h)

    def judge(self, error: float) -> bool:
        """Whether a step with this error is accepted; proposes the next h."""
        inverse = 1 / (error + 1e-8)
        self.errors = [inverse, *(self.errors[1:] or (inverse, inverse))]
        factor = 1 + math.atan(math.prod(e**p for e, p in zip(self.errors, self.powers)) - 1)
        accept = factor >= self.accept_safety
        if accept:
            self.errors = [inverse, inverse, self.errors[1]]
            self.accepted += 1
        else:
            self.rejected += 1
        self.h *= factor
        if abs(self.h) < 1e-9:
            raise ValueError(f"the step size fell to nothing at sigma {math.exp(-self.place):g}: loosen rtol and atol")
        return accept


@torch.no_grad()
def sample_dpm_adaptive(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    return_info: bool = False,
    *,
    seeds: Sequence[int] | None = None,
) -> Any:
    """DPM-Solver-12 or -23 (2206.00927, Appendix C) by `order`, 2 or 3: each step size from the difference of two
    embedded orders, for each sample by itself; `order` evaluations per try, each of the whole batch.

    x at sigma_max, [B, C, h, w]; returns x at sigma_min, above 0 (a sigma_min above sigma_max inverts). With
    return_info also dict(steps, nfe, n_accept, n_reject), a list with a value per row each.
    callback: after the evaluations of each try, with dict(x, i, sigma, sigma_hat, denoised, nfe, error, h, accepted):
    x before the step, nfe the model calls so far, sigma, sigma_hat, error, h and accepted [B]; rows that are done have
    error 0. A noise_sampler (eta above 0) is called for each accepted step of each row, which takes its own row.
    ValueError for bad options and for NaN or Inf from the model; TypeError for things of the wrong kind.
    """
    check_latents(x)
    low, high = (float(sigma) for sigma in (sigma_min, sigma_max))
    if not (0 < low < math.inf and 0 < high < math.inf and low != high):
        raise ValueError(f"sigma_min and sigma_max must be above 0, finite and not equal, got {low} and {high}")
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3, got {order!r}")
    refuse_negative(rtol=rtol, atol=atol, eta=eta, s_noise=s_noise)
    if not rtol + atol > 0 or not 0 < abs(h_init) < math.inf:
        raise ValueError(f"rtol or atol, and h_init, must be above 0, got {rtol}, {atol} and {h_init}")
    if low > high and eta:
        raise ValueError("an ascending range (inversion) cannot add noise: eta must be 0")
    if seeds is not None and noise_sampler is not None:
        raise ValueError("give seeds or a noise_sampler, not both: a noise_sampler has seeds of its own")
    noises = _noises(x, seeds, noise_sampler) if eta and s_noise else []

    span = 1.5 if eta else order
    powers = ((pcoeff + icoeff + dcoeff) / span, -(pcoeff + 2 * dcoeff) / span, dcoeff / span)
    h = math.copysign(abs(h_init), high - low)
    rows = [Row(-math.log(high), h, -math.log(low), powers, accept_safety) for _ in range(len(x))]
    bound = bind(model, x, None, extra_args=extra_args)
    x_prev, tries = x, 0
    with tqdm(disable=disable) as progress:
        while any(row.active for row in rows):
            plans = [_plan(row, order, eta) for row in rows]
            at, slopes = x, []
            for k in range(order):
                levels = tuple(rounded(plan.evals[k], x.dtype) for plan in plans)
                denoised = bound(at, levels).denoised
                check_answer("denoised", denoised, x)
                if k == 0:
                    first = denoised
                slopes.append((at - denoised) / x.new_tensor(levels).view(-1, 1, 1, 1))
                at = _stage(x, slopes, [plan.rows[k] for plan in plans])
            x_low = _stage(x, slopes, [plan.low for plan in plans])
            delta = torch.clamp(torch.maximum(x_low.abs(), x_prev.abs()) * rtol, min=atol)
            norms = [torch.linalg.norm(row) / row.numel() ** 0.5 for row in (x_low - at) / delta]  # row by row, bitwise
            errors = [error if row.active else 0.0 for error, row in zip(torch.stack(norms).tolist(), rows)]
            for error, row in zip(errors, rows):
                if not math.isfinite(error):
                    raise ValueError(
                        f"NaN or Inf from the model at try {tries} (sigma {math.exp(-row.place):g}); "
                        "a float16 network may have overflowed: try float32"
                    )
            places = x.new_tensor([math.exp(-row.place) for row in rows])
            accepted = [row.active and row.judge(error) for error, row in zip(errors, rows)]
            tries += 1
            progress.update(order)
            if callback is not None:
                record = {"x": x, "i": tries - 1, "sigma": places, "sigma_hat": places, "denoised": first}
                steps = x.new_tensor([row.h for row in rows])
                mask = torch.tensor(accepted, device=x.device)
                callback({**record, "nfe": tries * order, "error": x.new_tensor(errors), "h": steps, "accepted": mask})
            x, x_prev = _accept(x, at, accepted), _accept(x_prev, x_low, accepted)
            for k, (row, plan) in enumerate(zip(rows, plans)):
                if not accepted[k]:
                    continue
                if plan.up and noises:
                    s, t = (x.new_tensor(math.exp(-place)) for place in (row.place, plan.place))
                    x = torch.cat([x[:k], x[k : k + 1] + noises[k](s, t) * (plan.up * s_noise), x[k + 1 :]])
                row.place = plan.place
    if not return_info:
        return x
    info = {"n_accept": [row.accepted for row in rows], "n_reject": [row.rejected for row in rows]}
    tried = [row.accepted + row.rejected for row in rows]
    return x, {"steps": tried, "nfe": [order * n for n in tried], **info}


@dataclass
class _Plan:
    """A row's next try: where it goes, the noise there, and the tableau (`stages`) with its embedded lower order."""

    place: float
    up: float
    evals: tuple[float, ...]
    rows: list[list[float]]
    low: list[float]


def _plan(row: Row, order: int, eta: float) -> _Plan:
    s = math.exp(-row.place)
    if not row.active:
        return _Plan(row.place, 0.0, (s,) * order, [[0.0] * (k + 1) for k in range(order)], [0.0] * (order - 1))
    place = row.target()
    t = down = math.exp(-place)
    up = 0.0
    if eta:
        down = max(math.exp(-row.end), ancestral_step(s, t, eta)[0])
        up = math.sqrt(max(t**2 - down**2, 0.0))
    evals, rows = stages(s, down, order)
    return _Plan(place, up, evals, rows, stages(s, down, order - 1, r1=1 / 3)[1][-1])


def _stage(x: Tensor, slopes: Sequence[Tensor], weights: Sequence[Sequence[float]]) -> Tensor:
    """x + sum of weight * slope, each row with its own weights."""
    for slope, column in zip(slopes, zip(*weights, strict=True)):
        x = x + slope * x.new_tensor(column).view(-1, 1, 1, 1)
    return x


def _accept(old: Tensor, new: Tensor, accepted: Sequence[bool]) -> Tensor:
    return torch.where(torch.tensor(accepted, device=old.device).view(-1, 1, 1, 1), new, old)


def _noises(x: Tensor, seeds: Sequence[int] | None, sampler: NoiseSampler | None) -> list[NoiseSampler]:
    """A noise sampler per row, [1, C, h, w]."""
    if sampler is None:
        values = random_seeds(len(x)) if seeds is None else check_seeds(seeds, len(x))
        return [NormalNoise(x[k : k + 1], [seed]) for k, seed in enumerate(values)]
    return [lambda s, t, k=k: like(x, sampler(s, t))[k : k + 1] for k in range(len(x))]  # type: ignore[misc]


@sampler(None, "DPM-Solver", name="dpm_adaptive", order=3, table=RANGE_SAMPLERS)
def _dpm_adaptive(model: Model, x: Tensor, sigmas: Tensor, *args: Any, seeds: Seeds = None, **options: Any) -> Tensor:
    """dpm_adaptive over the range of a schedule, as in ComfyUI."""
    high, low = range_of(sigmas)
    denoised: Tensor = sample_dpm_adaptive(model, x, low, high, *args, seeds=seeds, **options)
    return denoised
