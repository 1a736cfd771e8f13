"""CFG, Interval and the denoiser that evaluates rules: what is asked of the network, and what is made of it."""

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ella_kd import ELLA, And, Box, Channels, ELLADenoiser, Lerp, Regions, Switch
from ella_kd.conditioning import Constant
from ella_kd.guidance import CFG, COND, UNCOND, Branch, CFGDenoiser, GuidedDenoiser, Interval
from ella_kd.models.noise_schedule import NoiseSchedule
from ella_kd.models.text import TextFeatures
from ella_kd.models.unet import UNet, UNetConfig
from rules import check_value, in_eps, make_answers
from strategies import SIGMAS, Spec, build, calls, counting_tsc, trees
from tiny import WIDTH, PointwiseTSC, PointwiseUNet, features, noise, planned, randomised, relative, tiny_tsc, tiny_unet

X, SIGMA = noise(3, 4, 8, 8) * 5, torch.tensor([5.0, 1.0, 0.3])
LEVELS = tuple(SIGMA.tolist())
SCALES = st.one_of(st.sampled_from((0.0, 1.0)), st.floats(-3, 12))
COND_TEXT, EMPTY = features(4, 2, 3), features(1, seed=9)


def spied(rule: Any, together: bool = True) -> tuple[GuidedDenoiser, list[int]]:
    """A guided pointwise model, and the rows of every UNet call."""
    unet = PointwiseUNet()
    rows: list[int] = []
    unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return GuidedDenoiser(ELLADenoiser(unet, PointwiseTSC()), rule, together), rows  # type: ignore[arg-type]


NETWORK = GuidedDenoiser(ELLADenoiser(tiny_unet(), counting_tsc()), CFG(3.0))


@settings(max_examples=15)
@given(calls(2), trees(1, 2))
def test_one_call_equals_separate_calls_for_any_two_conditionings(cond: tuple[Spec, tuple[float, ...]],
                                                                  uncond: Spec) -> None:
    spec, sigmas = cond
    spec = spec[1] if spec[0] == "channels" else spec
    inner, x, sigma = NETWORK.inner_model, X[:1].repeat(len(sigmas), 1, 1, 1), torch.tensor(sigmas)
    args: dict[str, Any] = {"cond": build(spec, counting_tsc()), "uncond": build(uncond, counting_tsc())}
    c, u = (inner(x, sigma, condition) for condition in args.values())
    rows: list[int] = []
    hook = inner.inner_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for together, expected in ((True, [2 * len(x)]), (False, [len(x)] * 2)):
        guided = GuidedDenoiser(inner, CFG(3.0), together)
        for ask in (guided.predict, partial(planned, guided)):
            rows.clear()
            got = ask(x, sigma, **args)
            assert rows == expected * (1 if ask == guided.predict else len(x))
            assert got.uncond is not None
            assert relative(got.cond, c) < 1e-5
            assert relative(got.uncond, u) < 1e-5
            assert relative(got.denoised, u + 3 * (c - u)) < 1e-4
    hook.remove()


@settings(max_examples=60)
@given(st.lists(SCALES, min_size=3, max_size=3))
def test_a_scale_per_sample_is_each_sample_alone(scales: list[float]) -> None:
    for given_as in (scales, tuple(scales), torch.tensor(scales, dtype=torch.float64)):
        denoiser, rows = spied(CFG(given_as))  # type: ignore[arg-type]
        got = denoiser(X, SIGMA, cond=COND_TEXT, uncond=EMPTY)
        assert rows == [3 if scales == [1.0] * 3 else 6]
        by_call = CFGDenoiser(denoiser.inner_model)(X, SIGMA, cond=COND_TEXT, uncond=EMPTY, cond_scale=given_as)
        assert torch.equal(got, by_call)
        for i, scale in enumerate(scales):
            alone = GuidedDenoiser(denoiser.inner_model, CFG(scale))
            one = alone(X[i:i + 1], SIGMA[i:i + 1], cond=one_row(COND_TEXT, i), uncond=EMPTY)
            assert torch.equal(got[i:i + 1], one) if scale == 1 else relative(got[i:i + 1], one) < 1e-6


def one_row(text: TextFeatures, i: int) -> TextFeatures:
    return TextFeatures(text.tokens[i:i + 1], None if text.mask is None else text.mask[i:i + 1])


def falling(sigma: float) -> float:
    return 1.0 if sigma < 0.5 else 2 + sigma


def test_a_scale_of_sigma_is_its_value_at_each_row() -> None:
    denoiser, rows = spied(CFG(falling))
    got = denoiser(X, SIGMA, cond=COND_TEXT, uncond=EMPTY)
    assert rows == [6]
    values = GuidedDenoiser(denoiser.inner_model, CFG([falling(s) for s in LEVELS]))
    assert torch.equal(got, values(X, SIGMA, cond=COND_TEXT, uncond=EMPTY))
    rows.clear()
    low = torch.full((3,), 0.3)
    assert torch.equal(denoiser(X, low, cond=COND_TEXT, uncond=EMPTY), denoiser.inner_model(X, low, COND_TEXT))
    assert rows == [3, 3]  # there it is 1: no uncond


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("lo", "hi", "inside"), [
    (0.0, math.inf, [True, True, True]), (1.0, math.inf, [True, False, False]), (0.3, 1.0, [False, True, False]),
    (0.2, 1.0, [False, True, True]), (5.0, math.inf, [False] * 3), (0.0, 0.2, [False] * 3)])
def test_outside_an_interval_is_the_plain_model_bit_for_bit(lo: float, hi: float, inside: list[bool],
                                                            together: bool) -> None:
    """Rows on both sides of it; the boundaries belong to the noisier and the cleaner side as sigma_lo < sigma <= hi."""
    denoiser, rows = spied(Interval(CFG(4.0), lo, hi), together)
    plain = denoiser.inner_model(X, SIGMA, COND_TEXT)
    always = GuidedDenoiser(denoiser.inner_model, CFG(4.0), together)(X, SIGMA, cond=COND_TEXT, uncond=EMPTY)
    rows.clear()
    got = denoiser(X, SIGMA, cond=COND_TEXT, uncond=EMPTY)
    assert rows == ([3] if not any(inside) else [6] if together else [3, 3])
    for i, guided in enumerate(inside):
        assert torch.equal(got[i], (always if guided else plain)[i])
        rows.clear()
        alone = denoiser(X[i:i + 1], SIGMA[i:i + 1], cond=one_row(COND_TEXT, i), uncond=EMPTY)
        assert sum(rows) == 1 + guided
        assert torch.equal(alone, got[i:i + 1])
    if not any(inside):
        assert torch.equal(denoiser(X, SIGMA, cond=COND_TEXT), plain)  # and needs no uncond


@given(st.sampled_from(SIGMAS), st.sampled_from((torch.float32, torch.float64)))
def test_a_boundary_is_hit_by_the_sigma_of_the_same_decimal(sigma: float, dtype: torch.dtype) -> None:
    rule, level = Interval(CFG(2.0), sigma), float(torch.tensor(sigma, dtype=dtype))
    assert set(rule.at((level,)).branches) == {COND}
    assert Interval(CFG(2.0), 0.0, sigma).at((level,)).branches == (COND, UNCOND)
    above = float(torch.nextafter(torch.tensor(sigma), torch.tensor(20.0)))
    assert rule.at((above,)).branches == (COND, UNCOND)


def test_cfg_pp_walks_on_cond_where_nothing_is_guided() -> None:
    """Outside an interval D - U is 0 and no uncond is evaluated; D = C with the real U would be its strongest."""
    denoiser, rows = spied(Interval(CFG(0.6), 1.0))
    got = denoiser.predict(X, SIGMA, need_uncond=True, cond=COND_TEXT, uncond=EMPTY)
    c, u = (denoiser.inner_model(X, SIGMA, text) for text in (COND_TEXT, EMPTY))
    assert got.uncond is not None
    assert torch.equal(got.uncond, torch.cat([u[:1], c[1:]]))
    rows.clear()
    low = denoiser.predict(X[1:], SIGMA[1:], need_uncond=True, cond=one_row(COND_TEXT, 0), uncond=EMPTY)
    assert rows == [2]
    assert low.uncond is not None
    assert torch.equal(low.uncond, low.denoised)
    plain = GuidedDenoiser(denoiser.inner_model, CFG(1.0)).predict(X, SIGMA, True, cond=COND_TEXT, uncond=EMPTY)
    assert plain.uncond is not None
    assert torch.equal(plain.uncond, u)  # lambda = 1 is not "no guidance"
    nested = Interval(Interval(CFG(2.0), 0.0, 1.0), 0.5)
    assert nested.at(LEVELS).guided == (False, True, False)
    assert nested.at((1.0,)).guided == (True,)
    assert nested.at((5.0,)).guided == (False,)


@given(st.lists(SCALES, min_size=3, max_size=3))
def test_linear_rules_agree_in_denoised_and_in_eps(scales: list[float]) -> None:
    answers = make_answers()
    for rule in (CFG(scales), Interval(CFG(scales), 1.0), CFG(lambda s: 1 + s)):
        decided = rule.at((14.0, 2.5, 0.1))
        from_eps = answers.x - answers.sigma * decided(in_eps(answers))
        assert torch.allclose(decided(answers), from_eps, rtol=1e-9, atol=1e-9)


def test_rules_are_values() -> None:
    scope = {"CFG": CFG, "Interval": Interval, "inf": math.inf}
    for rule in (CFG(7), CFG([1, 2.5]), CFG(torch.tensor(3.0)), Interval(CFG(3), 0.5), Interval(CFG(3), 0.5, 5)):  # type: ignore[arg-type]
        check_value(rule, scope)
    assert CFG(7) == CFG(7.0) == CFG(torch.tensor(7))  # type: ignore[arg-type]
    assert CFG(torch.tensor([1, 2])) == CFG((1.0, 2.0))  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        CFG(7).scale = 8.0  # type: ignore[misc]
    assert len({CFG(7), CFG(7.0), Branch("cond"), COND}) == 2


def test_with_channels_beside_x() -> None:
    """InstructPix2Pix's UNet: the image is concatenated to x, and each branch has its own."""
    unet = randomised(UNet(UNetConfig(6, 4, 32, (1, 2), 1, (True, True), WIDTH, 2)), 0, 0.1)
    inner, image = ELLADenoiser(unet, tiny_tsc()), noise(1, 2, 8, 8, seed=8)
    cond = Channels(inner.lift(COND_TEXT), image)
    uncond = Channels(inner.lift(EMPTY), torch.zeros(1, 2, 8, 8))
    got = GuidedDenoiser(inner, CFG(2.0)).predict(X, SIGMA, cond=cond, uncond=uncond)
    assert got.uncond is not None
    assert relative(got.cond, inner(X, SIGMA, cond)) < 1e-5
    assert relative(got.uncond, inner(X, SIGMA, uncond)) < 1e-5
    with pytest.raises(ValueError, match="channels beside x for all of its conditionings or for none"):
        GuidedDenoiser(inner, CFG(2.0))(X, SIGMA, cond=cond, uncond=EMPTY)


def everything(tsc: Any, put: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Any]:
    """Conditions that switch, mix and compose, on some device."""
    def ella(seed: int) -> ELLA:
        return ELLA(tsc, TextFeatures(put(features(3, seed=seed).tokens)))

    clip = Constant(TextFeatures(put(features(4, width=WIDTH).tokens)))
    one = Regions((Switch(ella(1), Lerp(ella(2), ella(3), 0.3), at=2.0), Box(0, 0, 0.5, 1)), (clip, Box(0.5, 0, 1, 1)),
                  feather=0.2)
    return {"cond": And((one, lambda s: 1.0 + s), (ella(4), -0.5)), "uncond": ella(5)}


@pytest.mark.parametrize("sigmas", [None, (5.0, 0.5)])
def test_an_evaluation_whose_levels_are_known_waits_for_no_device(sigmas: tuple[float, ...] | None) -> None:
    """On the meta device reading a value raises."""
    inner = ELLADenoiser(tiny_unet(), tiny_tsc()).to("meta")
    guided = GuidedDenoiser(inner, Interval(CFG(falling), 1.0))
    args, x = everything(inner.tsc, lambda x: x.to("meta")), X.to("meta")
    bound = guided.bind(x, sigmas, need_uncond=True, **args)
    for level in (5.0, 0.5):
        assert bound(x, level).denoised.shape == X.shape
    assert bound(x, (5.0, 0.5, 5.0)).denoised.shape == X.shape
    with pytest.raises(RuntimeError):
        guided(x, torch.full((3,), 5.0, device="meta"), **args)


def test_a_run_makes_one_connector_call_for_all_conditions() -> None:
    denoiser, _ = spied(CFG(3.0))
    tsc: Any = denoiser.inner_model.tsc
    args: dict[str, Any] = {"cond": And((COND_TEXT, 0.5), (EMPTY, 0.2)), "uncond": EMPTY,
                            "image": features(2, seed=4), "other": None}
    exact = denoiser(X, SIGMA, **args)
    tsc.calls.clear()
    assert torch.equal(planned(denoiser, X, SIGMA, **args).denoised, exact)
    assert tsc.calls == [3 * (3 + 1 + 1)]  # features given twice are read once
    for other, rows in ((denoiser.inner_model, [15]), (LDMPlus(), [15, 15])):  # a second model's own timesteps
        tsc.calls.clear()
        planned(GuidedDenoiser(denoiser.inner_model, Two(other)), X, SIGMA, **args)
        assert tsc.calls == rows


def test_a_level_that_was_not_foreseen_is_planned_as_it_comes() -> None:
    denoiser, _ = spied(CFG(3.0))
    tsc: Any = denoiser.inner_model.tsc
    bound = denoiser.bind(X, SIGMA, cond=COND_TEXT, uncond=EMPTY)
    tsc.calls.clear()
    for level in (1.5, 1.5, float(SIGMA[0])):
        exact = denoiser(X, torch.full((3,), level), cond=COND_TEXT, uncond=EMPTY)
        tsc.calls.clear()
        assert torch.equal(bound(X, level).denoised, exact)
        assert sum(tsc.calls) <= 3 * 4


class LDMPlus(ELLADenoiser):
    """Another model, trained on another schedule."""

    def __init__(self) -> None:
        super().__init__(PointwiseUNet(), PointwiseTSC(),  # type: ignore[arg-type]
                         NoiseSchedule(torch.linspace(0.9, 0.1, 500)))


class Two(CFG):
    """A rule that asks a second model."""

    def __init__(self, model: Any) -> None:
        super().__init__(2.0)
        object.__setattr__(self, "model", model)

    @property
    def branches(self) -> tuple[Branch, ...]:
        return COND, UNCOND, Branch("cond", model=self.model)  # type: ignore[attr-defined]

    def at(self, levels: tuple[float, ...]) -> "Two":
        return self


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: CFG("7"), TypeError, "CFG's scale must be a number, one per sample, or a function of sigma, got '7'"),  # type: ignore[arg-type]
    (lambda: CFG(True), TypeError, "got True"),
    (lambda: CFG(None), TypeError, "got None"),  # type: ignore[arg-type]
    (lambda: CFG(math.nan), ValueError, "CFG's scale must be finite, got nan"),
    (lambda: CFG([1.0, math.inf]), ValueError, "finite, got inf"),
    (lambda: CFG([]), ValueError, r"CFG's scale must be one number, or one per sample, got \[\]"),
    (lambda: CFG([[1.0]]), TypeError, r"got \[1.0\]"),  # type: ignore[list-item]
    (lambda: CFG(torch.ones(2, 2)), TypeError, r"got \[1.0, 1.0\]"),  # type: ignore[arg-type]
    (lambda: Interval(7.0), TypeError, r"Interval wraps a guidance rule, such as CFG\(7\), got 7.0"),  # type: ignore[arg-type]
    (lambda: Interval(CFG(7), 5.0, 5.0), ValueError, "0 <= sigma_lo < sigma_hi, got 5.0 and 5.0"),
    (lambda: Interval(CFG(7), -1.0), ValueError, "got -1.0 and inf"),
    (lambda: Interval(CFG(7), 0.0, math.nan), ValueError, "got 0.0 and nan"),
    (lambda: GuidedDenoiser(NETWORK.inner_model, 7.0), TypeError, r"a rule, such as CFG\(7\), got 7.0"),  # type: ignore[arg-type]
])
def test_rules_that_cannot_be(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(("rule", "args", "error", "message"), [
    (CFG([1.0, 2.0]), {}, ValueError, "CFG has 2 scales for a batch of 3: give one, or one per sample"),
    (CFG([1.0, 1.0]), {}, ValueError, "CFG has 2 scales for a batch of 3"),
    (CFG([2.0] * 4), {}, ValueError, "CFG has 4 scales for a batch of 3"),
    (Interval(CFG([2.0, 2.0]), 9.0), {}, ValueError, "CFG has 2 scales for a batch of 3"),
    (CFG(lambda s: math.inf), {}, ValueError, "the scale's function gives inf at sigma 5: expected a finite number"),
    (CFG(2.0), {"uncond": None}, ValueError, r"CFG\(scale=2.0\) needs uncond: pass uncond=t5\(\"\"\), or a negative"),
    (CFG(2.0), {"cond": None}, TypeError, r"guidance needs a condition: pass cond=t5\(prompt\)"),
    (CFG(2.0), {"cond": features(3, 3)}, ValueError, "^cond has 2 rows and the batch 3: give one row, or one per"),
    (CFG(2.0), {"image": features(3, 3)}, ValueError, "^image has 2 rows and the batch 3"),
    (CFG(2.0), {"cond_scale": 7.0}, TypeError, "the scale belongs to the rule"),
    (Two(LDMPlus()), {"uncond": None}, ValueError, "needs uncond"),
])
def test_calls_that_cannot_be(rule: Any, args: dict[str, Any], error: type[Exception], message: str) -> None:
    denoiser, _ = spied(rule)
    with pytest.raises(error, match=message):
        denoiser(X, SIGMA, **{"cond": COND_TEXT, "uncond": EMPTY, **args})
