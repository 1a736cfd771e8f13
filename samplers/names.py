"""Samplers and schedules by name: ours, and those by which AUTOMATIC1111's web UI and ComfyUI know them.

Letter case, spaces, hyphens and underscores do not count, nor do a leading "k_" or "sample_" and ComfyUI's last "_gpu";
"++" is pp and " a" ancestral. A name may end in a schedule's, as the web UI's older ones do: "DPM++ 2M Karras".
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import NoReturn

from ella_kd.samplers.registry import COMPATIBLE_SCHEDULES, RANGE_SAMPLERS, SAMPLERS, SCHEDULES, Sampler, Schedule

__all__ = [
    "COMFYUI", "a1111_sampler", "a1111_schedule", "get_sampler", "get_schedule", "sampler_named", "schedule_named",
]

A1111_SAMPLERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "lms": "LMS",
    "restart": "Restart",
    "lcm": "LCM",
    "ddim": "DDIM",
    "ddim_cfg_pp": "DDIM CFG++",
    "uni_pc": "UniPC",
    "dpm_fast": "DPM fast",
    "dpm_adaptive": "DPM adaptive",
}
A1111_SCHEDULES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "normal": "Normal",
    "ddim_uniform": "DDIM",
    "beta": "Beta",
    "ays": "Align Your Steps",
    "gits": "Align Your Steps GITS",
    "beta_a1111": "Beta",
    "kl_optimal_a1111": "KL Optimal",
    "ays_a1111": "Align Your Steps",
}
"""The web UI's labels. Of two names with one label the first is read: ours; the web UI's own curve has `_a1111`."""

_OLDER_LABELS = {"Uniform": "normal"}  # k-diffusion's own grid, once the only one

COMFYUI = {
    name.replace("_paper", "").replace("_comfyui", ""): SAMPLERS[name].function
    for name in (
        "euler_cfg_pp", "euler_ancestral_cfg_pp", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_2m_paper_cfg_pp",
        "res_multistep_comfyui_cfg_pp", "gradient_estimation_cfg_pp",
    )
}
"""ComfyUI's CFG++ samplers by its names, with its meaning; its cfg is cond_scale, lambda."""


def get_sampler(name: str) -> Sampler:
    """The row of SAMPLERS or RANGE_SAMPLERS that `sampler_named` finds; ValueError where there is none, and where the
    name holds a schedule."""
    found, schedule = sampler_named(name)
    if schedule is not None:
        raise ValueError(f"{name!r} names a schedule too: give sampler {found!r} and schedule {schedule!r}")
    return {**SAMPLERS, **RANGE_SAMPLERS}[found]


def get_schedule(name: str) -> Schedule:
    """The row of SCHEDULES or COMPATIBLE_SCHEDULES that `schedule_named` finds; ValueError where there is none."""
    return {**SCHEDULES, **COMPATIBLE_SCHEDULES}[schedule_named(name)]


def sampler_named(text: str) -> tuple[str, str | None]:
    """Our names of the sampler and of the schedule that `text` says, None where it says no schedule.

    "DPM++ 2M SDE Karras" is ("dpmpp_2m_sde", "karras"), "k_euler_a" ("euler_ancestral", None). ValueError suggests the
    nearest names."""
    if isinstance(text, str) and text in SAMPLERS:
        return text, None
    key, known, schedules = _key(text), _samplers(), _schedules()
    if (sampler := _stripped(key, known)) is not None:
        return sampler, None
    for ending, schedule in schedules.items():
        if key.endswith(ending) and (sampler := _stripped(key.removesuffix(ending), known)) is not None:
            return sampler, schedule
    _refuse("sampler", text, known)


def schedule_named(text: str) -> str:
    """Our name of the schedule that `text` says; ValueError suggests the nearest names."""
    schedules = _schedules()
    if _key(text) not in schedules:
        _refuse("schedule", text, schedules)
    return schedules[_key(text)]


def a1111_sampler(name: str) -> str:
    """The web UI's label of a sampler of ours; its own name where the web UI has none."""
    return A1111_SAMPLERS.get(name, name)


def a1111_schedule(name: str) -> str:
    """The web UI's label of a schedule of ours; its own name where the web UI has none."""
    return A1111_SCHEDULES.get(name, name)


def _key(text: object) -> str:
    return re.sub(r"[\s_-]", "", str(text).casefold().replace("+", "p"))


def _samplers() -> dict[str, str]:
    shorter = {name: name.replace("_ancestral", "_a") for name in SAMPLERS}
    return _by_key((*SAMPLERS, *RANGE_SAMPLERS), shorter, A1111_SAMPLERS)


def _schedules() -> dict[str, str]:
    older = {name: label for label, name in _OLDER_LABELS.items()}
    return _by_key((*SCHEDULES, *COMPATIBLE_SCHEDULES), A1111_SCHEDULES, older)


def _by_key(names: Iterable[str], *labels: Mapping[str, str]) -> dict[str, str]:
    """Our names by what may be written for them; the first that claims a key has it."""
    known = {_key(name): name for name in names}
    for table in labels:
        for name, label in table.items():
            known.setdefault(_key(label), name)
    return known


def _stripped(key: str, known: Mapping[str, str]) -> str | None:
    key = key.removesuffix("gpu")
    found = (known.get(form) for form in (key, key.removeprefix("k"), key.removeprefix("sample")))
    return next((name for name in found if name is not None), None)


def _refuse(what: str, text: object, known: Mapping[str, str]) -> NoReturn:
    near = dict.fromkeys(known[key] for key in difflib.get_close_matches(_key(text), known, n=6, cutoff=0.4))
    *first, last = list(near)[:3] or [""]
    advice = f"did you mean {', '.join(first)}{' or ' * bool(first)}{last}?" if last else "`ella-kd samplers` lists all"
    raise ValueError(f"unknown {what} {text!r}: {advice}")
