"""Whole trajectories beside diffusers' schedulers in float64, and a written reason wherever theirs differ."""

from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ella_kd import LDMDenoiser
from ella_kd.models import EDMSchedule
from ella_kd.samplers import (
    DPMpp2M,
    sample_deis,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_3m_sde,
    sample_euler,
    sample_res_multistep,
    sample_sa_solver,
    sample_uni_pc,
    sample_uni_pc_bh2,
)
from mixtures import Guided
from oracles import ABOVE_ZERO, TO_ZERO, given_noise, latents, one_step_at_a_time, relative

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:__array"),  # diffusers on NumPy 2
]

# diffusers: its schedulers walk in variance-preserving x, alpha x with alpha = 1 / sqrt(1 + sigma^2). They are given
# our sigmas in float64 and a model that predicts x0, so the arithmetic is the same and the tolerance is 1e-10.


def diffusers_run(
    scheduler: Any, model: Any, x: Tensor, sigmas: list[float], noise: list[Tensor] | None = None, **options: Any
) -> Tensor:
    n = len(sigmas) - 1
    scheduler.set_timesteps(n)
    scheduler.sigmas = torch.tensor(sigmas)
    scheduler.timesteps = torch.arange(n).flip(0)
    scheduler.set_begin_index(0)
    alphas = (1 + scheduler.sigmas**2).rsqrt()
    x = x * alphas[0]
    noises = iter(noise or [])
    for i, t in enumerate(scheduler.timesteps):
        denoised = model(x / alphas[i], scheduler.sigmas[i].expand(len(x)))
        options = {"variance_noise": next(noises)} if noise else options
        x = scheduler.step(denoised, t, x, **options).prev_sample
    result: Tensor = x / alphas[-1]
    return result


@pytest.mark.parametrize("sigmas", [TO_ZERO, ABOVE_ZERO, [14.6, 0.0], [14.6, 1.0]], ids=len)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_uni_pc_equals_diffusers(variant: Any, order: int, sigmas: list[float], guided: Guided) -> None:
    """diffusers' bh1 returns NaN at sigma 0 (0 times infinity); ours is D there, as for bh2."""
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type=variant, prediction_type="sample", lower_order_final=sigmas[-1] == 0
    )
    expected = diffusers_run(scheduler, guided, latents(), sigmas)
    got = sample_uni_pc(guided, latents(), torch.tensor(sigmas), disable=True, max_order=order, variant=variant)
    if variant == "bh1" and sigmas[-1] == 0:
        assert expected.isnan().all()
        return
    assert relative(got, expected) <= 1e-10
    if variant == "bh2":
        same = sample_uni_pc_bh2(guided, latents(), torch.tensor(sigmas), disable=True, max_order=order)
        assert torch.equal(same, got)


def test_uni_pc_without_lower_order_final_equals_diffusers(guided: Guided) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(solver_order=3, prediction_type="sample", lower_order_final=False)
    expected = diffusers_run(scheduler, guided, latents(), ABOVE_ZERO)
    got = sample_uni_pc_bh2(guided, latents(), torch.tensor(ABOVE_ZERO), disable=True, lower_order_final=False)
    assert relative(got, expected) <= 1e-10


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_equals_diffusers(order: int, guided: Guided) -> None:
    """diffusers' DEIS cannot step to sigma 0 (log 0), nor would it on fewer than 15 steps keep its order."""
    scheduler = diffusers.DEISMultistepScheduler(
        solver_order=order, prediction_type="sample", lower_order_final=False
    )
    expected = diffusers_run(scheduler, guided, latents(), ABOVE_ZERO)
    got = sample_deis(guided, latents(), torch.tensor(ABOVE_ZERO), disable=True, max_order=order)
    assert relative(got, expected) <= 1e-10


@pytest.mark.parametrize("sigmas", [TO_ZERO, ABOVE_ZERO], ids=len)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("sde", [False, True])
def test_dpmpp_2m_and_res_equal_diffusers(
    sde: bool, solver_type: Any, order: int, sigmas: list[float], guided: Guided
) -> None:
    """1e-6: diffusers rounds x to float32 at every step."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=order, solver_type=solver_type, prediction_type="sample", lower_order_final=False,
        algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++",
        final_sigmas_type="zero" if sigmas[-1] == 0 else "sigma_min",
    )
    noise = [given_noise(torch.tensor(s), torch.tensor(t)) for s, t in pairwise(sigmas)] if sde else None
    expected = diffusers_run(scheduler, guided, latents(), sigmas, noise)
    x, grid = latents(), torch.tensor(sigmas)
    if order == 1:
        got = one_step_at_a_time(DPMpp2M(eta=float(sde)), guided, x, sigmas)
    elif sde:
        got = sample_dpmpp_2m_sde(guided, x, grid, disable=True, solver_type=solver_type, noise_sampler=given_noise)
    else:
        function = sample_dpmpp_2m if solver_type == "midpoint" else sample_res_multistep
        got = function(guided, x, grid, disable=True)
    assert relative(got, expected) <= 1e-6


@pytest.mark.parametrize("sigmas", [TO_ZERO, ABOVE_ZERO], ids=len)
@pytest.mark.parametrize("sde", [False, True])
def test_dpmpp_3m_equals_diffusers_without_noise(sde: bool, sigmas: list[float], guided: Guided) -> None:
    """And not with noise: there diffusers' weight of the second difference is (1 - e^-H - H) / H^2 - 1/2 with H = 2 h,
    where it is + 1/2 without noise and in k-diffusion; it tends to -1, not to 0, as steps grow smaller."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=3, solver_type="heun", prediction_type="sample", lower_order_final=False,
        algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++",
        final_sigmas_type="zero" if sigmas[-1] == 0 else "sigma_min",
    )
    noise = [given_noise(torch.tensor(s), torch.tensor(t)) for s, t in pairwise(sigmas)] if sde else None
    expected = diffusers_run(scheduler, guided, latents(), sigmas, noise)
    got = sample_dpmpp_3m_sde(
        guided, latents(), torch.tensor(sigmas), disable=True, eta=float(sde), noise_sampler=given_noise
    )
    assert relative(got, expected) > 0.1 if sde else relative(got, expected) <= 1e-6


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (2, 2), (3, 3), (3, 4), (4, 4), (4, 2)])
def test_sa_solver_equals_diffusers(predictor: int, corrector: int, tau: float, guided: Guided) -> None:
    """diffusers' SA-Solver always takes appendix D's weights where the order is 2, which every run passes through; it
    has no step to sigma 0 (infinite lambda), and lowers the order at the end by default."""
    scheduler = diffusers.SASolverScheduler(
        predictor_order=predictor, corrector_order=corrector, prediction_type="sample",
        tau_func=lambda t: torch.tensor(tau), lower_order_final=False,
    )
    expected = diffusers_run(scheduler, guided, latents(), ABOVE_ZERO, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    got = sample_sa_solver(
        guided, latents(), torch.tensor(ABOVE_ZERO), disable=True, tau_func=lambda sigma: tau, simple_order_2=True,
        noise_sampler=lambda s, t: torch.randn(2, 3, 5, 3, generator=generator),
        predictor_order=predictor, corrector_order=corrector,
    )
    assert relative(got, expected) <= 1e-10


# EDM Euler and EDM DPM++ 2M are Euler and 2M on a denoiser with a sigma_data


class Network(torch.nn.Module):
    """F of EDM's preconditioning, with some use of t and context."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return torch.tanh(1.5 * x + t.view(-1, 1, 1, 1)) + context.mean()


def edm_run(
    scheduler: Any, network: Network, x: Tensor, sigmas: list[float], context: Tensor, **options: Any
) -> Tensor:
    n = len(sigmas) - 1
    scheduler.set_timesteps(n)
    scheduler.sigmas = torch.tensor(sigmas)
    scheduler.timesteps = scheduler.precondition_noise(scheduler.sigmas[:-1])
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.expand(len(x)), context)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "sde"])
def test_edm_equals_diffusers(method: str, sigma_data: float) -> None:
    """1e-6: our t is float32, and diffusers' Euler rounds x to float32 at every step."""
    sigmas, context = [40.0, *TO_ZERO], torch.full((1, 2, 3), 0.1)
    network, x = Network(), latents(40.0)
    denoiser = LDMDenoiser(network, EDMSchedule(sigma_data=sigma_data))
    assert denoiser.sigma_data == sigma_data
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    grid, args = torch.tensor(sigmas), {"cond": context}
    if method == "euler":
        scheduler: Any = diffusers.EDMEulerScheduler(sigma_data=sigma_data)
        got = sample_euler(denoiser, x, grid, args, disable=True)
    else:
        scheduler = diffusers.EDMDPMSolverMultistepScheduler(
            sigma_data=sigma_data, solver_type="heun" if method == "heun" else "midpoint", lower_order_final=False,
            algorithm_type="sde-dpmsolver++" if method == "sde" else "dpmsolver++",
        )
        if method == "sde":
            got = sample_dpmpp_2m_sde(
                denoiser, x, grid, args, disable=True,
                noise_sampler=lambda s, t: torch.randn(2, 3, 5, 3, generator=generators[0]),
            )
        else:
            got = (sample_dpmpp_2m if method == "midpoint" else sample_res_multistep)(
                denoiser, x, grid, args, disable=True
            )
    options = {"generator": generators[1]} if method in ("euler", "sde") else {}
    assert relative(got, edm_run(scheduler, network, x, sigmas, context, **options)) <= 1e-6


def test_loss_of_an_edm_denoiser_is_zero_where_the_network_is_right() -> None:
    """Its unit is the network's: the error of denoised over c_out, squared."""
    denoiser = LDMDenoiser(Network(), EDMSchedule())
    x, noise, sigma, context = latents(0.5), latents(1.0).flip(0), torch.tensor([0.3, 2.0]), torch.full((1, 2, 3), 0.1)
    s = sigma.view(-1, 1, 1, 1)
    error = denoiser(x + s * noise, sigma, cond=context) - x
    expected = (error / denoiser.get_scalings(s)[1]).square().flatten(1).mean(1)
    torch.testing.assert_close(denoiser.loss(x, noise, sigma, context), expected)
