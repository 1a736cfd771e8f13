import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ella_kd.denoiser import LDMDenoiser
from ella_kd.guidance import CFG, COND, UNCOND, Answers, Branch, GuidedDenoiser
from ella_kd.guidance.branches import IMAGE, AutoGuidance, InstructPix2Pix
from ella_kd.guidance.thresholds import Rescale
from ella_kd.models.noise_schedule import NoiseSchedule
from rules import ANSWERS, SCALES, SEVERAL, check_scales, check_value, close, in_eps, make_answers, rows, with_answer
from tiny import PointwiseUNet, features, noise

WEAK = LDMDenoiser(PointwiseUNet())
WEAKLY = Branch("cond", model=WEAK)


def with_weak(answers: Answers) -> Answers:
    return with_answer(answers, WEAKLY, answers[IMAGE])


@given(ANSWERS, SCALES, SCALES)
def test_autoguidance_is_its_formula_and_adds_to_other_guidance(answers: Answers, cfg: float, scale: float) -> None:
    both = rows(answers, "cond", "uncond", "image")
    paper = [weak + scale * (c - weak) for _, _, c, _, weak in both]
    assert close(AutoGuidance(CFG(1.0), WEAK, scale)(with_weak(answers)), paper)
    added = [u + cfg * (c - u) + (scale - 1) * (c - weak) for _, _, c, u, weak in both]
    assert close(AutoGuidance(CFG(cfg), WEAK, scale)(with_weak(answers)), added)


@given(ANSWERS, SCALES, SCALES)
def test_instruct_pix2pix_is_its_formula(answers: Answers, text: float, image: float) -> None:
    wanted = [u + image * (i - u) + text * (c - i) for _, _, c, i, u in rows(answers, "cond", "image", "uncond")]
    assert close(InstructPix2Pix(text, image)(answers), wanted)


@given(ANSWERS, SCALES, SCALES)
def test_the_rules_are_linear_and_so_the_same_in_eps(answers: Answers, a: float, b: float) -> None:
    for rule in (CFG(a), AutoGuidance(CFG(a), WEAK, b), InstructPix2Pix(a, b)):
        given = with_weak(answers)
        eps = (answers.x - rule(given)) / answers.sigma
        assert torch.allclose(rule(in_eps(given)), eps, rtol=1e-9, atol=1e-9)


def test_rules_that_are_not_linear_are_not_the_same_in_eps() -> None:
    answers = make_answers()
    rule = Rescale(CFG(7.0), 0.7, "x0")
    eps = (answers.x - rule(answers)) / answers.sigma
    assert not torch.allclose(rule(in_eps(answers)), eps, rtol=1e-3)


@pytest.mark.parametrize(("text", "image", "asked"), [
    (7.5, 1.5, {COND, IMAGE, UNCOND}),
    (7.5, 1.0, {COND, IMAGE}),
    (1.0, 1.5, {COND, IMAGE, UNCOND}),
    (3.0, 3.0, {COND, UNCOND}),
    (1.0, 1.0, {COND}),
    (0.0, 1.5, {IMAGE, UNCOND}),
    (0.0, 1.0, {IMAGE}),
    (7.5, 0.0, {COND, IMAGE, UNCOND}),
    (0.0, 0.0, {UNCOND}),
    ((7.5, 2.0, 1.0), 1.0, {COND, IMAGE}),
    ((7.5, 2.0, 1.0), (7.5, 2.0, 1.0), {COND, UNCOND}),
    (1.0, (1.0, 1.0, 2.0), {COND, IMAGE, UNCOND}),
])
def test_answers_that_the_scales_cancel_are_not_asked_for(text: float, image: float, asked: set[Branch]) -> None:
    rule = InstructPix2Pix(text, image).at(())
    assert set(rule.branches) == asked
    answers = make_answers(branches=sorted(asked, key=lambda branch: branch.cond), dtype=torch.float32)
    assert rule(answers).isfinite().all()  # it reads no other answer
    if len(asked) == 1:
        assert torch.equal(rule(answers), answers[asked.pop()])


def test_equal_scales_are_plain_guidance() -> None:
    answers = make_answers()
    assert torch.allclose(InstructPix2Pix(3.0, 3.0)(answers), CFG(3.0)(answers), atol=1e-12)


@given(ANSWERS, SEVERAL, st.floats(-3, 20))
def test_a_batch_is_a_loop_of_singles_whatever_the_scales(answers: Answers, scales: list[float],
                                                          other: float) -> None:
    given = with_weak(answers)
    check_scales(lambda scale: AutoGuidance(CFG(scale), WEAK, other), given, scales)
    check_scales(lambda scale: AutoGuidance(CFG(other), WEAK, scale), given, scales)
    check_scales(lambda scale: InstructPix2Pix(scale, other), given, scales)
    check_scales(lambda scale: InstructPix2Pix(other, scale), given, scales)
    check_scales(lambda scale: InstructPix2Pix(scale, scale), given, scales)


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, 1.2, 7.5])] * 2), min_size=3, max_size=3))
def test_the_bits_of_a_row_do_not_depend_on_the_scales_of_others(pairs: list[tuple[float, float]]) -> None:
    answers = make_answers(dtype=torch.float32)
    together = InstructPix2Pix(*zip(*pairs))(answers)
    for i, (text, image) in enumerate(pairs):
        assert torch.equal(together[i], InstructPix2Pix(text, image)(answers)[i])


@pytest.mark.parametrize("cfg", [1.0, 7.0])
def test_autoguidance_of_scale_1_is_its_base_bitwise_and_leaves_the_weak_model_alone(cfg: float) -> None:
    answers = make_answers(dtype=torch.float32)
    rule = AutoGuidance(CFG(cfg), WEAK, 1)
    assert rule.branches == CFG(cfg).branches
    assert torch.equal(rule(answers), CFG(cfg)(answers))
    assert WEAKLY in AutoGuidance(CFG(cfg), WEAK, (1.0, 1.0, 2.0)).branches
    some = AutoGuidance(CFG(cfg), WEAK, (1.0, 1.0, 2.0))(with_weak(answers))
    assert torch.equal(some[:2], CFG(cfg)(answers)[:2])


def test_the_weak_model_sees_the_same_x_at_its_own_timestep_once() -> None:
    weak = LDMDenoiser(PointwiseUNet(), NoiseSchedule(torch.linspace(0.9, 0.1, 500)))
    inner, network = LDMDenoiser(PointwiseUNet()), weak.inner_model
    assert isinstance(network, PointwiseUNet)
    seen = network.t
    x, sigma = noise(2, 4, 8, 8) * 5, torch.tensor([2.5, 0.4])
    cond, uncond = features(3, 2), features(1, seed=9)
    c, u, w = inner(x, sigma, cond), inner(x, sigma, uncond), weak(x, sigma, cond)
    seen.clear()
    got = GuidedDenoiser(inner, AutoGuidance(CFG(3.0), weak, 2.0))(x, sigma, cond=cond, uncond=uncond)
    assert torch.allclose(got, u + 3 * (c - u) + c - w, atol=1e-5)
    assert len(seen) == 1 and torch.equal(seen[0], weak.sigma_to_t(sigma))
    assert not torch.equal(seen[0], inner.sigma_to_t(sigma))
    seen.clear()
    GuidedDenoiser(inner, AutoGuidance(CFG(3.0), weak, 1.0))(x, sigma, cond=cond, uncond=uncond)
    assert seen == []


def test_instruct_pix2pix_through_the_denoiser() -> None:
    inner = LDMDenoiser(PointwiseUNet())
    x, sigma = noise(2, 4, 8, 8) * 5, torch.tensor([5.0, 0.3])
    conditions = {"cond": features(3, 2), "image": features(2, seed=5), "uncond": features(1, seed=9)}
    c, i, u = (inner(x, sigma, condition) for condition in conditions.values())
    got = GuidedDenoiser(inner, InstructPix2Pix(7.5, 1.5))(x, sigma, **conditions)
    assert torch.allclose(got, u + 1.5 * (i - u) + 7.5 * (c - i), atol=1e-4)
    with pytest.raises(ValueError, match="needs image: pass image="):
        GuidedDenoiser(inner, InstructPix2Pix())(x, sigma, cond=features(3, 2), uncond=features(1))


def test_rules_are_values() -> None:
    check_value(InstructPix2Pix(), {"InstructPix2Pix": InstructPix2Pix})
    check_value(Rescale(InstructPix2Pix(5.0, (1.0, 2.0))), {"InstructPix2Pix": InstructPix2Pix, "Rescale": Rescale})
    assert AutoGuidance(CFG(1.0), WEAK) == AutoGuidance(CFG(1), WEAK, 2)
    assert AutoGuidance(CFG(1.0), WEAK) != AutoGuidance(CFG(1.0), LDMDenoiser(PointwiseUNet()))
    assert len({AutoGuidance(CFG(1.0), WEAK), AutoGuidance(CFG(1.0), WEAK)}) == 1


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: AutoGuidance(CFG(1.0), None), TypeError, "weak must be a denoiser.*got NoneType"),  # type: ignore[arg-type]
    (lambda: AutoGuidance(WEAK, WEAK), TypeError, "wraps a guidance rule"),  # type: ignore[arg-type]
    (lambda: AutoGuidance(CFG(1.0), WEAK, float("nan")), ValueError, "AutoGuidance's scale must be finite"),
    (lambda: InstructPix2Pix(image=float("inf")), ValueError, "InstructPix2Pix's image must be finite"),
    (lambda: InstructPix2Pix("7"), TypeError, "text must be a number"),  # type: ignore[arg-type]
    (lambda: InstructPix2Pix((1.0, 2.0), (1.0, 2.0, 3.0)), ValueError, "as many scales, got 2 and 3"),
])
def test_bad_arguments_are_found_at_construction(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]
