from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ella_kd import CFG, ELLA, CFGDenoiser, Concat, Conditioning, Constant, ELLADenoiser, GuidedDenoiser
from ella_kd.denoiser import LDMDenoiser
from tiny import WIDTH, PointwiseTSC, PointwiseUNet, features, noise, planned, relative, row, tiny_tsc, tiny_unet

X, SIGMA = noise(2, 4, 8, 8) * 5, torch.tensor([5.0, 0.3])
LENGTHS = st.lists(st.integers(1, 9), min_size=2, max_size=2)
KINDS = st.sampled_from(["ella", "clip", "ella + clip"])


def pointwise() -> tuple[CFGDenoiser, PointwiseUNet, PointwiseTSC]:
    unet, tsc = PointwiseUNet(), PointwiseTSC()
    return CFGDenoiser(ELLADenoiser(unet, tsc)), unet, tsc  # type: ignore[arg-type]


def conditioning(kind: str, lengths: list[int], tsc: object, seed: int) -> Conditioning:
    ella = ELLA(tsc, features(*lengths, seed=seed))  # type: ignore[arg-type]
    clip = Constant(features(*lengths, seed=seed, width=WIDTH))
    return {"ella": ella, "clip": clip, "ella + clip": Concat(ella, clip)}[kind]


@settings(max_examples=30)
@given(KINDS, KINDS, LENGTHS, st.integers(1, 9))
def test_one_call_equals_two_whatever_the_kinds_and_lengths(first: str, second: str, lengths: list[int],
                                                            length: int) -> None:
    inner = ELLADenoiser(tiny_unet(), tiny_tsc())
    cond, uncond = conditioning(first, lengths, inner.tsc, 2), conditioning(second, [length], inner.tsc, 9)
    c, u = inner(X, SIGMA, cond), inner(X, SIGMA, uncond)
    got = CFGDenoiser(inner).predict(X, SIGMA, cond=cond, uncond=uncond, cond_scale=7.5)
    assert got.uncond is not None
    assert relative(got.cond, c) < 1e-5
    assert relative(got.uncond, u) < 1e-5
    assert relative(got.denoised, u + 7.5 * (c - u)) < 1e-4  # the scale magnifies what rounding left of c - u


def test_guided_batch_equals_single_runs_planned_or_not() -> None:
    denoiser = CFGDenoiser(ELLADenoiser(tiny_unet(), tiny_tsc()))
    cond, uncond = features(7, 1, 3, 5), features(1, seed=9)
    x, sigma = noise(4, 4, 8, 8) * 4, torch.tensor([0.1, 1.0, 5.0, 14.0])
    args: dict[str, Any] = {"cond": cond, "uncond": uncond, "cond_scale": 3.0}
    batch = denoiser(x, sigma, **args)
    assert relative(planned(denoiser, x, sigma, **args).denoised, batch) < 1e-5
    for i in range(4):
        one = denoiser(x[i:i + 1], sigma[i:i + 1], cond=row(cond, i), uncond=uncond, cond_scale=3.0)
        assert relative(batch[i:i + 1], one) < 1e-5


@given(LENGTHS, st.floats(-2, 15))
def test_planned_equals_unplanned_bitwise_for_a_pointwise_model(lengths: list[int], scale: float) -> None:
    denoiser, _, tsc = pointwise()
    args: dict[str, Any] = {"cond": features(*lengths), "uncond": features(1, seed=9), "cond_scale": scale}
    exact = denoiser(X, SIGMA, **args)
    tsc.calls.clear()
    assert torch.equal(planned(denoiser, X, SIGMA, **args).denoised, exact)
    assert tsc.calls == [2 * 3]  # one call: two timesteps for three prompts


def test_scale_1_is_the_plain_model_and_evaluates_no_uncond() -> None:
    for inner in (pointwise()[0].inner_model, ELLADenoiser(tiny_unet(), tiny_tsc())):
        denoiser, cond, uncond = CFGDenoiser(inner), features(4, 2), features(1, seed=9)
        rows: list[int] = []
        inner.inner_model.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(len(args[0])))
        plain = inner(X, SIGMA, cond)
        for args in ({}, {"uncond": uncond}, {"uncond": uncond, "cond_scale": 1.0}):
            prediction = denoiser.predict(X, SIGMA, cond=cond, **args)
            assert prediction.uncond is None
            assert torch.equal(prediction.denoised, plain)
            assert torch.equal(prediction.cond, plain)
            assert torch.equal(denoiser(X, SIGMA, cond=cond, **args), plain)
        assert set(rows) == {2}
        denoiser(X, SIGMA, cond=cond, uncond=uncond, cond_scale=2)
        assert rows[-1] == 4  # and both branches in one call


def test_uncond_is_evaluated_at_scale_1_when_asked_for() -> None:
    denoiser, _, _ = pointwise()
    cond, uncond = features(4, 2), features(1, seed=9)
    prediction = denoiser.predict(X, SIGMA, True, cond=cond, uncond=uncond)
    assert prediction.uncond is not None
    assert torch.equal(prediction.uncond, denoiser.inner_model(X, SIGMA, uncond))
    assert torch.equal(prediction.denoised, denoiser.inner_model(X, SIGMA, cond))
    assert torch.equal(prediction.cond, prediction.denoised)


def test_scale_0_is_the_uncond() -> None:
    denoiser, _, _ = pointwise()
    got = denoiser(X, SIGMA, cond=features(4, 2), uncond=features(1, seed=9), cond_scale=0)
    assert torch.equal(got, denoiser.inner_model(X, SIGMA, features(1, seed=9)))


def test_attributes_are_those_of_the_inner_denoiser() -> None:
    inner = LDMDenoiser(PointwiseUNet(), quantize=True)
    outer, sigma = CFGDenoiser(inner), torch.tensor([1.234])
    assert (outer.sigma_min, outer.sigma_max) == (inner.sigma_min, inner.sigma_max)
    for name in ("sigmas", "log_sigmas"):
        assert torch.equal(getattr(outer, name), getattr(inner, name))
    assert outer.sigma_to_t(sigma) == inner.sigma_to_t(sigma)
    assert outer.sigma_to_t(sigma, quantize=False) == inner.sigma_to_t(sigma, quantize=False) != inner.sigma_to_t(sigma)
    assert outer.t_to_sigma(torch.tensor(5.5)) == inner.t_to_sigma(torch.tensor(5.5))
    assert torch.equal(outer.get_sigmas(5), inner.get_sigmas(5))
    assert outer.inner_model is inner


@pytest.mark.parametrize(("args", "error", "message"), [
    ({"cond": features(3), "cond_scale": 7.0}, ValueError, r"CFG\(scale=7.0\) needs uncond: pass uncond=t5\(\"\"\)"),
    ({"cond": features(3, 3, 3), "uncond": features(1), "cond_scale": 7.0}, ValueError, "^cond has 3 rows .* batch 2"),
    ({"cond": features(3), "uncond": features(1, 2, 3), "cond_scale": 2}, ValueError, "^uncond has 3 rows .* batch 2"),
    ({"cond": features(3, 3, 3)}, ValueError, "has 3 rows and the batch 2"),
    ({"cond": features(3), "uncond": features(1, width=5), "cond_scale": 2}, ValueError, "width 12, got 5"),
    ({"cond": features(3), "uncond": "blurry", "cond_scale": 2}, TypeError, "got str"),
    ({"uncond": features(1)}, TypeError, "cond"),
    ({"cond": None, "uncond": features(1)}, TypeError, "needs a condition"),
])
def test_bad_arguments(args: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pointwise()[0](X, SIGMA, **args)


def test_guidance_is_of_a_denoiser_that_is_not_guided() -> None:
    inner = pointwise()[0].inner_model
    for wrong, says in ((CFGDenoiser(inner), "guided already"), (PointwiseUNet(), "takes a denoiser, such as ELLA")):
        with pytest.raises(TypeError, match=says):
            CFGDenoiser(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes a network, .* got the denoiser CFGDenoiser"):
        LDMDenoiser(CFGDenoiser(inner))
    with pytest.raises(TypeError, match="put a CFGDenoiser around this ELLADenoiser"):
        inner.bind(X, cond=features(3), need_uncond=True)


def test_a_rule_has_its_own_scale() -> None:
    denoiser = GuidedDenoiser(pointwise()[0].inner_model, CFG(7))
    with pytest.raises(TypeError, match=r"the scale belongs to the rule, here CFG\(scale=7.0\)"):
        denoiser(X, SIGMA, cond=features(3), uncond=features(1), cond_scale=3.0)
