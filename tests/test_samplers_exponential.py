"""The samplers beyond k-diffusion's: their orders, moments of the stochastic ones, steps by hand and identities, and
what holds of every method (split runs, batches, short schedules)."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ella_kd.samplers import (
    DEIS,
    ERSDE,
    IPNDM,
    SEEDS2,
    SEEDS3,
    DPMpp2SAncestral,
    EulerAncestral,
    GradientEstimation,
    ResMultistepAncestral,
    SASolver,
    SASolverPECE,
    Solver,
    UniPC,
    get_sigmas_karras,
    sample,
    sample_er_sde,
    sample_exp_heun_2_x0,
    sample_gradient_estimation,
    sample_ipndm,
    sample_ipndm_v,
    sample_res_multistep,
    sample_res_multistep_ancestral,
    sample_sa_solver,
    sample_sa_solver_pece,
    sample_seeds_2,
)
from mixtures import Guided, Mixture, Pointwise, named, randn
from test_samplers_diffusers import ABOVE_ZERO, TO_ZERO, latents, one_step_at_a_time
from test_samplers_orders import measured_order
from test_samplers_parity import given_noise, relative

pytestmark = pytest.mark.usefixtures("float64")




def zero(sigma: float) -> float:
    return 0.0


def one(sigma: float) -> float:
    return 1.0


def identity(sigma: float) -> float:
    return sigma


DETERMINISTIC: list[tuple[Solver, float]] = [
    (UniPC(), 3.85),  # max_order and one more for the corrector
    (UniPC("bh2"), 3.87),
    (UniPC("bh1", 2), 3.00),
    (UniPC("bh2", 2), 3.00),
    (UniPC("bh2", 1), 1.99),
    (DEIS(), 2.73),
    (DEIS(2), 1.99),
    (DEIS(3, "vp_time"), 2.84),
    (DEIS(4, "sigma"), 2.90),  # ipndm_v; it falls to 2.25, the Euler start's, on still finer grids
    (IPNDM(), 2.00),  # the weights of an even grid on a Karras grid
    (GradientEstimation(), 0.97),
    (GradientEstimation(1.5), 1.98),
    (ResMultistepAncestral(eta=0.0), 2.01),
    (SEEDS2(eta=0.0), 1.99),
    (SEEDS2(eta=0.0, r=1.0, solver_type="phi_2"), 1.99),
    (SEEDS3(eta=0.0), 2.98),
    (SASolver(zero), 3.87),
    (SASolver(zero, corrector_order=3), 3.09),
    (SASolver(zero, corrector_order=0), 2.69),  # falls from 3.04 as the Euler start's error takes over
    (SASolver(zero, predictor_order=2, corrector_order=2, simple_order_2=True), 2.03),
    (SASolverPECE(zero), 3.83),
    (ERSDE(noise_scaler=identity, max_stage=2), 2.00),
    (ERSDE(noise_scaler=identity), 2.02),
    (ERSDE(noise_scaler=identity, corrected=True), 2.84),
]
STOCHASTIC: list[Solver] = [
    ResMultistepAncestral(),
    ResMultistepAncestral(eta=0.4, s_noise=0.9),
    SEEDS2(),
    SEEDS2(r=1.0, solver_type="phi_2"),
    SEEDS3(),
    SEEDS3(eta=0.4, s_noise=0.9),
    SASolver(one),
    SASolver(),
    SASolverPECE(one),
    ERSDE(),
    ERSDE(corrected=True),
]
SOLVERS = [solver for solver, _ in DETERMINISTIC] + STOCHASTIC


@pytest.mark.parametrize(("solver", "expected"), DETERMINISTIC, ids=named)
def test_order_as_measured(solver: Solver, expected: float, mixture: Mixture) -> None:
    assert measured_order(solver, mixture) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("solver", [
    UniPC(), DEIS(), IPNDM(), GradientEstimation(), ResMultistepAncestral(eta=0.0), SEEDS2(eta=0.0), SEEDS3(eta=0.0),
    SASolver(zero), SASolverPECE(zero), ERSDE(noise_scaler=identity),
], ids=named)
def test_the_order_stated_is_the_one_measured(solver: Solver, mixture: Mixture) -> None:
    assert solver.order == round(measured_order(solver, mixture))


# Identities


def test_seeds_2_without_noise_is_dpmpp_2s_and_exponential_heun(guided: Guided) -> None:
    sigmas = torch.tensor(TO_ZERO)
    two_s, _ = sample(DPMpp2SAncestral(eta=0.0), guided, latents(), sigmas, disable=True)
    assert relative(sample_seeds_2(guided, latents(), sigmas, disable=True, eta=0.0), two_s) <= 1e-13
    heun, _ = sample(SEEDS2(eta=0.0, r=1.0, solver_type="phi_2"), guided, latents(), sigmas, disable=True)
    assert torch.equal(sample_exp_heun_2_x0(guided, latents(), sigmas, disable=True), heun)


def test_one_exponential_heun_step_by_hand(guided: Guided) -> None:
    """x' = e^-h x + (phi_1 - phi_2) D + phi_2 D_2, phi_1 = 1 - e^-h, phi_2 = 1 - phi_1 / h."""
    s, t = 5.0, 2.0
    x, h = latents(s), math.log(s / t)
    first = guided(x, torch.full((2,), s))
    second = guided(t / s * x + (1 - t / s) * first, torch.full((2,), t))
    phi_1, phi_2 = 1 - t / s, 1 - (1 - t / s) / h
    expected = t / s * x + (phi_1 - phi_2) * first + phi_2 * second
    assert relative(sample_exp_heun_2_x0(guided, x, torch.tensor([s, t]), disable=True), expected) <= 1e-14


def test_er_sde_identities(guided: Guided) -> None:
    """With phi = sigma^2 and one stage it is the ancestral Euler step; with phi = sigma it adds no noise."""
    sigmas = torch.tensor(TO_ZERO)
    got = sample_er_sde(
        guided, latents(), sigmas, disable=True, noise_sampler=given_noise, noise_scaler=lambda s: s * s, max_stage=1
    )
    expected, _ = sample(EulerAncestral(), guided, latents(), sigmas, disable=True, noise_sampler=given_noise)
    assert relative(got, expected) <= 1e-13
    assert not any(step.noises for step in ERSDE(noise_scaler=identity).steps(TO_ZERO))
    first = sample_er_sde(guided, latents(), sigmas, disable=True, noise_scaler=identity, max_stage=1)
    assert relative(first, one_step_at_a_time(UniPC(), guided, latents(), TO_ZERO)) <= 1e-13


def test_er_sde_by_hand(guided: Guided) -> None:
    """Two steps with the integral written out: for phi = sigma^2, I_0 = 1/t - 1/s."""
    s0, s1, s2 = 5.0, 2.0, 0.6
    x = latents(s0)
    noise = [given_noise(torch.tensor(a), torch.tensor(b)) for a, b in ((s0, s1), (s1, s2))]
    d0 = guided(x, torch.full((2,), s0))
    r = (s1 / s0) ** 2
    x1 = r * x + (1 - r) * d0 + math.sqrt(s1**2 - s0**2 * r**2) * noise[0]
    d1 = guided(x1, torch.full((2,), s1))
    r = (s2 / s1) ** 2
    slope = (d1 - d0) / (s1 - s0)
    a_1 = s2 - s1 + s2**2 * (1 / s2 - 1 / s1)
    expected = r * x1 + (1 - r) * d1 + a_1 * slope + math.sqrt(s2**2 - s1**2 * r**2) * noise[1]
    got = sample_er_sde(
        guided, x, torch.tensor([s0, s1, s2]), disable=True, noise_sampler=given_noise, noise_scaler=lambda s: s * s
    )
    assert relative(got, expected) <= 1e-13


def test_one_pece_step_is_exponential_heun(guided: Guided) -> None:
    """At tau 0: exponential Euler, then the corrector of order 2 in log sigma, evaluated at both ends."""
    s, t = 5.0, 2.0
    x = latents(s)
    got = sample_sa_solver_pece(guided, x, torch.tensor([s, t]), disable=True, tau_func=zero)
    assert relative(got, sample_exp_heun_2_x0(guided, x, torch.tensor([s, t]), disable=True)) <= 1e-14


def test_deis_in_sigma_is_lms(guided: Guided) -> None:
    """k-diffusion's LMS integrates by scipy's quadrature to 1e-4, so that is not compared here to 1e-10."""
    from ella_kd.samplers.upstream import k_diffusion

    expected = k_diffusion().sampling.sample_lms(guided, latents(), torch.tensor(TO_ZERO), disable=True)
    got = sample(DEIS(4, "sigma"), guided, latents(), torch.tensor(ABOVE_ZERO), disable=True)[0]
    at_zero = guided(got, torch.full((2,), ABOVE_ZERO[-1]))
    records: list[Tensor] = []
    k_diffusion().sampling.sample_lms(
        guided, latents(), torch.tensor(TO_ZERO), None, lambda record: records.append(record["x"]), True
    )
    assert relative(got, records[-1]) <= 1e-10
    assert relative(sample_ipndm_v(guided, latents(), torch.tensor(TO_ZERO), disable=True), at_zero) <= 1e-12
    assert relative(at_zero, expected) > 1e-6  # k-diffusion goes to 0 at order 4, we at order 1


def test_on_an_even_grid_ipndm_is_adams_bashforth(guided: Guided) -> None:
    """Where the weights of an even grid are right, both equal; and gradient estimation at 1.5 is its second order."""
    sigmas = torch.linspace(6.0, 1.0, 11)
    even = sample_ipndm(guided, latents(6.0), sigmas, disable=True)
    assert relative(sample_ipndm_v(guided, latents(6.0), sigmas, disable=True), even) <= 1e-12
    second = sample_ipndm(guided, latents(6.0), sigmas, disable=True, max_order=2)
    estimated = sample_gradient_estimation(guided, latents(6.0), sigmas, disable=True, ge_gamma=1.5)
    assert relative(estimated, second) <= 1e-12


def test_gradient_estimation_by_hand(guided: Guided) -> None:
    s0, s1, s2 = 5.0, 2.0, 0.6
    x0 = latents(s0)
    d0 = (x0 - guided(x0, torch.full((2,), s0))) / s0
    x1 = x0 + (s1 - s0) * d0
    d1 = (x1 - guided(x1, torch.full((2,), s1))) / s1
    expected = x1 + (s2 - s1) * (2 * d1 - d0)
    assert relative(sample_gradient_estimation(guided, x0, torch.tensor([s0, s1, s2]), disable=True), expected) < 1e-14


def test_res_multistep_ancestral_at_eta_0_is_res_multistep(guided: Guided) -> None:
    sigmas = torch.tensor(TO_ZERO)
    expected = sample_res_multistep(guided, latents(), sigmas, disable=True)
    got = sample_res_multistep_ancestral(guided, latents(), sigmas, disable=True, eta=0.0)
    assert relative(got, expected) <= 1e-13


# Moments: data N(m, S) is carried to N(m, S + sigma^2) by every method, however much noise it adds.

M, S = 0.7, 0.25


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    s2 = sigma.view(-1, 1, 1, 1) ** 2
    return (S * x + s2 * M) / (S + s2)


@pytest.mark.parametrize("solver", [solver for solver in STOCHASTIC if "s_noise=0.9" not in str(solver)], ids=named)
def test_moments(solver: Solver) -> None:
    """Within 3 standard errors at the end of 120 steps."""
    sigmas = get_sigmas_karras(121, 0.05, 20.0)[:-1]
    x = M + randn(4, 1, 64, 64, seed=3) * math.sqrt(S + 400.0)
    out, _ = sample(solver, gaussian, x, sigmas, disable=True, seeds=[1, 2, 3, 4])
    variance = S + 0.05**2
    assert abs(float(out.mean()) - M) < 3 * math.sqrt(variance / out.numel())
    assert abs(float(out.var()) / variance - 1) < 3 * math.sqrt(2 / out.numel())


@pytest.mark.parametrize("solver", [ResMultistepAncestral(), SASolver(one), SASolver(), ERSDE()], ids=named)
def test_noise_is_exact_where_denoised_is_constant(solver: Solver) -> None:
    """The data are one point, so x stays m + sigma n: at every step the variance is sigma^2, without any error."""
    for c, (s, t) in zip(solver.steps(ABOVE_ZERO), pairwise(ABOVE_ZERO)):
        assert (c.weights.to_x * s) ** 2 + c.weights.up ** 2 == pytest.approx(t**2, rel=1e-12)


@pytest.mark.parametrize("solver", [SEEDS2(), SEEDS2(r=1.0), SEEDS3(), SEEDS3(eta=0.4)], ids=named)
def test_noise_of_seeds_is_exact_too(solver: Solver) -> None:
    """Each noise switched on alone: the weights' squares add up to the variance that x lacks, at the step's end."""
    s, t = 5.0, 2.0
    (c,) = solver.steps([s, t])

    def end(x: float, drawn: int | None) -> float:
        def noise(k: int) -> Tensor:
            return torch.full((1, 1, 1, 1), float(k == drawn))

        got, _ = solver.step(c, torch.full((1, 1, 1, 1), x), {}, lambda x, sigma: torch.zeros_like(x), noise)
        return float(got)

    variance = sum(end(0.0, k) ** 2 for k in range(len(c.noises)))
    assert end(s, None) ** 2 + variance == pytest.approx(t**2, rel=1e-12)


# What holds of every method


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_split_equals_whole_and_batch_equals_singles(solver: Solver) -> None:
    model, sigmas, seeds = Pointwise(), torch.tensor(TO_ZERO[:6]), [5, 2**62]
    x = latents().float()
    whole, end = sample(solver, model, x, sigmas, disable=True, seeds=seeds)
    for stop in range(1, 5):
        half, state = sample(solver, model, x, sigmas, disable=True, seeds=seeds, stop=stop)
        again, resumed = sample(solver, model, half, disable=True, state=state)
        assert torch.equal(again, whole)
        assert resumed.keys() == end.keys()
        assert all(torch.equal(resumed[key], end[key]) for key in end)
    for row, seed in enumerate(seeds):
        single, _ = sample(solver, model, x[row : row + 1].clone(), sigmas, disable=True, seeds=[seed])
        assert torch.equal(single[0], whole[row])


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_lambda_zero_is_the_base_method_on_uncond(solver: Solver, guided: Guided) -> None:
    sigmas = torch.tensor(TO_ZERO)
    got, _ = sample(
        solver, guided, latents(), sigmas, {"cond_scale": 0.0}, disable=True, cfg_pp=True, noise_sampler=given_noise
    )
    expected, _ = sample(solver, guided.uncond, latents(), sigmas, disable=True, noise_sampler=given_noise)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_without_its_history_a_step_is_first_order(solver: Solver, guided: Guided) -> None:
    """A run begun by another method: its state holds a schedule and a step, and no history of this one."""
    sigmas = torch.tensor([5.0, 2.0, 0.6, 0.2])
    state = {"sigmas": sigmas, "step": torch.tensor(2)}
    x = latents(0.6)
    got, _ = sample(solver, guided, x, disable=True, state=state, noise_sampler=given_noise)
    if isinstance(solver, SASolverPECE):  # whose first step is corrected, with its own two evaluations
        solver = SASolver(solver.tau)
    expected, _ = sample(solver, guided, x, sigmas[2:], disable=True, noise_sampler=given_noise)
    assert relative(got, expected) <= 1e-14


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
@pytest.mark.parametrize("sigmas", [[14.6, 0.0], [3.0, 0.5], [14.6, 0.03, 0.0]], ids=named)
def test_short_schedules(solver: Solver, sigmas: list[float], guided: Guided) -> None:
    x = latents(sigmas[0])
    before = x.clone()
    out, _ = sample(solver, guided, x, torch.tensor(sigmas), disable=True, seeds=[1, 2])
    assert out.isfinite().all()
    assert torch.equal(x, before)
    assert tuple(guided.seen) == solver.eval_sigmas(sigmas)


@pytest.mark.parametrize("solver", [solver for solver, _ in DETERMINISTIC], ids=named)
def test_inversion_and_back(solver: Solver, mixture: Mixture) -> None:
    up = get_sigmas_karras(200, 0.05, 10.0)[:-1].flip(0)
    x = mixture.means[1] + 0.3 * randn(1, 1, 3, 3)
    noisy, _ = sample(solver, mixture, x, up, disable=True)
    back, _ = sample(solver, mixture, noisy, up.flip(0), disable=True)
    assert float((back - x).abs().max()) < (0.06 if solver.order == 1 else 0.004)


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
    (lambda: GradientEstimation(math.nan), "gamma must be a finite number, got nan"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_options(make: Callable[[], Solver], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_functions_and_noise_on_the_way_up(guided: Guided) -> None:
    sigmas, ascending = torch.tensor(TO_ZERO), torch.tensor([0.1, 0.6, 3.0])
    with pytest.raises(ValueError, match=r"tau\(9.1\) must be a finite number >= 0, got -1"):
        sample_sa_solver(guided, latents(), sigmas, disable=True, tau_func=lambda sigma: -1.0)
    with pytest.raises(ValueError, match=r"noise_scaler must grow .* not at 9\.1"):
        sample_er_sde(guided, latents(), sigmas, disable=True, noise_scaler=lambda sigma: sigma**0.5)
    for solver in STOCHASTIC:
        with pytest.raises(ValueError, match="ascending"):
            sample(solver, guided, latents(0.1), ascending, disable=True)


def test_weights_are_those_of_a_thousand_steps_too() -> None:
    """No cancellation: on a fine even grid in log sigma the weights are those of the limit of small steps."""
    sigmas = np.geomspace(10.0, 1.0, 100_001)[:6].tolist()
    h = math.log(10.0) / 100_000
    *_, last = UniPC().steps(sigmas)
    b = np.array(last.weights.to_denoised[:3]) / h
    assert b == pytest.approx([23 / 12, -16 / 12, 5 / 12], rel=1e-4)
