"""What holds of every method, on any schedule, for any number of steps, batch, seeds and dtype: one property for each,
over the whole table and over options that the table does not have."""

import inspect
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ella_kd import NoiseSchedule
from ella_kd.samplers import (
    DEIS,
    DPM2,
    ERSDE,
    IPNDM,
    LMS,
    SAMPLERS,
    SCHEDULES,
    SEEDS2,
    SEEDS3,
    DPM2Ancestral,
    DPMpp2M,
    DPMpp2SAncestral,
    DPMpp3M,
    DPMppSDE,
    Euler,
    EulerAncestral,
    GradientEstimation,
    Heun,
    HeunPP2,
    ResMultistepAncestral,
    Restart,
    Run,
    SASolver,
    SASolverPECE,
    Solver,
    UniPC,
    get_sigmas_karras,
    randn,
    sample,
)
from ella_kd.samplers.state import RESERVED
from mixtures import Guided, Mixture, Pointwise, named
from mixtures import randn as fixed
from oracles import SLOPES_KEPT, Watched, events_of, given_noise, identity, one, relative, zero

SD15 = NoiseSchedule.sd15()
ARGS = {"cond_scale": 0.7}
OPTIONS: list[Solver] = [
    Euler(s_churn=3.0),
    Heun(s_churn=3.0, s_tmin=0.3, s_tmax=5.0),
    DPM2(s_churn=3.0, s_noise=1.1),
    HeunPP2(s_churn=2.0),
    EulerAncestral(eta=0.4, s_noise=0.9),
    EulerAncestral(eta=1.5),
    DPM2Ancestral(eta=1.5),
    DPMpp2SAncestral(eta=0.4),
    DPMpp2SAncestral(eta=1.5),
    DPMpp2M(eta=0.5, solver_type="heun"),
    DPMppSDE(eta=0.0, r=0.3),
    DPMpp3M(eta=0.0, corrected=True),
    Restart(((0.3, 2, 2, 5.0), (1.0, 3, 1, 14.0))),
    LMS(2),
    DEIS(2),
    DEIS(3, "vp_time"),
    IPNDM(2),
    GradientEstimation(1.5),
    UniPC("bh2", 2, False),
    UniPC("bh1", 1),
    ResMultistepAncestral(eta=0.4, s_noise=0.9),
    SEEDS2(eta=0.5, r=0.3, solver_type="phi_2"),
    SEEDS3(eta=0.4, s_noise=0.9),
    SASolver(one, corrector_order=0),
    SASolver(zero, predictor_order=2, corrector_order=2, simple_order_2=True),
    SASolverPECE(one, predictor_order=1),
    ERSDE(noise_scaler=identity, max_stage=2),
    ERSDE(corrected=True),
]
CASES = [(solver, False) for solver in OPTIONS]
CASES += [case for row in SAMPLERS.values() if (case := (row.solver, row.cfg_pp)) not in CASES]
each_case = pytest.mark.parametrize(("solver", "cfg_pp"), CASES, ids=named)
each_solver = pytest.mark.parametrize("solver", list(dict.fromkeys(solver for solver, _ in CASES)), ids=named)
each_row = pytest.mark.parametrize("row", SAMPLERS.values(), ids=list(SAMPLERS))
SIGMAS = get_sigmas_karras(6, 0.03, 14.6)


def schedules() -> st.SearchStrategy[Tensor]:
    """Any schedule of ours, whole, or cut at either end (img2img; one that ends above 0)."""
    names, counts = st.sampled_from(sorted(SCHEDULES)), st.integers(1, 6)
    whole = st.builds(lambda name, n: SCHEDULES[name].sigmas(n, SD15), names, counts)
    cut = st.builds(lambda sigmas, k, end: sigmas[k : len(sigmas) - end], whole, st.integers(0, 3), st.integers(0, 1))
    return cut.filter(lambda sigmas: len(sigmas) > 1)


@each_case
@settings(max_examples=4)
@given(data=st.data(), sigmas=schedules(), rows=st.integers(1, 2), double=st.booleans())
def test_a_run(solver: Solver, cfg_pp: bool, data: Any, sigmas: Tensor, rows: int, double: bool) -> None:
    """What comes out is like x and finite, and nothing that went in was touched; the model sees what `eval_sigmas`
    says; records are true; a batch is its rows, in any order; a run paused and resumed is the whole run. Bitwise."""
    dtype = torch.float64 if double else torch.float32
    seeds = data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=rows, max_size=rows))
    x = randn((rows, 3, 5, 3), seeds, dtype) * sigmas[0].to(dtype)  # no multiple of a vector: a fused tail would show
    before, sigmas_before, args, generator = x.clone(), sigmas.clone(), dict(ARGS), torch.get_rng_state()
    model, records = Watched(), list[dict[str, Any]]()
    options: dict[str, Any] = {"disable": True, "cfg_pp": cfg_pp}
    whole, end = sample(solver, model, x, sigmas, args, records.append, seeds=seeds, **options)

    assert whole.shape == x.shape and whole.dtype == dtype and bool(whole.isfinite().all())
    assert torch.equal(x, before) and torch.equal(sigmas, sigmas_before) and args == ARGS
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(value.dtype == dtype for key, value in end.items() if key not in RESERVED)
    steps = solver.steps(sigmas.tolist())
    expected = [sigma for step in steps for sigma in step.evals]
    assert tuple(expected) == solver.eval_sigmas(sigmas) == solver.eval_sigmas(sigmas.tolist())
    assert model.seen == torch.tensor(expected, dtype=dtype).tolist()
    nfe = 0
    for i, (record, step) in enumerate(zip(records, steps, strict=True)):
        assert (record["i"], record["nfe"], float(record["sigma"])) == (i, nfe + 1, float(sigmas[i]))
        assert float(record["sigma_hat"]) == pytest.approx(step.evals[0], rel=1e-6)
        sigma = x.new_full((rows,), step.evals[0])
        assert torch.equal(record["denoised"], Pointwise()(record["x"], sigma, **ARGS))
        assert ("w" in record) == ("lam" in record) == cfg_pp
        nfe += len(step.evals)
    assert torch.equal(records[0]["x"], x) or steps[0].evals[0] > sigmas[0]

    order = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(1, rows))]
    moved, _ = sample(solver, Pointwise(), x[order], sigmas, ARGS, seeds=[seeds[k] for k in order], **options)
    assert torch.equal(moved, whole[order])
    if len(sigmas) > 2:
        stop = data.draw(st.integers(1, len(sigmas) - 2))
        half, state = sample(solver, Pointwise(), x, sigmas, ARGS, seeds=seeds, stop=stop, **options)
        assert int(state["step"]) == stop
        again, resumed = sample(solver, Pointwise(), half, None, ARGS, state=state, **options)
        assert torch.equal(again, whole) and resumed.keys() == end.keys()
        assert all(torch.equal(resumed[key], end[key]) for key in end)


@each_row
def test_a_row_of_the_table_is_true(row: Any) -> None:
    """Its function is its solver with the driver; what is said of evaluations, order and noise is so."""
    function, model = row.function, Pointwise()
    whole, _ = sample(row.solver, model, x := fixed(2, 3, 5, 3) * 14.6, SIGMAS, ARGS, disable=True, seeds=[7, 8],
                      cfg_pp=row.cfg_pp)
    if "comfyui" not in row.name and "paper" not in row.name:
        assert torch.equal(function(model, x, SIGMAS, ARGS, disable=True, seeds=[7, 8]), whole)
    assert function.__name__ == f"sample_{row.name}" and function.__doc__
    assert row.cfg_pp == row.name.endswith("_cfg_pp")
    assert (row.order, row.evals) == (row.solver.order, row.solver.evals)
    parameters = inspect.signature(function).parameters
    assert list(parameters)[:6] == ["model", "x", "sigmas", "extra_args", "callback", "disable"]
    assert row.stochastic == ("noise_sampler" in parameters and not row.name.startswith("ddim"))  # whose eta is 0
    for name in parameters.keys() & vars(row.solver).keys():
        if parameters[name].default is not None:
            assert parameters[name].default == getattr(row.solver, name), name
    to_zero = row.solver.steps([5.0, 2.0, 0.0])
    if row.solver.evals > 1 and not isinstance(row.solver, HeunPP2):
        assert [len(step.evals) for step in to_zero] == [row.evals, 1]
    uneven = {"heunpp2": [3, 2, 1], "restart": [2, 2 + 18, 2]}.get(row.name.removesuffix("_cfg_pp"))
    counts = [len(step.evals) for step in row.solver.steps([2.0, 0.1, 0.05, 0.03])]
    assert counts == (uneven or [row.evals] * 3) or row.name.startswith("restart")
    for option, value in (("eta", -1.0), ("eta", math.nan), ("s_noise", -0.1), ("s_noise", math.inf), ("s_churn", -1)):
        if option in parameters:
            with pytest.raises(ValueError, match=f"{option} must be a finite number >= 0"):
                function(model, x, SIGMAS, ARGS, disable=True, **{option: value})


@each_row
def test_noise_of_a_row(row: Any) -> None:
    """A noise sampler is asked for each step's pairs in their order and no others; seeds decide, and without them the
    global generator, which is left alone where there is no noise. Another dtype has the same noise."""
    calls: list[tuple[float, float]] = []
    x = fixed(2, 3, 5, 3) * 14.6

    def noise_sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        assert sigma.ndim == sigma_next.ndim == 0 and sigma.dtype == SIGMAS.dtype
        calls.append((float(sigma), float(sigma_next)))
        return torch.ones_like(x)

    def draw(x: Tensor = x, **options: Any) -> Tensor:
        drawn: Tensor = row.function(Pointwise(), x, SIGMAS, ARGS, disable=True, **options)
        return drawn

    torch.manual_seed(5)
    generator = torch.get_rng_state()
    first = draw()
    assert row.stochastic == (not torch.equal(generator, torch.get_rng_state()))
    assert row.stochastic == (not torch.equal(draw(), first))
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    seeded, other = draw(seeds=[3, 4]), draw(seeds=torch.tensor([3, 5]))
    assert torch.equal(seeded[0], other[0]) and row.stochastic == (not torch.equal(seeded[1], other[1]))
    assert relative(draw(x.double(), seeds=[3, 4]), seeded.double()) < 2e-5
    if row.stochastic:
        draw(noise_sampler=noise_sampler)
        pairs = [pair for step in row.solver.steps(SIGMAS.tolist()) for pair in step.noises]
        assert calls == [tuple(pair) for pair in torch.tensor(pairs).tolist()]
        if all(len(step.noises) == 1 for step in row.solver.steps(SIGMAS.tolist())[:-1]):
            assert calls == [(float(s), float(t)) for s, t in pairwise(SIGMAS[:-1])]  # none on the way to 0


@each_solver
@pytest.mark.usefixtures("float64")
def test_on_u(solver: Solver) -> None:
    """CFG++ with lambda 0 is the method on U, and where D - U is the same everywhere each step adds it once: a
    corrector that steps anew from the x before would lose it. (Slopes kept by a method see it as a jump.)"""
    sigmas, x, guided, options = SIGMAS.double(), fixed(2, 3, 5, 3) * 14.6, Guided(), {"disable": True}
    noise: dict[str, Any] = {**options, "noise_sampler": given_noise}
    got, _ = sample(solver, guided, x, sigmas, {"cond_scale": 0.0}, cfg_pp=True, **noise)
    expected, _ = sample(solver, guided.uncond, x, sigmas, **noise)
    assert torch.equal(got, expected)
    if isinstance(solver, SLOPES_KEPT) or any(step.noises for step in solver.steps(sigmas.tolist())):
        return
    u, g = fixed(2, 3, 5, 3, seed=3), 0.1 * fixed(2, 3, 5, 3, seed=4)
    got, _ = sample(solver, Watched(lambda x, sigma: (u + g, u)), x, sigmas, disable=True, cfg_pp=True)
    for s, t in pairwise(sigmas.tolist()):
        x = t / s * x + (1 - t / s) * u + g
    assert relative(got, x) < 1e-11


@each_solver
@pytest.mark.usefixtures("float64")
def test_constant_denoised_and_its_noise(solver: Solver) -> None:
    """Where D is one point m, x stays m + sigma n at every sigma: deterministic steps land on m + (t / s) (x - m), and
    the noise that a step adds makes up for the variance that x loses, each of its noises switched on alone."""
    for s, t in ((5.0, 2.0), (14.6, 0.05), (1.0, 0.9), (2.0, 0.0)):
        (c,) = solver.steps([s, t])
        m, n = fixed(1, 1, 2, 3, seed=1), fixed(1, 1, 2, 3)

        def end(x: Tensor, drawn: int | None, target: Tensor, c: Any = c) -> Tensor:
            def only(j: int) -> Tensor:
                return torch.full_like(x, float(j == drawn))

            return solver.step(c, x, {}, lambda x, sigma: target, only)[0]

        kept = end(m + s * n, None, m) - m
        ratio = float((kept / (s * n)).mean())
        torch.testing.assert_close(kept, ratio * s * n, rtol=0, atol=1e-12)  # in the direction that it had
        none = torch.zeros_like(m)
        noise = [float(end(none, k, none)[0, 0, 0, 0]) for k in range(len(c.noises))]
        if getattr(solver, "s_noise", 1.0) == 1.0 and not isinstance(solver, Restart):
            churned = c.evals[0] > s  # churn's noise is there before the step, and is scaled down with x
            assert (ratio * s) ** 2 + sum(k**2 for k in noise) == pytest.approx(t**2, rel=1e-9, abs=1e-24), churned
    assert torch.equal(end(m + 2.0 * n, None, m), m) or isinstance(solver, SLOPES_KEPT), "to sigma 0 exactly"


@each_solver
@pytest.mark.usefixtures("float64")
def test_a_run_that_another_method_began(solver: Solver) -> None:
    """Its state has no history of this one, so the step is first order: that of a run which begins there."""
    sigmas, x = torch.tensor([5.0, 2.0, 0.6, 0.2]), fixed(2, 3, 5, 3) * 0.6
    options: dict[str, Any] = {"disable": True, "noise_sampler": given_noise}
    got, _ = sample(solver, Guided(), x, state={"sigmas": sigmas, "step": torch.tensor(2)}, **options)
    if isinstance(solver, SASolverPECE):  # its first step is corrected, with its own two evaluations
        assert got.isfinite().all()
    elif getattr(solver, "s_churn", 0.0) == 0.0 and not isinstance(solver, (HeunPP2, Restart)):  # which see all sigmas
        expected, _ = sample(solver, Guided(), x, sigmas[2:], **options)
        assert relative(got, expected) <= 1e-14


@each_solver
@pytest.mark.usefixtures("float64")
def test_up_and_back(solver: Solver, mixture: Mixture) -> None:
    """An ascending grid and then the same descending returns to the start; what adds noise refuses to go up."""
    up = get_sigmas_karras(81, 0.05, 10.0)[:-1].flip(0)
    x = mixture.means[1] + 0.3 * fixed(1, 1, 3, 3)
    if any(step.noises for step in solver.steps([2.0, 1.9, 1.0])) and not isinstance(solver, Restart):
        with pytest.raises(ValueError, match="ascending"):
            sample(solver, mixture, x, up, disable=True)
        return
    noisy, _ = sample(solver, mixture, x, up, disable=True)
    assert float(noisy.std()) > 3
    back, _ = sample(solver, mixture, noisy, up.flip(0), disable=True)
    if not isinstance(solver, (HeunPP2, Restart)):  # Heun++'s weights are shares of the first sigma: another method
        assert float((back - x).abs().max()) < (0.15 if solver.order <= 1 else 0.01)


@each_case
def test_the_loop_never_waits_for_the_device(solver: Solver, cfg_pp: bool) -> None:
    """After the first evaluation the only read is the one of the NaN counts, after the last step."""
    x = fixed(2, 3, 5, 3) * 14.6

    def run(spy: Any) -> None:
        sample(solver, spy, x, SIGMAS, ARGS, disable=True, seeds=[1, 2], cfg_pp=cfg_pp)

    assert events_of(run, Pointwise()) == ["model"] * len(solver.eval_sigmas(SIGMAS)) + ["tolist"]


@each_case
def test_iterating_is_sampling(solver: Solver, cfg_pp: bool) -> None:
    x = fixed(2, 3, 5, 3) * 14.6
    options: dict[str, Any] = {"seeds": [7, 8], "cfg_pp": cfg_pp}
    whole, end = sample(solver, Pointwise(), x, SIGMAS, ARGS, disable=True, **options)
    run, counts = Run(solver, Pointwise(), x, SIGMAS, ARGS, **options), 0
    for i, record in enumerate(run):
        counts += len(solver.steps(SIGMAS.tolist())[i].evals)
        assert (record["i"], run.step, len(run), record["nfe"]) == (i, i + 1, 5 - i, counts)
        assert record["x"] is not run.x
    assert torch.equal(run.x, whole) and next(run, None) is None
    assert run.state.keys() == end.keys() and all(torch.equal(run.state[key], end[key]) for key in end)
