"""Orders of convergence as measured on the exact Gaussian mixture, and steps that must be exact."""

import numpy as np
import pytest
import torch

from ella_kd.samplers import (
    DPM2,
    SAMPLERS,
    DPMpp2M,
    DPMpp2SAncestral,
    Euler,
    EulerAncestral,
    Heun,
    Solver,
    get_sigmas_karras,
    sample,
)
from mixtures import Constant, Guided, Mixture, randn

pytestmark = pytest.mark.usefixtures("float64")

SIGMA_MIN, SIGMA_MAX = 0.05, 20.0
QUANTILES = np.linspace(0.03, 0.97, 12)
SLOPES = ("lms", "lms_cfg_pp")  # keep slopes, so the step to 0 is no mere D


def measured_order(solver: Solver, mixture: Mixture, counts: tuple[int, ...] = (160, 320, 640)) -> float:
    """Slope of log error against log n from sigma 20 to .05 (Karras grid, no jump to 0), against the exact flow."""
    start, end = (
        torch.tensor([mixture.quantile(u, s) for u in QUANTILES]).view(1, 1, 3, 4) for s in (SIGMA_MAX, SIGMA_MIN)
    )
    errors = []
    for n in counts:
        sigmas = get_sigmas_karras(n + 1, SIGMA_MIN, SIGMA_MAX)[:-1]
        x, _ = sample(solver, mixture, start, sigmas, disable=True)
        errors.append(float((x - end).pow(2).mean().sqrt()))
    return float(-np.polyfit(np.log(counts), np.log(errors), 1)[0])


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (Euler(), 1.00),
        (EulerAncestral(eta=0.0), 1.00),
        (Heun(), 2.01),
        (DPM2(), 2.01),
        (DPMpp2SAncestral(eta=0.0), 1.99),
        (DPMpp2M(), 2.01),
        (DPMpp2M(eta=0.0, solver_type="heun"), 2.01),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Solver) else str(value),
)
def test_order_as_measured(solver: Solver, expected: float, mixture: Mixture) -> None:
    assert measured_order(solver, mixture) == pytest.approx(expected, abs=0.2)
    assert solver.order == round(expected)


def test_the_flow_oracle_is_a_flow(mixture: Mixture) -> None:
    """d x / d sigma = (x - D) / sigma along a quantile: the oracle itself, by central difference."""
    u, sigma, h = 0.3, 1.3, 1e-5
    slope = (mixture.quantile(u, sigma + h) - mixture.quantile(u, sigma - h)) / (2 * h)
    x = torch.tensor(mixture.quantile(u, sigma)).view(1, 1, 1, 1)
    assert float((x - mixture(x, torch.tensor([sigma]))) / sigma) == pytest.approx(slope, rel=1e-7)


@pytest.mark.parametrize("name", SAMPLERS)
def test_constant_denoised_lands_exactly(name: str) -> None:
    target = randn(2, 3, 4, 5, seed=1)
    for n in (1, 2, 7):
        sigmas = get_sigmas_karras(n, 0.03, 14.6)
        x = randn(*target.shape, seed=2) * sigmas[0]
        landed = SAMPLERS[name].function(Constant(target), x, sigmas, disable=True)
        if name in SLOPES:
            torch.testing.assert_close(landed, target, rtol=0, atol=1e-13)
        else:
            assert torch.equal(landed, target)


UNEVEN = ("heunpp2", "restart")  # not the same number of evaluations at every step


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if not row.cfg_pp])
@pytest.mark.parametrize("sigmas", [[5.0, 2.0, 0.7, 0.0], [5.0, 2.0, 0.7, 0.1], [5.0, 0.0]], ids=str)
def test_eval_sigmas_and_evals_are_what_the_model_sees(name: str, sigmas: list[float], guided: Guided) -> None:
    row = SAMPLERS[name]
    row.function(guided, torch.ones(1, 1, 2, 2), torch.tensor(sigmas), disable=True)
    assert guided.seen == list(row.solver.eval_sigmas(sigmas)) == list(row.solver.eval_sigmas(torch.tensor(sigmas)))
    to_zero = 1 if sigmas[-1] == 0 else 0
    if name in UNEVEN:
        long = row.solver.steps(get_sigmas_karras(50, 0.03, 14.6).tolist())
        assert max(len(step.evals) for step in long) == row.solver.evals + (18 if name == "restart" else 0)
    else:
        assert len(guided.seen) == row.solver.evals * (len(sigmas) - 1 - to_zero) + to_zero
    (plan,) = guided.plans
    assert set(guided.seen) == set(plan)
    assert len(set(plan)) == len(plan)


def test_churn_shows_in_eval_sigmas(guided: Guided) -> None:
    sigmas = torch.tensor([5.0, 2.0, 0.7, 0.0])
    solver = Heun(s_churn=1.0, s_tmax=3.0)
    sample(solver, guided, torch.ones(1, 1, 2, 2), sigmas, disable=True)
    assert guided.seen == list(solver.eval_sigmas(sigmas)) == pytest.approx([5, 2, 2 * 4 / 3, 0.7, 0.7 * 4 / 3])


def test_float32_plan_is_bitwise_what_the_model_sees(guided: Guided) -> None:
    sigmas = get_sigmas_karras(6, 0.03, 14.6).float()
    sample(DPM2(), guided, torch.ones(1, 1, 2, 2, dtype=torch.float32), sigmas, disable=True)
    (plan,) = guided.plans
    assert set(guided.seen) == set(plan) == set(torch.tensor(plan).tolist())
