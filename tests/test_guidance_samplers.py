"""Conditionings that switch and rules that depend on sigma, in runs of samplers: planned or not, ours or k-diffusion's,
paused, adaptive, CFG++."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd import And, Box, Concat, ELLADenoiser, LDMDenoiser, Regions, Switch, window
from ella_kd.conditioning import Constant
from ella_kd.guidance import CFG, Guidance, GuidedDenoiser, Interval
from ella_kd.samplers import (
    SAMPLERS,
    CFGpp,
    Run,
    get_sampler,
    get_sigmas_karras,
    sample_dpm_adaptive,
    sample_euler,
    sample_euler_cfg_pp,
)
from ella_kd.samplers.upstream import k_diffusion
from oracles import Functions, Operations
from tiny import WIDTH, PointwiseTSC, PointwiseUNet, features, noise, relative, tiny_tsc, tiny_unet

LOW, HIGH = LDMDenoiser(PointwiseUNet()).sigma_min, LDMDenoiser(PointwiseUNet()).sigma_max
SIGMAS = get_sigmas_karras(7, LOW, HIGH)
AT = SIGMAS.tolist()  # boundaries that the schedule hits exactly
X = noise(2, 4, 8, 8) * SIGMAS[0]


def pointwise() -> ELLADenoiser:
    return ELLADenoiser(PointwiseUNet(), PointwiseTSC())  # type: ignore[arg-type]


def network() -> ELLADenoiser:
    return ELLADenoiser(tiny_unet(), tiny_tsc())


def conditions(inner: ELLADenoiser, width: int = 2) -> dict[str, Any]:
    """Switches at sigmas of the schedule, a window that closes, AND whose weight falls with sigma, regions."""
    a, b, c, d = (inner.lift(features(3, 2, seed=seed)) for seed in (5, 6, 7, 8))
    early = Concat(Switch(a, b, at=AT[2]), window(Constant(features(4, seed=9, width=width)), sigma_lo=AT[3]))
    both = And((early, 1.0), (c, lambda sigma: -0.4 if sigma > AT[4] else 0.2))
    return {"cond": Regions((both, Box(0, 0, 0.6, 1)), background=d, feather=0.2), "uncond": features(1, seed=10)}


def falling(sigma: float) -> float:
    return 1.0 if sigma <= AT[5] else 1 + 0.2 * sigma**0.5


RULES: list[Guidance] = [CFG(0.6), CFG([0.5, 1.0]), CFG(falling), Interval(CFG(0.7), AT[4], AT[1]),
                         Interval(CFG(falling), AT[3])]

IDS = ["CFG", "per sample", "function", "interval", "interval of a function"]


class Unplanned(GuidedDenoiser):
    def bind(self, x: Tensor, sigmas: Any = None, **extra_args: Any) -> Any:
        return super().bind(x, None, **extra_args)


def run(denoiser: Any, sampler: Callable[..., Any], args: dict[str, Any], **options: Any) -> Tensor:
    out = sampler(denoiser, X.to(SIGMAS.dtype), SIGMAS, extra_args=args, disable=True, **options)
    assert isinstance(out, Tensor)
    return out


def in_turn(*names: str) -> list[Any]:
    """Each sampler with one rule, all of them in turn, since neither knows the other."""
    return [pytest.param(name, rule, id=f"{name} {own}") for name, rule, own in zip(names, cycle(RULES), cycle(IDS))]


@pytest.mark.parametrize(("name", "rule"), in_turn(
    "euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_2m_sde", "lms", "restart",
    "dpmpp_2m_cfg_pp", "euler_ancestral_cfg_pp", "dpm_2_cfg_pp"))
def test_planned_equals_unplanned(name: str, rule: Guidance) -> None:
    """Bitwise for a pointwise model, boundaries hit exactly by sigmas of the schedule; and one connector call."""
    inner = pointwise()
    sampler, options = SAMPLERS[name], {"seeds": [1, 2]} if SAMPLERS[name].stochastic else {}
    args = conditions(inner)
    tsc: Any = inner.tsc
    tsc.calls.clear()
    planned = run(GuidedDenoiser(inner, rule), sampler.function, args, **options)
    assert len(tsc.calls) == 1
    assert torch.equal(planned, run(Unplanned(inner, rule), sampler.function, args, **options))
    separate = run(GuidedDenoiser(inner, rule, together=False), sampler.function, args, **options)
    assert torch.equal(planned, separate)


def test_planned_equals_unplanned_with_networks() -> None:
    inner = network()
    args = conditions(inner, WIDTH)
    for rule in (CFG(3.0), Interval(CFG(falling), AT[3])):
        planned = run(GuidedDenoiser(inner, rule), SAMPLERS["heun"].function, args)
        assert relative(planned, run(Unplanned(inner, rule), SAMPLERS["heun"].function, args)) < 1e-5
        assert relative(planned, run(GuidedDenoiser(inner, rule, False), SAMPLERS["heun"].function, args)) < 1e-5


@pytest.mark.parametrize(("name", "rule"), in_turn("euler", "heun", "dpm_2", "lms", "dpmpp_2m"))
@pytest.mark.usefixtures("float64")
def test_k_diffusions_own_samplers_give_the_same_answer(name: str, rule: Guidance) -> None:
    """They run unplanned and fill in no level: the denoiser reads its sigma. 1e-6: t is fp32."""
    inner = pointwise()
    args, x, sigmas = conditions(inner), X.double(), SIGMAS.double()
    theirs = getattr(k_diffusion().sampling, f"sample_{name}")(GuidedDenoiser(inner, rule), x, sigmas, args,
                                                               disable=True)
    ours = SAMPLERS[name].function(GuidedDenoiser(inner, rule), x, sigmas, args, disable=True)
    assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("rule", RULES, ids=IDS)
@pytest.mark.parametrize("cfg_pp", [False, True])
def test_a_planned_run_reads_nothing_back_from_the_device(rule: Guidance, cfg_pp: bool) -> None:
    """No tolist or item between the first evaluation and the last; on a CPU the checks of values stay."""
    inner = pointwise()
    model = GuidedDenoiser(inner, rule)
    solver = SAMPLERS["heun"].solver
    planned = Run(solver, model, X, SIGMAS, conditions(inner), cfg_pp=cfg_pp)
    events: list[str] = []
    with Functions(events), Operations(events):
        for _ in range(6):
            planned.advance()
    assert not {"tolist", "item", "numpy", "__float__"} & set(events)
    with Functions(events), Operations(events):
        model(X, SIGMAS[:1].repeat(2), **conditions(inner))
    assert "tolist" in events  # which is what it would look like


def test_the_level_is_the_evaluations_sigma_in_every_stage() -> None:
    inner = pointwise()
    seen: list[Any] = []

    class Noting(GuidedDenoiser):
        def bind(self, x: Tensor, sigmas: Any = None, **extra_args: Any) -> Any:
            bound = super().bind(x, sigmas, **extra_args)
            seen.append(sigmas)

            def noting(x: Tensor, levels: float, scale: float | None = None) -> Any:
                seen.append(levels)
                return bound(x, levels, scale)

            return noting

    run(Noting(inner, CFG(0.6)), SAMPLERS["dpm_2"].function, conditions(inner))
    planned, *levels = seen
    assert list(planned) == levels == torch.tensor(SAMPLERS["dpm_2"].solver.eval_sigmas(SIGMAS)).tolist()


@pytest.mark.parametrize("cfg_pp", [False, True])
@pytest.mark.parametrize(("name", "rule"), in_turn("euler_ancestral", "dpmpp_2m", "heun", "dpmpp_2m", "euler"))
def test_a_run_split_at_any_step_and_resumed_is_the_whole_run_bitwise(name: str, rule: Guidance, cfg_pp: bool) -> None:
    sampler, inner = get_sampler(name), pointwise()
    model = CFGpp(GuidedDenoiser(inner, rule)) if cfg_pp else GuidedDenoiser(inner, rule)
    options: dict[str, Any] = {"seeds": [1, 2]} if sampler.stochastic else {}
    whole = run(model, sampler.function, conditions(inner), **options)
    for stop in (1, 3, len(SIGMAS) - 2):
        first = Run(sampler.solver, model, X, SIGMAS, conditions(inner), stop=stop, **options)
        for _ in first:
            pass
        second = Run(sampler.solver, model, first.x, extra_args=conditions(inner), state=first.state)
        for _ in second:
            pass
        assert torch.equal(second.x, whole)


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_the_adaptive_sampler_whose_rows_are_at_different_sigmas(rule: Guidance) -> None:
    """Each sample is what it is alone, whatever switches on which side of its sigma."""
    inner = pointwise()
    args = conditions(inner)
    x = X / X.std()
    both = sample_dpm_adaptive(GuidedDenoiser(inner, rule), x * 10, 0.1, 10.0, args, disable=True)
    assert both.isfinite().all()
    for i in range(2):
        one = {"cond": conditions_of_row(inner, i), "uncond": args["uncond"]}
        scale = rule.scale if isinstance(rule, CFG) else None
        own = CFG(scale[i]) if isinstance(scale, tuple) else rule
        alone = sample_dpm_adaptive(GuidedDenoiser(inner, own), x[i:i + 1] * 10, 0.1, 10.0, one, disable=True)
        assert relative(both[i:i + 1], alone) < 1e-5


def conditions_of_row(inner: ELLADenoiser, i: int) -> Any:
    def take(leaf: Any) -> Any:
        return leaf if leaf.rows == 1 else type(leaf)(inner.tsc, leaf.features, leaf.prompts[i:i + 1])

    return conditions(inner)["cond"].map(take)


def test_cfg_pp_with_an_interval_is_plain_sampling_outside_of_it() -> None:
    inner = pointwise()
    args = conditions(inner)
    never = run(GuidedDenoiser(inner, Interval(CFG(0.6), 99.0)), sample_euler_cfg_pp, args)
    assert relative(never, run(GuidedDenoiser(inner, CFG(1.0)), sample_euler, args)) < 1e-6
    always = run(GuidedDenoiser(inner, Interval(CFG(0.6))), sample_euler_cfg_pp, args)
    assert torch.equal(always, run(GuidedDenoiser(inner, CFG(0.6)), sample_euler_cfg_pp, args))


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.cfg_pp][::6])
def test_cfg_pp_samplers_draw_compositions(name: str) -> None:
    inner, options = pointwise(), {"seeds": [1, 2]} if SAMPLERS[name].stochastic else {}
    args = conditions(inner)
    drawn = run(GuidedDenoiser(inner, CFG(0.6)), SAMPLERS[name].function, args, **options)
    assert drawn.isfinite().all()
    other = run(GuidedDenoiser(inner, CFG(0.2)), SAMPLERS[name].function, args, **options)
    assert relative(drawn, other) > 1e-4
