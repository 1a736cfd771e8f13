"""Options of the methods that are refused."""

import math
from collections.abc import Callable

import pytest
import torch

from ella_kd.samplers import (
    DEIS,
    ERSDE,
    IPNDM,
    LCM,
    LMS,
    SEEDS2,
    SEEDS3,
    DPMpp2M,
    DPMpp3M,
    DPMppSDE,
    GradientEstimation,
    SASolver,
    Solver,
    UniPC,
    sample_er_sde,
    sample_sa_solver,
)
from mixtures import Guided
from oracles import TO_ZERO, latents

pytestmark = pytest.mark.usefixtures("float64")


BAD: list[tuple[Callable[[], Solver], str]] = [
    (lambda: UniPC(max_order=0), "max_order must be a whole number from 1 to 3, got 0"),
    (lambda: UniPC(max_order=4), "from 1 to 3, got 4"),
    (lambda: UniPC("bh3"), "'bh1' or 'bh2', got 'bh3'"),  # type: ignore[arg-type]
    (lambda: DEIS(max_order=5), "from 1 to 4, got 5"),
    (lambda: DEIS(max_order=2.0), "from 1 to 4, got 2.0"),  # type: ignore[arg-type]
    (lambda: DEIS(variable="t"), "'log_sigma' or 'sigma' or 'vp_time', got 't'"),  # type: ignore[arg-type]
    (lambda: IPNDM(max_order=True), "from 1 to 4, got True"),
    (lambda: SEEDS2(r=0.0), "r must be above 0 and not above 1, got 0.0"),
    (lambda: SEEDS2(solver_type="phi_3"), "'phi_1' or 'phi_2', got 'phi_3'"),  # type: ignore[arg-type]
    (lambda: SEEDS3(r_1=0.7), "0 < r_1 < r_2 < 1 must hold, got r_1 = 0.7"),
    (lambda: SASolver(predictor_order=0), "predictor_order must be a whole number from 1 to 4, got 0"),
    (lambda: SASolver(corrector_order=5), "corrector_order must be a whole number from 0 to 4, got 5"),
    (lambda: ERSDE(max_stage=4), "max_stage must be a whole number from 1 to 3, got 4"),
    (lambda: DPMppSDE(r=0.0), "r must be above 0 and at most 1, got 0.0"),
    (lambda: DPMppSDE(r=1.5), "at most 1"),
    (lambda: LMS(0), "a whole number of at least 1, got 0"),
    (lambda: LMS(2.0), "got 2.0"),  # type: ignore[arg-type]
    (lambda: LCM(s_noise=-1.0), "s_noise must be"),
    (lambda: DPMpp3M(eta=-1.0), "eta must be"),
    (lambda: DPMpp2M(solver_type="euler"), "'midpoint' or 'heun', got 'euler'"),  # type: ignore[arg-type]
    (lambda: GradientEstimation(math.nan), "gamma must be a finite number, got nan"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_options(make: Callable[[], Solver], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_functions(guided: Guided) -> None:
    sigmas = torch.tensor(TO_ZERO)
    with pytest.raises(ValueError, match=r"tau\(9.1\) must be a finite number >= 0, got -1"):
        sample_sa_solver(guided, latents(), sigmas, disable=True, tau_func=lambda sigma: -1.0)
    with pytest.raises(ValueError, match=r"noise_scaler must grow .* not at 9\.1"):
        sample_er_sde(guided, latents(), sigmas, disable=True, noise_scaler=lambda sigma: sigma**0.5)
