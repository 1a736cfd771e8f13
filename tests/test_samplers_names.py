"""Names by which other programs know samplers and schedules."""

import pytest

from ella_kd.samplers import SAMPLERS, SCHEDULES, a1111_sampler, a1111_schedule, get_sampler, get_schedule
from ella_kd.samplers.names import sampler_named, schedule_named

NAMES: list[tuple[str, str, str | None]] = [
    ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
    ("DPM++ 2M SDE Karras", "dpmpp_2m_sde", "karras"),
    ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
    ("DPM++ 2M SGM Uniform", "dpmpp_2m", "sgm_uniform"),
    ("dpm++ 2s a karras", "dpmpp_2s_ancestral", "karras"),
    ("Euler a", "euler_ancestral", None),
    ("DPM2 a", "dpm_2_ancestral", None),
    ("DPM2", "dpm_2", None),
    ("UniPC", "uni_pc", None),
    ("DDIM CFG++", "ddim_cfg_pp", None),
    ("k_euler", "euler", None),
    ("DPM adaptive", "dpm_adaptive", None),
    ("dpm_fast", "dpm_fast", None),
    ("k_dpmpp_2s_a", "dpmpp_2s_ancestral", None),
    ("sample_heun", "heun", None),
    ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde", None),
    ("euler_ancestral_cfg_pp", "euler_ancestral_cfg_pp", None),
]


@pytest.mark.parametrize(("text", "sampler", "schedule"), NAMES, ids=[text for text, *_ in NAMES])
def test_names_of_other_programs(text: str, sampler: str, schedule: str | None) -> None:
    assert sampler_named(text) == (sampler, schedule)
    if schedule is None:
        assert get_sampler(text).name == sampler
    else:
        with pytest.raises(ValueError, match=f"give sampler '{sampler}' and schedule '{schedule}'"):
            get_sampler(text)


def test_labels_lead_back() -> None:
    """Every name of ours finds itself, and so does the web UI's label for it, alone and before every schedule's."""
    for name in SAMPLERS:
        assert sampler_named(name) == sampler_named(a1111_sampler(name)) == (name, None)
        for schedule in SCHEDULES:
            assert sampler_named(f"{a1111_sampler(name)} {a1111_schedule(schedule)}") == (name, schedule)
    for schedule in SCHEDULES:
        assert schedule_named(schedule) == schedule_named(a1111_schedule(schedule)) == schedule
    assert get_schedule("Align Your Steps").name == "ays" and a1111_schedule("ays_a1111") == "Align Your Steps"
    assert a1111_sampler("euler_ancestral") == "Euler a" and a1111_sampler("er_sde") == "er_sde"


def test_unknown_names_suggest_three() -> None:
    with pytest.raises(ValueError, match=r"unknown sampler 'eular': did you mean euler, \w+ or \w+\?$"):
        get_sampler("eular")
    with pytest.raises(ValueError, match="unknown schedule 'caras': did you mean karras"):
        get_schedule("caras")
    with pytest.raises(ValueError, match="unknown sampler None: `ella-kd samplers` lists all"):
        get_sampler(None)  # type: ignore[arg-type]
