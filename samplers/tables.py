"""SAMPLERS and SCHEDULES: every sampler and schedule by name, with what is known of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from ella_kd.samplers import functions, schedules
from ella_kd.samplers.dpmpp import DPMpp2M, DPMpp2SAncestral
from ella_kd.samplers.euler import Euler, EulerAncestral
from ella_kd.samplers.second_order import DPM2, Heun
from ella_kd.samplers.solver import Solver


@dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS. `function` is the public sample_*, `solver` the method with that function's defaults."""

    name: str
    function: Callable[..., Tensor]
    solver: Solver
    family: str
    cfg_pp: bool = False

    @property
    def order(self) -> int:
        """Order of convergence of the deterministic form."""
        return self.solver.order

    @property
    def evals(self) -> int:
        """Model evaluations per step."""
        return self.solver.evals

    @property
    def stochastic(self) -> bool:
        """Whether it adds noise with the default options."""
        return bool(self.solver.steps((2.0, 1.0))[0].noises)


@dataclass(frozen=True)
class Schedule:
    """A row of SCHEDULES. `function` is the public get_sigmas_*; `sigmas(n, model)` calls it with what it needs of a
    denoiser (sigma_min, sigma_max, sigmas) and returns [n + 1] on the CPU."""

    name: str
    function: Callable[..., Tensor]
    sigmas: Callable[[int, Any], Tensor]
    description: str


def _sampler(name: str, solver: Solver, family: str, cfg_pp: bool = False) -> Sampler:
    return Sampler(name, getattr(functions, f"sample_{name}"), solver, family, cfg_pp)


def _ranged(name: str, description: str) -> Schedule:
    function = getattr(schedules, f"get_sigmas_{name}")
    return Schedule(name, function, lambda n, model: function(n, model.sigma_min, model.sigma_max), description)


SAMPLERS: dict[str, Sampler] = {
    row.name: row
    for row in (
        _sampler("euler", Euler(), "Euler"),
        _sampler("euler_ancestral", EulerAncestral(), "Euler"),
        _sampler("heun", Heun(), "Heun (EDM)"),
        _sampler("dpm_2", DPM2(), "DPM-Solver"),
        _sampler("dpmpp_2s_ancestral", DPMpp2SAncestral(), "DPM-Solver++"),
        _sampler("dpmpp_2m", DPMpp2M(), "DPM-Solver++"),
        _sampler("dpmpp_2m_sde", DPMpp2M(eta=1.0), "DPM-Solver++"),
        _sampler("euler_cfg_pp", Euler(), "Euler", cfg_pp=True),
        _sampler("euler_ancestral_cfg_pp", EulerAncestral(), "Euler", cfg_pp=True),
        _sampler("dpmpp_2m_cfg_pp", DPMpp2M(), "DPM-Solver++", cfg_pp=True),
    )
}

SCHEDULES: dict[str, Schedule] = {
    row.name: row
    for row in (
        _ranged("karras", "even in sigma^(1/7), Karras et al. 2022"),
        _ranged("exponential", "even in log sigma"),
        Schedule("normal", schedules.get_sigmas_normal, schedules.get_sigmas_normal, "even in the model's timestep"),
        Schedule(
            "ays",
            schedules.get_sigmas_ays,
            lambda n, model: schedules.get_sigmas_ays(n),
            "Align Your Steps, ten nodes optimised for SD1.5",
        ),
    )
}

Row = TypeVar("Row")


def get_sampler(name: str) -> Sampler:
    """The row of SAMPLERS of that name; ValueError names the nearest ones where there is none."""
    return _lookup(SAMPLERS, name, "sampler")


def get_schedule(name: str) -> Schedule:
    """The row of SCHEDULES of that name; ValueError names the nearest ones where there is none."""
    return _lookup(SCHEDULES, name, "schedule")


def _lookup(table: Mapping[str, Row], name: str, what: str) -> Row:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=3, cutoff=0.4)
    advice = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(table)}"
    raise ValueError(f"unknown {what} {name!r}: {advice}")
