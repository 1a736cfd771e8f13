"""Conditionings that change with sigma: which prompt holds where, rows on different sides, and what cannot be said."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ella_kd import ELLA, Channels, Concat, LDMDenoiser, Lerp, Switch, lerp_features, window
from ella_kd.conditioning import And, Conditioning, Constant, Plan, Stack, levels_of
from ella_kd.models.text import TextFeatures
from ella_kd.models.unet import UNet, UNetConfig
from tiny import FEATURES, WIDTH, PointwiseUNet, features, noise, randomised, relative, tiny_tsc, tiny_unet

TSC = tiny_tsc()
A, B, C = (Constant(TextFeatures(torch.full((1, 2, WIDTH), value))) for value in (1.0, 2.0, 3.0))
T = torch.zeros(1)


def value_of(conditioning: Conditioning, sigma: float) -> float | None:
    tokens = conditioning.at((sigma,))(T).tokens
    return float(tokens[0, 0, 0]) if tokens.shape[1] else None


@given(st.lists(st.floats(0.01, 20), min_size=1, max_size=4, unique=True), st.floats(0.01, 20))
def test_each_part_holds_from_its_boundary_down_to_the_next(boundaries: list[float], sigma: float) -> None:
    at = sorted({float(torch.tensor(b)) for b in boundaries}, reverse=True)
    parts = [Constant(TextFeatures(torch.full((1, 1, WIDTH), float(i)))) for i in range(len(at) + 1)]
    sigma = float(torch.tensor(sigma))
    for given_as in (at, tuple(at), torch.tensor(at, dtype=torch.float64)):
        switch = Switch(*parts, at=given_as)
        assert value_of(switch, sigma) == sum(b >= sigma for b in at)
    for i, boundary in enumerate(at):
        assert value_of(switch, boundary) == i + 1
        assert value_of(switch, math.nextafter(boundary, 99) * (1 + 1e-6)) == i
    assert switch.varies
    assert not switch.at((sigma,)).varies


def test_a_single_boundary_may_be_a_number_of_any_kind() -> None:
    for at in (5, 5.0, [5.0], torch.tensor(5.0), torch.tensor([5])):
        assert value_of(Switch(A, B, at=at), 5.0) == 2
        assert value_of(Switch(A, B, at=at), 5.1) == 1
    assert value_of(Switch(A, at=()), 1.0) == 1


@pytest.mark.parametrize(("hi", "lo", "inside", "outside"), [
    (5.0, 1.0, [5.0, 2.0, 1.1], [5.1, 1.0, 0.5]), (math.inf, 1.0, [9.0, 1.1], [1.0, 0.1]),
    (5.0, 0.0, [5.0, 0.1], [5.1, 9.0]), (math.inf, 0.0, [0.01, 100.0], [])])
def test_a_window_is_open_between_its_sigmas(hi: float, lo: float, inside: list[float], outside: list[float]) -> None:
    assert all(value_of(window(A, hi, lo, B), sigma) == 1 for sigma in inside)
    assert all(value_of(window(A, hi, lo, B), sigma) == 2 for sigma in outside)
    assert all(value_of(window(A, hi, lo), sigma) is None for sigma in outside)
    beside = Concat(window(B, hi, lo), A)
    assert all(value_of(beside, sigma) == 2 for sigma in inside)
    assert all(value_of(beside, sigma) == 1 for sigma in outside)
    assert all(beside.at((sigma,))(T).mask is None for sigma in (*inside, *outside))


def test_rows_that_a_closed_window_leaves_without_tokens_are_an_error_and_not_nan() -> None:
    denoiser, x, closed = LDMDenoiser(tiny_unet()), noise(2, 4, 8, 8), window(A, sigma_lo=2.0)
    both = torch.tensor([5.0, 1.0])
    assert denoiser(x, torch.tensor([5.0, 3.0]), closed).isfinite().all()
    assert denoiser(x, both, Concat(closed, window(B, 2.0))).isfinite().all()
    for sigma in (both, torch.tensor([1.0, 1.0])):
        with pytest.raises(ValueError, match="a row without a token to see: a closed window without `otherwise`"):
            denoiser(x, sigma, closed)
    with pytest.raises(ValueError, match="a row without a token to see"):
        denoiser(x, both, TextFeatures(noise(2, 3, WIDTH), torch.tensor([[True] * 3, [False] * 3])))


def test_a_switch_between_prompts_of_one_row_and_of_many_keeps_its_place_in_a_stack() -> None:
    """The part that holds may have fewer rows than the switch: its neighbours in the stack must not move up."""
    two = Constant(features(3, 2, seed=8, width=WIDTH))
    for first in (Switch(A, two, at=1.0), Concat(Switch(A, two, at=1.0), window(B, 3.0)),
                  Channels(Switch(A, two, at=1.0), torch.ones(1, 1, 2, 2))):
        other: Conditioning = C if not isinstance(first, Channels) else Channels(C, torch.zeros(1, 1, 2, 2))
        stack = Stack(first, other)
        assert stack.rows == 3
        for levels in ((5.0,), (0.5,), (5.0, 0.5, 0.5), (0.5, 5.0, 5.0)):
            decided = stack.at(levels)
            assert decided.rows == 3
            context = decided(torch.zeros(3))
            assert context.tokens[2, 0, 0] == 3
            assert len(context.tokens) == 3


def test_channels_switch_with_their_part() -> None:
    """Rows on both sides of a boundary see their own image, as they do when all are on one side."""
    unet = randomised(UNet(UNetConfig(6, 4, 32, (1, 2), 1, (True, True), WIDTH, 2)), 0, 0.1)
    denoiser, x = LDMDenoiser(unet), noise(2, 4, 8, 8)
    images = noise(2, 2, 8, 8, seed=7)
    switch = Switch(Channels(A, images[:1]), Channels(B, images[1:]), at=1.0)
    sigma = torch.tensor([5.0, 0.5])
    both = denoiser(x, sigma, switch)
    for row, part in enumerate(switch.parts):
        assert relative(both[row:row + 1], denoiser(x[row:row + 1], sigma[row:row + 1], part)) < 1e-5
    with pytest.raises(ValueError, match="channels beside x for all of its conditionings or for none"):
        denoiser(x, sigma, Switch(Channels(A, images[:1]), B, at=1.0))


def test_a_stack_of_one_row_fits_every_batch() -> None:
    for stack in (Stack(A), Stack(Stack(A)), Stack(Switch(A, B, at=1.0))):
        assert stack.rows == 1
        assert stack.at((5.0,))(torch.zeros(3)).tokens.shape == (3, 2, WIDTH)
    mixed = Stack(Switch(A, B, at=1.0)).at((5.0, 0.5, 2.0))(torch.zeros(3))
    assert mixed.tokens[:, 0, 0].tolist() == [1, 2, 1]


def test_a_decided_switch_repeats_its_decisions() -> None:
    decided = Switch(A, B, at=1.0).at((5.0, 0.5))
    many = decided.repeat(2)
    assert many.rows == 4
    assert many(torch.zeros(4)).tokens[:, 0, 0].tolist() == [1, 1, 2, 2]
    with pytest.raises(ValueError, match="a switch was decided for 2 rows, and the batch has 3"):
        decided(torch.zeros(3))


def test_lerp_goes_from_one_prompt_to_the_other() -> None:
    a, b = (ELLA(TSC, features(3, seed=seed)) for seed in (1, 2))
    t = torch.tensor([500.0, 20.0])
    for weight in (0.0, 0.25, 1.0, 1.5):
        expected = (1 - weight) * a(t).tokens + weight * b(t).tokens
        assert relative(Lerp(a, b, weight)(t).tokens, expected) < 1e-6
        text = lerp_features(a.features, b.features, weight)
        assert relative(text.tokens, (1 - weight) * a.features.tokens + weight * b.features.tokens) < 1e-6
    masked = TextFeatures(noise(1, 3, FEATURES), torch.tensor([[True, True, False]]))
    assert lerp_features(masked, masked, 0.5).mask is masked.mask


def test_levels_are_those_of_the_rows_or_the_one_of_all() -> None:
    assert levels_of(torch.tensor([0.1, 0.1])) == (float(torch.tensor(0.1)),)
    assert levels_of(torch.tensor([0.5, 2.0])) == (0.5, 2.0)


MASKED = TextFeatures(noise(1, 3, WIDTH), torch.tensor([[True, True, False]]))


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: Switch(A, B, at=()), ValueError, r"between 2 conditionings needs 1 falling sigmas, got \[\]"),
    (lambda: Switch(A, B, C, at=(1.0, 5.0)), ValueError, r"needs 2 falling sigmas, got \[1.0, 5.0\]"),
    (lambda: Switch(A, B, C, at=(1.0, 1.0)), ValueError, "needs 2 falling sigmas"),
    (lambda: Switch(A, B, at=math.nan), ValueError, r"falling sigmas, got \[nan\]"),
    (lambda: Switch(A, B, at=math.inf), ValueError, r"falling sigmas, got \[inf\]"),
    (lambda: Switch(at=()), ValueError, "a switch between 0 conditionings"),
    (lambda: Switch(A, features(3), at=1.0), TypeError, "Switch takes conditionings, got TextFeatures: features"),  # type: ignore[arg-type]
    (lambda: Switch(clip(2), clip(3), at=1.0), ValueError, r"of one row or of equal rows, got rows \[2, 3\]"),
    (lambda: Switch(A, B, at=1.0)(T), ValueError, r"decided by sigma.*call conditioning.at\(\(sigma,\)\)\(t\)"),
    (lambda: window(A, 1.0, 1.0), ValueError, "0 <= sigma_lo < sigma_hi, got 1.0 and 1.0"),
    (lambda: window(A, 1.0, -1.0), ValueError, "got -1.0 and 1.0"),
    (lambda: window(A, math.nan), ValueError, "a window needs"),
    (lambda: Stack(), ValueError, "Stack takes at least one conditioning"),
    (lambda: Stack("a"), TypeError, "Stack takes conditionings, got str"),  # type: ignore[arg-type]
    (lambda: Stack(A, B)(torch.zeros(3)), ValueError, "the stack has 2 rows and the batch 3: a stack does not"),
    (lambda: Stack(A, image(A))(torch.zeros(2)), ValueError, "channels beside x for all of its conditionings or"),
    (lambda: Concat(A, Constant(features(2, width=5)))(T), ValueError, r"tokens of one width, got \[24, 5\]"),
    (lambda: Concat(image(A), image(B))(T), ValueError, "two parts of one conditioning have channels"),
    (lambda: image(image(A))(T), ValueError, "two parts of one conditioning have channels"),
    (lambda: Channels(A, torch.ones(2, 2)), ValueError, r"channels must be \[B, C, h, w\], got \[2, 2\]"),
    (lambda: Channels(clip(2), torch.ones(3, 1, 2, 2)), ValueError, r"equal rows, got rows \[2, 3\]"),
    (lambda: Channels("a", torch.ones(1, 1, 2, 2)), TypeError, "Channels takes conditionings, got str"),  # type: ignore[arg-type]
    (lambda: Lerp(A, B, math.nan), ValueError, "the weight of Lerp must be finite, .* got nan"),
    (lambda: Lerp(A, Constant(MASKED), 0.5)(T), ValueError, r"Lerp needs tokens of one shape without a mask, got"),
    (lambda: Lerp(A, clip(1), 0.5)(T), ValueError, r"got \[1, 2, 24\] and \[1, 1, 24\]"),
    (lambda: lerp_features(features(3), features(4), 0.5), ValueError, "features of one shape and one mask"),
    (lambda: lerp_features(MASKED, TextFeatures(MASKED.tokens), 0.5), ValueError, "max_length=128, or use Lerp"),
    (lambda: ELLA(TSC, features(3), torch.tensor([0.0])), ValueError, r"prompt must be int64 \[rows\].*float32 \[1\]"),
    (lambda: ELLA(TSC, features(3), torch.tensor(0)), ValueError, r"got torch.int64 \[\]"),
    (lambda: ELLA(TSC, clip(1).features), ValueError, "the connector takes features of width 12, got 24"),
    (lambda: Constant(TextFeatures(torch.ones(1, 0, 3))), ValueError, "B and L at least 1"),
    (lambda: Constant(TextFeatures(torch.ones(1, 2, 3), torch.ones(1, 2).long())), ValueError, "got torch.int64"),
    (lambda: clip(2)(torch.zeros(3)), ValueError, "the conditioning has 2 rows and the batch 3: give one row"),
    (lambda: ELLA(TSC, features(3)).planned(Plan((1.0,), T[:1], [1.0]))(T), ValueError, r"at\(\(sigma,\)\)\(t\)"),
    (lambda: Concat(And((A, 1.0)), B), TypeError, "Concat combines tokens, and And what the network answers"),
    (lambda: And((A, 1.0))(T), TypeError, "And combines several answers of the network"),
])
def test_what_cannot_be_combined(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def clip(rows: int) -> Constant:
    return Constant(features(*range(1, rows + 1), width=WIDTH))


def image(part: Conditioning) -> Channels:
    return Channels(part, torch.ones(1, 1, 2, 2))


def test_a_denoiser_decides_by_its_own_sigma_and_by_the_level_it_is_told() -> None:
    inner = LDMDenoiser(PointwiseUNet())
    a, b = (Constant(TextFeatures(torch.full((1, 1, 2), value))) for value in (0.5, 1.5))
    x, switch = noise(2, 4, 8, 8), Switch(a, b, at=1.0)

    def same(got: Tensor, *expected: Any) -> bool:
        return all(torch.equal(got[i], inner(x, torch.full((2,), 2.0 - i), one)[i]) for i, one in enumerate(expected))

    assert same(inner(x, torch.tensor([2.0, 1.0]), switch), a, b)
    assert torch.equal(inner.bind(x, cond=switch)(x, 2.0).denoised, inner(x, torch.full((2,), 2.0), a))
