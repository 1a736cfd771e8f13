"""Steps written out by hand, identities between methods, and weights that must be exact."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ella_kd.samplers import (
    DEIS,
    ERSDE,
    LMS,
    SAMPLERS,
    SEEDS2,
    Heun,
    UniPC,
    get_sigmas_karras,
    sample,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_sde,
    sample_er_sde,
    sample_euler,
    sample_exp_heun_2_x0,
    sample_gradient_estimation,
    sample_heunpp2,
    sample_ipndm,
    sample_ipndm_v,
    sample_lcm,
    sample_lms,
    sample_res_multistep,
    sample_res_multistep_ancestral,
    sample_restart,
    sample_sa_solver_pece,
    sample_seeds_2,
)
from ella_kd.samplers.multistep import integrate
from ella_kd.samplers.upstream import k_diffusion
from mixtures import Guided, Mixture, randn
from oracles import ABOVE_ZERO, TO_ZERO, given_noise, identity, latents, one_step_at_a_time, relative, zero

pytestmark = pytest.mark.usefixtures("float64")


HEUN_2M = partial(sample_dpmpp_2m_sde, eta=0.0, solver_type="heun")
IDENTITIES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "res_multistep is 2M heun": (sample_res_multistep, HEUN_2M),
    "2M is 2M SDE at eta 0": (sample_dpmpp_2m, partial(sample_dpmpp_2m_sde, eta=0.0)),
    "2S is SDE at eta 0": (partial(sample_dpmpp_2s_ancestral, eta=0.0), partial(sample_dpmpp_sde, eta=0.0, r=0.5)),
    "DDIM is Euler": (sample_ddim, sample_euler),
    "LMS of one slope is Euler": (partial(sample_lms, order=1), sample_euler),
    "SEEDS-2 at eta 0 is 2S": (partial(sample_seeds_2, eta=0.0), partial(sample_dpmpp_2s_ancestral, eta=0.0)),
    "RES ancestral at eta 0 is RES": (partial(sample_res_multistep_ancestral, eta=0.0), sample_res_multistep),
    "DDPM is DDIM at eta 1": (partial(sample_ddpm, noise_sampler=given_noise),
                              partial(sample_ddim, eta=1.0, noise_sampler=given_noise)),
    "ER-SDE with sigma^2 is Euler ancestral": (
        partial(sample_er_sde, noise_sampler=given_noise, noise_scaler=lambda s: s * s, max_stage=1),
        partial(SAMPLERS["euler_ancestral"].function, noise_sampler=given_noise),
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("end", [0.0, 0.05])
def test_two_names_of_one_method_agree(name: str, end: float, guided: Guided) -> None:
    one, other = IDENTITIES[name]
    sigmas = get_sigmas_karras(9, 0.05, 14.6)
    sigmas = sigmas if end == 0 else sigmas[:-1]
    x, args = latents(), {"cond_scale": 3.0}
    assert relative(one(guided, x, sigmas, args, disable=True), other(guided, x, sigmas, args, disable=True)) < 1e-12


DETERMINISTIC = [name for name, row in SAMPLERS.items() if not row.stochastic and not row.cfg_pp]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_gaussian_scales_with_its_noise(name: str) -> None:
    """Data N(0, S): the denoised is S x / (S + sigma^2), so twice the noise on twice the data is twice the picture."""

    def gaussian(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, sigma: scale**2 * x / (scale**2 + sigma.view(-1, 1, 1, 1) ** 2)

    sigmas = get_sigmas_karras(7, 0.05, 10.0)
    x = randn(2, 1, 4, 4) * 10
    sample = SAMPLERS[name].function
    one = sample(gaussian(0.7), x, sigmas, disable=True)
    twice = sample(gaussian(1.4), 2 * x, 2 * sigmas, disable=True)
    torch.testing.assert_close(twice, 2 * one, rtol=1e-10, atol=1e-12)


def test_lms_weights_are_exact_integrals() -> None:
    sigmas, s, t = [14.6, 9.1, 4.2, 2.2, 1.1], 2.2, 1.1
    nodes, weights = sigmas[3::-1], LMS().slope_weights(3, sigmas)
    for power in range(4):
        exact = (t ** (power + 1) - s ** (power + 1)) / (power + 1)
        assert sum(w * node**power for w, node in zip(weights, nodes)) == pytest.approx(exact, rel=1e-12)


class Eps:
    """The mixture as diffusers sees it: eps from the variance-preserving x / sqrt(1 + sigma^2)."""

    def __init__(self, scheduler: Any) -> None:
        alphas = scheduler.alphas_cumprod.double()
        self.sigmas = ((1 - alphas) / alphas).sqrt()

    def __call__(self, x: Tensor, t: int) -> Tensor:
        sigma = self.sigmas[t]
        x = x * (1 + sigma**2).sqrt()
        return (x - Mixture()(x, sigma.expand(len(x)))) / sigma


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_and_ddpm_equal_diffusers(eta: float) -> None:
    """In their coordinates, from the same noise; 1e-5, since their alphas are float32."""
    kind: Any = diffusers.DDPMScheduler if eta == 1 else diffusers.DDIMScheduler
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    options: dict[str, Any] = {**betas, "clip_sample": False}
    scheduler = kind(1000, **options, timestep_spacing="leading", **({} if eta == 1 else {"set_alpha_to_one": True}))
    scheduler.set_timesteps(10)
    eps, timesteps = Eps(scheduler), [int(t) for t in scheduler.timesteps]
    sigmas = torch.cat([eps.sigmas[timesteps], torch.zeros(1)])
    noises = {float(s): randn(2, 1, 3, 3, seed=i) for i, s in enumerate(sigmas)}
    x = theirs = randn(2, 1, 3, 3, seed=50)
    calls = iter(noises.values())
    with pytest.MonkeyPatch.context() as patch:
        if eta == 1:
            name = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
            patch.setattr(name, lambda *args, **kwargs: next(calls))
        for t in timesteps:
            extra: dict[str, Any] = {} if eta == 1 else {"eta": eta, "variance_noise": next(calls) if eta else None}
            theirs = scheduler.step(eps(theirs, t), t, theirs, **extra).prev_sample
    function: Any = sample_ddpm if eta == 1 else sample_ddim
    got = function(
        Mixture(),
        x * (1 + sigmas[0] ** 2).sqrt(),
        sigmas,
        disable=True,
        noise_sampler=lambda s, t: noises[float(s)],
        **({} if eta == 1 else {"eta": eta}),
    )
    if eta == 1:  # its last step adds the noise of t = 0, which is none
        assert scheduler.config.variance_type == "fixed_small"
    assert relative(got, theirs) < 1e-5


def test_lcm_by_hand(guided: Guided) -> None:
    sigmas = torch.tensor([14.6, 2.0, 0.4, 0.0])
    x = latents(float(sigmas[0]))
    got = sample_lcm(guided, x, sigmas, disable=True, noise_sampler=given_noise)
    for s, t in pairwise(sigmas):
        x = guided(x, s.expand(2)) + t * given_noise(s, t)
    assert relative(got, x) < 1e-15
    with pytest.raises(ValueError, match="ascending"):
        sample_lcm(guided, x, sigmas[:-1].flip(0), disable=True)


@pytest.mark.parametrize("end", [0.0, 0.1])
def test_heunpp2_by_hand(end: float, guided: Guided) -> None:
    """Three steps: three slopes, then two, then Euler."""
    s0, s1, s2, s3 = 10.0, 3.0, 1.0, end
    x0 = latents(s0)

    def d(x: Tensor, sigma: float) -> Tensor:
        return (x - guided(x, torch.full((2,), sigma))) / sigma

    d1 = d(x0, s0)
    at = x0 + (s1 - s0) * d1
    d2 = d(at, s1)
    d3 = d(at + (s2 - s1) * d2, s2)
    w2, w3 = s1 / (3 * s0), s2 / (3 * s0)
    x1 = x0 + (s1 - s0) * ((1 - w2 - w3) * d1 + w2 * d2 + w3 * d3)
    d1 = d(x1, s1)
    d2 = d(x1 + (s2 - s1) * d1, s2)
    w2 = s2 / (2 * s0)
    x2 = x1 + (s2 - s1) * ((1 - w2) * d1 + w2 * d2)
    x3 = x2 + (s3 - s2) * d(x2, s2)
    got = sample_heunpp2(guided, x0, torch.tensor([s0, s1, s2, s3]), disable=True)
    assert relative(got, x3) < 1e-13


@pytest.mark.parametrize("times", [1, 2])
def test_restart_is_heun_in_pieces(times: int, guided: Guided) -> None:
    """Down to the sigma nearest .1, up to the one nearest 2 with noise, down a Karras grid of ten sigmas, and on."""
    sigmas = torch.tensor(TO_ZERO)
    x = start = latents(float(sigmas[0]))
    low, high = 6, 3  # 0.2 and 2.2
    x, _ = sample(Heun(), guided, x, sigmas[: low + 1], disable=True)
    for _ in range(times):
        x = x + given_noise(sigmas[low], sigmas[high]) * (sigmas[high] ** 2 - sigmas[low] ** 2).sqrt()
        grid = get_sigmas_karras(10, float(sigmas[low]), float(sigmas[high]))[:-1]
        x, _ = sample(Heun(), guided, x, grid, disable=True)
    x, _ = sample(Heun(), guided, x, sigmas[low:], disable=True)
    before = len(guided.seen)
    options: dict[str, Any] = {"restart_list": {0.15: [10, times, 2.0]}, "noise_sampler": given_noise}
    got = sample_restart(guided, start, sigmas, disable=True, **options)
    assert relative(got, x) <= 1e-10
    assert len(guided.seen) == 2 * before == 2 * (15 + 18 * times)


def test_restart_leaves_out_what_the_schedule_does_not_cover(guided: Guided) -> None:
    for sigmas in ([14.6, 0.0], [0.03, 0.2, 1.1, 4.2], [14.6, 9.0, 5.0], [14.6, 3.0, 0.0]):
        x = latents(sigmas[0])
        heun, _ = sample(Heun(), guided, x, torch.tensor(sigmas), disable=True)
        far = sample_restart(guided, x, torch.tensor(sigmas), disable=True, restart_list={0.1: [4, 1, 0.11]})
        assert torch.equal(far, heun)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        sample_restart(guided, latents(1.0), torch.tensor([2.0, 1.0]), restart_list={2.0: [4, 1, 1.0]})


def test_one_exponential_heun_step_by_hand(guided: Guided) -> None:
    """x' = e^-h x + (phi_1 - phi_2) D + phi_2 D_2, phi_1 = 1 - e^-h, phi_2 = 1 - phi_1 / h."""
    s, t = 5.0, 2.0
    x, h = latents(s), math.log(s / t)
    first = guided(x, torch.full((2,), s))
    second = guided(t / s * x + (1 - t / s) * first, torch.full((2,), t))
    phi_1, phi_2 = 1 - t / s, 1 - (1 - t / s) / h
    expected = t / s * x + (phi_1 - phi_2) * first + phi_2 * second
    assert relative(sample_exp_heun_2_x0(guided, x, torch.tensor([s, t]), disable=True), expected) <= 1e-14


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


def test_weights_are_those_of_a_thousand_steps_too() -> None:
    """No cancellation: on a fine even grid in log sigma the weights are those of the limit of small steps."""
    sigmas = np.geomspace(10.0, 1.0, 100_001)[:6].tolist()
    h = math.log(10.0) / 100_000
    *_, last = UniPC().steps(sigmas)
    b = np.array(last.weights.to_denoised[:3]) / h
    assert b == pytest.approx([23 / 12, -16 / 12, 5 / 12], rel=1e-4)


def test_er_sde_without_noise_is_exponential(guided: Guided) -> None:
    assert not any(step.noises for step in ERSDE(noise_scaler=identity).steps(TO_ZERO))
    first = sample_er_sde(guided, latents(), torch.tensor(TO_ZERO), disable=True, noise_scaler=identity, max_stage=1)
    assert relative(first, one_step_at_a_time(UniPC(), guided, latents(), TO_ZERO)) <= 1e-13


@pytest.mark.parametrize("H", [1e-5, 1e-3, 9.9e-3, 1.01e-2, 0.3, 6.0, -2e-3, -0.5])
def test_phi_2_is_its_integral_where_it_cancels_too(H: float) -> None:
    """H phi_2(-H), by its series below 1e-2: the integral of u e^{-(1 - u) H} over the step, times H."""
    expected = H * float(integrate(lambda u: u * np.exp(-(1 - u) * H), 0.0, 1.0))
    later = SEEDS2(eta=0.0, r=1.0, solver_type="phi_2").tableau(H)[1][1][1]
    assert later == pytest.approx(expected, rel=2e-12)
