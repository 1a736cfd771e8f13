"""A strength is the same noise level on every schedule, or what another program means by it."""

import pytest
import torch

from ella_kd import NoiseSchedule
from ella_kd.pictures.start import sigmas_by_strength, sigmas_from
from ella_kd.samplers import SCHEDULES

SD15 = NoiseSchedule.sd15()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_part_of_any_schedule(schedule: str) -> None:
    """As many steps as asked, from the level itself down, strictly, to 0; the rest are the schedule's own levels."""
    for sigma in (0.3, 0.6, 1.4, 9.0):
        sigmas = sigmas_from(schedule, 7, SD15, sigma)
        assert len(sigmas) == 8 and sigmas[-1] == 0 and bool((sigmas.diff() < 0).all())
        assert float(sigmas[0]) == pytest.approx(sigma)
    whole = SCHEDULES[schedule].sigmas(7, SD15)
    assert torch.equal(sigmas_from(schedule, 7, SD15, 99.0), whole)
    assert torch.equal(sigmas_by_strength(schedule, 7, SD15, 1.0), whole)
    half = sigmas_by_strength(schedule, 7, SD15, 0.5)
    assert float(half[0]) == pytest.approx(float(SD15.t_to_sigma(torch.tensor(499.5).double())))


@pytest.mark.parametrize(("convention", "karras", "normal", "steps"), [
    ("diffusers", 1.09, 1.48, 10), ("a1111", 1.48, 1.77, 11), ("comfyui", 1.18, 1.55, 20), ("level", 1.61, 1.61, 20)])
def test_what_others_mean_by_half(convention: str, karras: float, normal: float, steps: int) -> None:
    for schedule, first in (("karras", karras), ("normal", normal)):
        sigmas = sigmas_by_strength(schedule, 20, SD15, 0.5, convention)  # type: ignore[arg-type]
        assert len(sigmas) == steps + 1
        assert float(sigmas[0]) == pytest.approx(first, abs=0.006)
    assert len(sigmas_by_strength("karras", 50, SD15, 0.58, "diffusers")) == 28 + 1  # int(50 * .58), as they truncate


def test_refusals() -> None:
    for strength, convention, what in ((0.0, "level", "above 0"), (1.5, "level", "at most 1"), (0.5, "webui", "choose"),
                                       (0.01, "diffusers", "no step"), (1e-9, "level", "nothing to do")):
        with pytest.raises(ValueError, match=what):
            sigmas_by_strength("karras", 20, SD15, strength, convention)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fewer steps"):
        sigmas_from("ddim_uniform", 20, SD15, 0.05)  # of whole timesteps there are three below
    with pytest.raises(ValueError, match="sigma_min"):
        sigmas_from("karras", 20, SD15, 0.01)
