"""The methods of k-diffusion beyond the first seven; DDIM, DDPM, LCM, Heun++. Parity, orders, moments, corners."""

from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ella_kd.samplers import (
    LCM,
    LMS,
    SAMPLERS,
    DPM2Ancestral,
    DPMpp3M,
    DPMppSDE,
    EulerAncestral,
    Heun,
    HeunPP2,
    Restart,
    Solver,
    get_sigmas_karras,
    sample,
    sample_ddim,
    sample_ddpm,
    sample_dpm_2_ancestral,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
    sample_euler,
    sample_heunpp2,
    sample_lcm,
    sample_lms,
    sample_restart,
)
from ella_kd.samplers.upstream import k_diffusion
from mixtures import Guided, Mixture, Pointwise, randn

pytestmark = pytest.mark.usefixtures("float64")

SCHEDULES = {
    "to zero": [14.6, 9.1, 4.2, 2.2, 1.1, 0.5, 0.2, 0.03, 0.0],
    "img2img, ends above zero": [3.1, 2.0, 1.2, 0.7, 0.31],
    "one step to zero": [14.6, 0.0],
    "one step": [14.6, 1.0],
    "ascending": [0.03, 0.2, 1.1, 4.2, 14.6],
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("dpm_2_ancestral", {}),
    ("dpm_2_ancestral", {"eta": 0.4, "s_noise": 1.1}),
    ("dpm_2_ancestral", {"eta": 0.0}),
    ("lms", {}),
    ("lms", {"order": 1}),
    ("lms", {"order": 3}),
    ("lms", {"order": 6}),
    ("dpmpp_sde", {}),
    ("dpmpp_sde", {"eta": 0.4, "s_noise": 0.9, "r": 0.3}),
    ("dpmpp_sde", {"eta": 0.0, "r": 1.0}),
    ("dpmpp_sde", {"eta": 1.5}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", {"eta": 0.3, "s_noise": 0.8}),
    ("dpmpp_3m_sde", {"eta": 0.0}),
]
SOLVERS: list[Solver] = [
    DPM2Ancestral(),
    LMS(),
    LMS(2),
    DPMppSDE(),
    DPMppSDE(eta=0.0, r=0.3),
    DPMpp3M(),
    DPMpp3M(eta=0.0, corrected=True),
    LCM(),
    HeunPP2(),
    HeunPP2(s_churn=2.0),
    Restart(),
    Restart(((0.3, 2, 2, 5.0), (1.0, 3, 1, 14.0))),
]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)
SIGMAS = [14.6, 6.0, 2.2, 1.1, 0.4, 0.03, 0.0]


def given_noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Noise that depends on its sigmas alone, to the digits that both sides share."""
    return randn(2, 3, 5, 3, seed=round(float(sigma) * 1e6) + round(float(sigma_next) * 1e3))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def latents(sigmas: Tensor) -> Tensor:
    return randn(2, 3, 5, 3) * sigmas[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_trajectory_equals_k_diffusion(name: str, options: dict[str, Any], schedule: str, guided: Guided) -> None:
    sigmas = torch.tensor(SCHEDULES[schedule])
    x = latents(sigmas)
    noise: dict[str, Any] = {} if name == "lms" else {"noise_sampler": given_noise}
    function = SAMPLERS[name].function
    if schedule == "ascending" and name != "lms" and options.get("eta") != 0.0:
        with pytest.raises(ValueError, match="ascending"):
            function(guided, x, sigmas, disable=True, **options, **noise)
        return
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    args = {"cond_scale": 3.0}
    got = function(guided, x, sigmas, args, ours.append, True, **options, **noise)
    if name == "dpmpp_3m_sde" and schedule == "one step to zero":  # upstream raises UnboundLocalError there
        assert torch.equal(got, ours[0]["denoised"])
        return
    expected = getattr(k_diffusion().sampling, f"sample_{name}")(
        guided, x, sigmas, args, theirs.append, True, **options, **noise
    )
    assert relative(got, expected) <= 1e-10
    assert len(ours) == len(theirs) == len(sigmas) - 1
    for a, b in zip(ours, theirs):
        assert a["i"] == b["i"] and a["sigma"] == b["sigma"] and a["sigma_hat"] == b["sigma_hat"]
        assert max(relative(a[key], b[key]) for key in ("x", "denoised")) <= 1e-10


def test_dpm_2_ancestral_keeps_the_noise_that_k_diffusion_drops(guided: Guided) -> None:
    """At eta 1.5 sigma_down is 0: their x has then no noise where sigma_next says 1."""
    sigmas = torch.tensor([14.6, 1.0])
    x = latents(sigmas)
    options: dict[str, Any] = {"eta": 1.5, "noise_sampler": given_noise}
    theirs = k_diffusion().sampling.sample_dpm_2_ancestral(guided, x, sigmas, disable=True, **options)
    ours = sample_dpm_2_ancestral(guided, x, sigmas, disable=True, **options)
    torch.testing.assert_close(theirs, guided(x, sigmas[:1].expand(2)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs + given_noise(*sigmas), rtol=1e-12, atol=1e-12)


def flow(mixture: Mixture, sigma: float) -> Tensor:
    """The exact solution at sigma, [1, 1, 3, 4]: twelve quantiles."""
    return torch.tensor([mixture.quantile(u, sigma) for u in np.linspace(0.03, 0.97, 12)]).view(1, 1, 3, 4)


def errors(solver: Solver, mixture: Mixture, counts: tuple[int, ...], exact_start: int = 0) -> list[float]:
    """RMS error at sigma .05 from sigma 20 on a Karras grid; the first `exact_start` steps are the exact flow's."""
    found = []
    for n in counts:
        sigmas = get_sigmas_karras(n + 1, 0.05, 20.0)[:-1]
        state = {"sigmas": sigmas, "step": torch.tensor(exact_start)}
        x = flow(mixture, float(sigmas[exact_start]))
        for k in range(exact_start):
            sigma = sigmas[exact_start - 1 - k]
            before = flow(mixture, float(sigma))
            denoised = mixture(before, sigma.view(1))
            if isinstance(solver, LMS):
                state[f"slope_{k + 1}"] = (before - denoised) / sigma
            else:
                state[f"denoised_{k + 1}"] = denoised
        x, _ = sample(solver, mixture, x, state=state, disable=True)
        found.append(float((x - flow(mixture, 0.05)).pow(2).mean().sqrt()))
    return found


def slope(values: list[float], counts: tuple[int, ...]) -> float:
    return float(-np.polyfit(np.log(counts), np.log(values), 1)[0])


@pytest.mark.parametrize(
    ("solver", "exact_start", "expected"),
    [
        (DPM2Ancestral(eta=0.0), 0, 2.0),
        (DPMppSDE(eta=0.0), 0, 1.99),
        (DPMppSDE(eta=0.0, r=0.3), 0, 2.0),
        (DPMpp3M(eta=0.0), 0, 1.97),
        (DPMpp3M(eta=0.0), 2, 1.97),
        (DPMpp3M(eta=0.0, corrected=True), 2, 3.03),
        (LMS(), 3, 3.99),
        (LMS(2), 1, 2.0),
        (EulerAncestral(eta=0.0), 0, 1.0),
        (HeunPP2(), 0, 1.01),
    ],
    ids=str,
)
def test_order_as_measured(solver: Solver, exact_start: int, expected: float, mixture: Mixture) -> None:
    counts = (160, 320, 640)
    assert slope(errors(solver, mixture, counts, exact_start), counts) == pytest.approx(expected, abs=0.2)


def test_orders_from_the_start_that_runs_have(mixture: Mixture) -> None:
    """A first-order first step's error stays: LMS falls from 3.5 to 2.6, the corrected 3M from 3.1 to 2.6."""
    counts = (40, 80, 160, 320, 640)
    found = errors(LMS(), mixture, counts)
    slopes = [slope(found[k : k + 2], counts[k : k + 2]) for k in range(4)]
    assert slopes[0] == pytest.approx(3.5, abs=0.2) and slopes[-1] == pytest.approx(2.6, abs=0.2)
    found = errors(DPMpp3M(eta=0.0, corrected=True), mixture, counts)
    slopes = [slope(found[k : k + 2], counts[k : k + 2]) for k in range(4)]
    assert slopes[0] == pytest.approx(3.1, abs=0.2) and slopes[-1] == pytest.approx(2.6, abs=0.2)
    assert found[-1] < errors(DPMpp3M(eta=0.0), mixture, (640,))[0] / 10


def test_corrected_is_no_better_at_few_steps(mixture: Mixture) -> None:
    """What its docstring warns of: the smaller error belongs to the uncorrected form at each n = 8 to 40."""
    counts = (8, 10, 15, 20, 30, 40)
    plain, corrected = (errors(DPMpp3M(eta=0.0, corrected=which), mixture, counts) for which in (False, True))
    assert all(a < b for a, b in zip(plain, corrected))


def test_lms_weights_are_exact_integrals() -> None:
    sigmas, s, t = [14.6, 9.1, 4.2, 2.2, 1.1], 2.2, 1.1
    nodes, weights = sigmas[3::-1], LMS().slope_weights(3, sigmas)
    for power in range(4):
        exact = (t ** (power + 1) - s ** (power + 1)) / (power + 1)
        assert sum(w * node**power for w, node in zip(weights, nodes)) == pytest.approx(exact, rel=1e-12)


def test_two_names_one_method(guided: Guided) -> None:
    sigmas = torch.tensor(SIGMAS)
    x = latents(sigmas)
    noise: dict[str, Any] = {"noise_sampler": given_noise}
    sde = sample_dpmpp_sde(guided, x, sigmas, disable=True, eta=0.0)
    assert relative(sde, sample_dpmpp_2s_ancestral(guided, x, sigmas, disable=True, eta=0.0)) < 1e-14
    assert torch.equal(sample_ddim(guided, x, sigmas, disable=True), sample_euler(guided, x, sigmas, disable=True))
    ddpm = sample_ddpm(guided, x, sigmas, disable=True, **noise)
    assert torch.equal(ddpm, sample_ddim(guided, x, sigmas, disable=True, eta=1.0, **noise))
    first = sample_lms(guided, x, sigmas, disable=True, order=1)
    assert relative(first, sample_euler(guided, x, sigmas, disable=True)) < 1e-13


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
    x = latents(sigmas)
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
    x0 = latents(torch.tensor([s0]))

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
    sigmas = torch.tensor(SCHEDULES["to zero"])
    x = start = latents(sigmas)
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
        x = latents(torch.tensor(sigmas))
        heun, _ = sample(Heun(), guided, x, torch.tensor(sigmas), disable=True)
        far = sample_restart(guided, x, torch.tensor(sigmas), disable=True, restart_list={0.1: [4, 1, 0.11]})
        assert torch.equal(far, heun)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        sample_restart(guided, latents(torch.ones(1)), torch.tensor([2.0, 1.0]), restart_list={2.0: [4, 1, 1.0]})


@each_solver
def test_split_equals_whole_and_batch_equals_singles_bitwise(solver: Solver) -> None:
    model, sigmas = Pointwise(), torch.tensor(SIGMAS)
    x = randn(3, 3, 5, 3) * sigmas[0]
    seeds = [5, 2**62, 5]
    whole, end = sample(solver, model, x, sigmas, disable=True, seeds=seeds)
    for stop in range(1, len(sigmas) - 1):
        half, state = sample(solver, model, x, sigmas, disable=True, seeds=seeds, stop=stop)
        again, state = sample(solver, model, half, disable=True, state=state)
        assert torch.equal(again, whole)
        assert state.keys() == end.keys()
    for row, seed in enumerate(seeds):
        single, _ = sample(solver, model, x[row : row + 1].clone(), sigmas, disable=True, seeds=[seed])
        assert torch.equal(single[0], whole[row])


@each_solver
@pytest.mark.parametrize("sigmas", [[14.6, 0.0], [3.0, 0.5], SIGMAS], ids=str)
def test_evaluations_are_counted_and_one_step_works(solver: Solver, sigmas: list[float], guided: Guided) -> None:
    out, _ = sample(solver, guided, torch.ones(1, 1, 2, 2), torch.tensor(sigmas), disable=True)
    assert out.isfinite().all()
    assert guided.seen == list(solver.eval_sigmas(sigmas))
    assert guided.seen[0] >= sigmas[0]


@each_solver
def test_a_run_that_another_method_began_goes_on(solver: Solver) -> None:
    """A missing history is a first-order step, not an error."""
    model, sigmas = Pointwise(), torch.tensor(SIGMAS)
    x, state = sample(EulerAncestral(), model, randn(1, 1, 3, 3) * 14.6, sigmas, disable=True, seeds=[1], stop=3)
    out, _ = sample(solver, model, x, disable=True, state=state)
    assert out.isfinite().all()
    first, _ = sample(solver, model, x, disable=True, state=state, stop=4)
    if isinstance(solver, LMS):
        euler, _ = sample(EulerAncestral(eta=0.0), model, x, disable=True, state=state, stop=4)
        torch.testing.assert_close(first, euler, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("function", "n"),
    [
        (sample_dpm_2_ancestral, 150),
        (sample_dpmpp_sde, 150),
        (sample_dpmpp_3m_sde, 150),
        (sample_ddpm, 700),
        (sample_restart, 60),
    ],
)
def test_sde_moments_are_the_data_s(function: Any, n: int) -> None:
    """Gaussian data N(.7, .5^2): mean and variance of 30000 values at sigma .02 within 3 standard errors. DDPM is first
    order, and its variance at 150 steps still 4.6 % short."""
    mean, variance, end, count = 0.7, 0.25, 0.02, 30000
    gaussian = Mixture((mean,), (variance**0.5,), (1.0,))
    sigmas = get_sigmas_karras(n, end, 10.0)[:-1]
    x = mean + (variance + 100.0) ** 0.5 * randn(1, 3, 100, 100, seed=3)
    out = function(gaussian, x, sigmas, disable=True, seeds=[4])
    expected = variance + end**2
    assert abs(float(out.mean()) - mean) < 3 * (expected / count) ** 0.5
    assert abs(float(out.var()) - expected) < 3 * expected * (2 / count) ** 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DPMppSDE(r=0.0), "r must be above 0 and at most 1, got 0.0"),
        (lambda: DPMppSDE(r=1.5), "at most 1"),
        (lambda: LMS(0), "a whole number of at least 1, got 0"),
        (lambda: LMS(2.0), "got 2.0"),  # type: ignore[arg-type]
        (lambda: LCM(s_noise=-1.0), "s_noise must be"),
        (lambda: DPMpp3M(eta=-1.0), "eta must be"),
    ],
)
def test_bad_options(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
