"""And and Regions: the weighted sum of what the network says to each prompt alone, in as few rows as that takes."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ella_kd import ELLA, And, Box, Concat, ELLADenoiser, Mask, Regions, Switch
from ella_kd.conditioning import Conditioning, Constant
from ella_kd.guidance import CFG, COND, UNCOND, GuidedDenoiser
from strategies import DRAWN, FEATHERS, boxes
from tiny import WIDTH, PointwiseTSC, PointwiseUNet, features, noise, planned, relative, tiny_tsc, tiny_unet

H, W = 6, 8
X, SIGMA = noise(2, 4, H, W) * 5, torch.tensor([5.0, 0.3])
Spec = Any
"""The number of a prompt; ("and", ((spec, weight), ...)); ("regions", ((spec, area), ...), background, feather)."""
WEIGHTS: tuple[Any, ...] = (-0.5, 0.0, 0.3, 1.0, 1.5, lambda sigma: sigma / 5, lambda sigma: 0.7 if sigma > 1 else 1.0)



@st.composite
def compositions(draw: Any, depth: int = 2) -> Spec:
    part = st.integers(0, 2) if depth == 1 else st.one_of(st.integers(0, 2), compositions(depth - 1))
    n = draw(st.integers(1, 3))
    parts = [draw(part) for _ in range(n)]
    if draw(st.booleans()):
        return "and", tuple((p, draw(st.sampled_from(WEIGHTS))) for p in parts)
    areas = tuple((p, draw(st.one_of(boxes(), DRAWN))) for p in parts)
    return "regions", areas, draw(st.one_of(st.none(), part)), draw(FEATHERS)


def build(spec: Spec, prompts: list[Any]) -> Any:
    if isinstance(spec, int):
        return prompts[spec]
    if spec[0] == "and":
        return And(*((build(part, prompts), weight) for part, weight in spec[1]))
    background = None if spec[2] is None else build(spec[2], prompts)
    return Regions(*((build(part, prompts), area) for part, area in spec[1]), background=background, feather=spec[3])


def naive(spec: Spec, answers: list[Tensor], uncond: Tensor, sigma: float) -> Tensor:
    """The composition of one sample's answers [C, h, w], by its definition."""
    if isinstance(spec, int):
        return answers[spec]
    parts = [naive(part, answers, uncond, sigma) for part, _ in spec[1]]
    if spec[0] == "and":
        weights = [weight(sigma) if callable(weight) else weight for _, weight in spec[1]]
        return sum(w * part for w, part in zip(weights, parts)) + (1 - sum(weights)) * uncond
    drawn = torch.stack([area.draw(H, W, spec[3]) for _, area in spec[1]])
    shares = (drawn / drawn.sum(0).clamp(min=1)).to(uncond)
    rest = uncond if spec[2] is None else naive(spec[2], answers, uncond, sigma)
    return sum(share * part for share, part in zip(shares, parts)) + (1 - shares.sum(0)) * rest


def prompts_of(tsc: Any) -> list[Conditioning]:
    """One row for all, ELLA's tokens; one per sample, with padding; and CLIP's, of another length."""
    return [ELLA(tsc, features(4, seed=5)), ELLA(tsc, features(3, 6, seed=6)),
            Constant(features(7, seed=7, width=2 if isinstance(tsc, PointwiseTSC) else WIDTH))]


POINTWISE = ELLADenoiser(PointwiseUNet(), PointwiseTSC())  # type: ignore[arg-type]
NETWORK = ELLADenoiser(tiny_unet(), tiny_tsc())


def check(inner: ELLADenoiser, spec: Spec, scale: float, together: bool, sigma: Tensor) -> None:
    prompts, empty = prompts_of(inner.tsc), ELLA(inner.tsc, features(1, seed=9))
    alone = [inner(X, sigma, prompt) for prompt in prompts]
    u = inner(X, sigma, empty)
    c = torch.stack([naive(spec, [a[i] for a in alone], u[i], float(sigma[i])) for i in range(2)])
    guided = GuidedDenoiser(inner, CFG(scale), together)
    args: dict[str, Any] = {"cond": build(spec, prompts), "uncond": empty}
    for got in (guided.predict(X, sigma, need_uncond=True, **args), planned(guided, X, sigma, True, **args)):
        size = max(float(a.double().norm()) for a in (*alone, u))
        assert float((got.cond - c).norm()) < 1e-5 * size * 4  # weights above 1 magnify rounding
        assert got.uncond is not None
        assert relative(got.uncond, u) < 1e-5
        assert float((got.denoised - (u + scale * (c - u))).norm()) < 1e-4 * size
    as_uncond = guided.predict(X, sigma, True, cond=prompts[0], uncond=build(covering(spec), prompts))
    expected = torch.stack([naive(covering(spec), [a[i] for a in alone], u[i], float(sigma[i])) for i in range(2)])
    assert as_uncond.uncond is not None
    assert float((as_uncond.uncond - expected).norm()) < 1e-4 * size


def covering(spec: Spec) -> Spec:
    """The same where nothing is left for the uncond."""
    if isinstance(spec, int):
        return spec
    if spec[0] == "and":
        part, weight = spec[1][0]
        weight = 0.5 if callable(weight) else weight
        return "and", ((covering(part), weight), (0, 1.0 - weight))
    return "regions", tuple((covering(p), area) for p, area in spec[1]), covering(spec[2] or 0), spec[3]


@settings(max_examples=100)
@given(compositions(), st.sampled_from((0.0, 1.0, 2.5)), st.booleans(), st.booleans())
def test_a_composition_is_the_weighted_sum_of_separate_answers(spec: Spec, scale: float, together: bool,
                                                              mixed: bool) -> None:
    check(POINTWISE, spec if not isinstance(spec, int) else ("and", ((spec, 1.0),)), scale, together,
          SIGMA if mixed else torch.tensor([2.0, 2.0]))


@settings(max_examples=15)
@given(compositions(), st.booleans())
def test_so_it_is_with_networks(spec: Spec, together: bool) -> None:
    check(NETWORK, spec, 2.5, together, SIGMA)


@settings(max_examples=100)
@given(compositions(3))
def test_weights_sum_to_1_at_every_pixel_and_each_prompt_is_asked_once(spec: Spec) -> None:
    prompts = prompts_of(PointwiseTSC())
    terms = build(spec, prompts).terms(H, W, (5.0, 0.3))
    total = sum(torch.as_tensor(weight, dtype=torch.float64).expand(2, 1, H, W) for _, weight in terms)
    assert torch.allclose(torch.as_tensor(total), torch.ones(2, 1, H, W, dtype=torch.float64), rtol=0, atol=1e-12)
    assert len({term for term, _ in terms}) == len(terms)
    assert all(bool((torch.as_tensor(weight).abs() > 1e-9).any()) for _, weight in terms)


class Spy:
    """A guided denoiser on a pointwise model, and the rows of each of the UNet's calls."""

    def __init__(self, scale: float = 3.0, together: bool = True) -> None:
        self.unet, tsc = PointwiseUNet(), PointwiseTSC()
        self.inner = ELLADenoiser(self.unet, tsc)  # type: ignore[arg-type]
        self.guided = GuidedDenoiser(self.inner, CFG(scale), together)
        self.a, self.b, self.c = (ELLA(tsc, features(3, seed=s)) for s in (5, 6, 7))  # type: ignore[arg-type]
        self.empty = ELLA(tsc, features(1, seed=9))  # type: ignore[arg-type]

    def rows(self, cond: Any, uncond: Any = None) -> list[int]:
        self.unet.t.clear()
        self.guided(X, SIGMA, cond=cond, uncond=self.empty if uncond is None else uncond)
        return [len(t) for t in self.unet.t]


LEFT, RIGHT, ALL = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1), Box(0, 0, 1, 1)


@pytest.mark.parametrize(("make", "scale", "prompts"), [
    (lambda s: And((s.a, 1.0), (s.b, -0.5)), 3.0, 3),
    (lambda s: And((s.a, 1.0), (s.b, -0.5)), 1.0, 3),  # what is left is uncond's
    (lambda s: And((s.a, 1.5), (s.b, -0.5)), 1.0, 2),  # nothing is left
    (lambda s: And((s.a, 0.7), (s.b, 0.0)), 3.0, 2),
    (lambda s: And((s.a, 0.0),), 3.0, 1),
    (lambda s: And((s.a, 0.5), (s.a, 0.5)), 3.0, 2),
    (lambda s: And((s.a, 0.5), (s.b, 1), (s.a, -0.5)), 1.0, 1),
    (lambda s: And((s.empty, 0.3), (s.a, 0.7)), 3.0, 2),
    (lambda s: Regions((s.a, LEFT), (s.b, RIGHT)), 1.0, 2),
    (lambda s: Regions((s.a, LEFT), (s.b, RIGHT)), 3.0, 3),
    (lambda s: Regions((s.a, LEFT), (s.b, RIGHT), background=s.c), 1.0, 2),  # a background that is nowhere
    (lambda s: Regions((s.a, LEFT), background=s.c), 1.0, 2),
    (lambda s: Regions((s.a, LEFT)), 1.0, 2),
    (lambda s: Regions((s.a, LEFT), (s.b, Mask(torch.zeros(3, 3)))), 3.0, 2),
    (lambda s: Regions((And((s.a, 1.0), (s.c, 0.5)), LEFT), (s.b, RIGHT)), 3.0, 4),
    (lambda s: Regions((And((s.a, 1.0), (s.c, 0.5)), Mask(torch.zeros(3, 3))), (s.b, ALL)), 3.0, 2),
    (lambda s: Regions((s.a, LEFT), (s.a, RIGHT), feather=0.2), 1.0, 1),
])
@pytest.mark.parametrize("together", [True, False])
def test_each_prompt_that_counts_is_evaluated_once(make: Callable[[Spy], Any], scale: float, prompts: int,
                                                   together: bool) -> None:
    spy = Spy(scale, together)
    assert spy.rows(make(spy)) == ([2 * prompts] if together else [2] * prompts)


@pytest.mark.parametrize("make", [
    lambda s: And((s.a, 1.0)), lambda s: And((s.a, 1.0), (s.b, 0.0)), lambda s: And((s.a, lambda sigma: 1.0)),
    lambda s: And((s.a, 0.5), (s.a, 0.5)), lambda s: Regions((s.a, ALL)), lambda s: Regions((s.a, ALL), (s.a, LEFT)),
    lambda s: Regions((s.a, LEFT), (s.a, RIGHT)), lambda s: Regions((s.a, LEFT), (s.a, RIGHT), feather=0.3),
    lambda s: Regions((s.b, Mask(torch.zeros(2, 2))), background=s.a), lambda s: And((Regions((s.a, ALL)), 1.0)),
    lambda s: Regions((s.a, Box(0, 0, 0.3, 1)), (And((s.a, 1.0)), Box(0.3, 0, 1, 1)), background=s.b),
])
def test_one_term_is_the_plain_prompt_bit_for_bit(make: Callable[[Spy], Any]) -> None:
    for scale in (1.0, 3.0):
        spy = Spy(scale)
        plain = spy.guided(X, SIGMA, cond=spy.a, uncond=spy.empty)
        assert torch.equal(spy.guided(X, SIGMA, cond=make(spy), uncond=spy.empty), plain)


def test_switches_inside_are_decided_and_plans_cover_all_parts() -> None:
    spy = Spy()
    cond = Regions((Switch(spy.a, spy.b, at=1.0), LEFT), background=And((Switch(spy.c, spy.a, at=1.0), 0.8)))
    first = Regions((spy.a, LEFT), background=And((spy.c, 0.8)))
    second = Regions((spy.b, LEFT), background=And((spy.a, 0.8)))
    args: dict[str, Any] = {"cond": cond, "uncond": spy.empty}
    tsc: Any = spy.inner.tsc
    tsc.calls.clear()
    ready = planned(spy.guided, X, SIGMA, **args)
    assert tsc.calls == [2 * 4]
    for got in (ready.denoised, spy.guided(X, SIGMA, **args)):
        for row, expected in enumerate((first, second)):
            alone = spy.guided(X[row:row + 1], SIGMA[row:row + 1], cond=expected, uncond=spy.empty)
            assert relative(got[row:row + 1], alone) < 1e-6
    assert cond.varies
    assert cond.repeat(2).rows == 2
    assert not first.varies


def test_samples_of_a_composition_stand_side_by_side() -> None:
    spy = Spy()
    two = ELLA(spy.a.tsc, features(3, 5, seed=11))
    many = And((two, 0.6), (spy.b, 0.7)).repeat(2)
    assert many.rows == 4
    x, sigma = X[:1].expand(4, -1, -1, -1), torch.full((4,), 2.0)
    got = spy.guided(x, sigma, cond=many, uncond=spy.empty)
    expected = spy.guided(x[:2], sigma[:2], cond=And((two, 0.6), (spy.b, 0.7)), uncond=spy.empty)
    assert relative(got, expected[[0, 0, 1, 1]]) < 1e-6


def test_compositions_are_values() -> None:
    spy = Spy()
    both = And((spy.a, 1.0), (spy.b, 0.5))
    with pytest.raises(FrozenInstanceError, match="amounts cannot be set"):
        both.amounts = (1.0, 2.0)
    values = torch.ones(2, 2, dtype=torch.float64)
    mask = Mask(values)
    values.zero_()
    assert mask.draw(2, 2, 0.0).min() == 1


A = features(3)


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: And(), ValueError, r"And takes pairs"),
    (lambda: And(A), ValueError, r"And takes pairs"),  # type: ignore[arg-type]
    (lambda: And((A, 1.0, 2.0)), ValueError, r"And takes pairs"),  # type: ignore[arg-type]
    (lambda: And((5, 1.0)), TypeError, "got int"),
    (lambda: And((features(3, 3), 0.5), (features(3, 3, 3), 0.5)), ValueError, r"And takes .* got rows \[2, 3\]"),
    (lambda: And(("a cat", 1.0)), TypeError, "And takes encoded prompts, got the text 'a cat'"),
    (lambda: And((A, "much")), TypeError, "a weight of And must be a number"),  # type: ignore[arg-type]
    (lambda: And((A, True)), TypeError, "a weight of And must be a number"),
    (lambda: And((A, torch.inf)), ValueError, "a weight of And must be finite"),
    (lambda: And((A, [1.0, 2.0])), ValueError, "a weight of And must be one number, got"),
    (lambda: Box(0.5, 0, 0.5, 1), ValueError, "0 <= left < right <= 1"),
    (lambda: Box(0, 0.5, 1, 0.2), ValueError, "0 <= top < bottom <= 1"),
    (lambda: Box(0, 0, 1.5, 1), ValueError, "a box needs"),
    (lambda: Box(0, torch.nan, 1, 1), ValueError, "a box needs"),
    (lambda: Mask(torch.ones(1, 2, 2)), ValueError, r"\[H, W\], got \[1, 2, 2\]"),
    (lambda: Mask(torch.ones(0, 2)), ValueError, r"\[H, W\], got \[0, 2\]"),
    (lambda: Mask(torch.full((2, 2), 255.0)), ValueError, "from 0 to 1, got 255 to 255: divide grey levels by 255"),
    (lambda: Mask(torch.full((2, 2), torch.nan)), ValueError, "from 0 to 1"),
    (lambda: Regions(), ValueError, "Regions takes pairs"),
    (lambda: Regions((A, (0, 0, 1, 1))), ValueError, "Regions takes pairs"),  # type: ignore[arg-type]
    (lambda: Regions((A, ALL), feather=-0.1), ValueError, "feather is a fraction"),
    (lambda: Regions((A, ALL), feather=torch.nan), ValueError, "feather is a fraction"),
    (lambda: Regions(("a cat", ALL)), TypeError, "Regions takes encoded prompts"),
    (lambda: Regions((A, ALL), background="a cat"), TypeError, "Regions takes encoded prompts"),
])
def test_what_cannot_be_composed(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(("cond", "uncond", "error", "message"), [
    (And((A, 0.5)), None, ValueError, r"weights of cond do not sum to 1 .* pass uncond=t5"),
    (Regions((A, LEFT)), None, ValueError, r"weights of cond do not sum to 1 .* pass uncond=t5"),
    (A, And((A, 0.5)), ValueError, r"weights of uncond do not sum to 1 .* give Regions a background"),
    (And((features(3, 3, 3), 1.0)), A, ValueError, "^cond has 3 rows and the batch 2"),
    (And((A, lambda sigma: torch.nan)), A, ValueError, "the scale's function gives nan at sigma 5"),
])
def test_what_cannot_be_evaluated(cond: Any, uncond: Any, error: type[Exception], message: str) -> None:
    guided = GuidedDenoiser(POINTWISE, CFG(2.0) if uncond is not None else CFG(1.0))
    with pytest.raises(error, match=message):
        guided(X, SIGMA, cond=cond, uncond=uncond)


def test_a_denoiser_without_guidance_takes_what_needs_no_uncond() -> None:
    a, b = (POINTWISE(X, SIGMA, features(3, seed=seed)) for seed in (5, 6))
    both = And((features(3, seed=5), 0.3), (features(3, seed=6), 0.7))
    assert relative(POINTWISE(X, SIGMA, both), 0.3 * a + 0.7 * b) < 1e-6
    with pytest.raises(ValueError, match=r"do not sum to 1 .* to a guided denoiser"):
        POINTWISE(X, SIGMA, And((A, 0.5)))
    with pytest.raises(TypeError, match="Concat combines tokens, and And what the network answers"):
        Concat(And((A, 1.0)))


def test_branches_are_those_of_cond_and_uncond() -> None:
    assert CFG(2.0).branches == (COND, UNCOND)
