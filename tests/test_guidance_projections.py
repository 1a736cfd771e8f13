import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ella_kd.guidance import CFG, COND, UNCOND, Answers, Guidance
from ella_kd.guidance.projections import APG, TCFG, CFGZeroStar
from ella_kd.guidance.thresholds import Rescale
from rules import ANSWERS, SCALES, SEVERAL, check_scales, check_value, close, make_answers, row_of, rows, with_answer
from tiny import relative

RULES = [APG(7.0), APG(7.0, 0.5, 2.0), CFGZeroStar(7.0), CFGZeroStar(7.0, 10.0), TCFG(7.0)]
NAMES = {"APG": APG, "CFGZeroStar": CFGZeroStar, "TCFG": TCFG, "Rescale": Rescale, "CFG": CFG}


def rescaled(rule: Guidance, scale: object) -> Guidance:
    """The same rule with another scale."""
    return type(rule)(**{**vars(rule), "scale": scale})


@given(ANSWERS, SCALES, st.floats(-1, 2), st.one_of(st.none(), st.floats(0.1, 10)))
def test_apg_is_its_formula(answers: Answers, scale: float, eta: float, threshold: float | None) -> None:
    wanted = []
    for _, _, c, u in rows(answers, "cond", "uncond"):
        d = c - u
        if threshold is not None:
            d = d * min(1, threshold / np.linalg.norm(d))
        parallel = (d * c).sum() / (c * c).sum() * c
        wanted.append(c + (scale - 1) * (d - parallel + eta * parallel))
    assert close(APG(scale, eta, threshold)(answers), wanted)


@given(ANSWERS, SCALES)
def test_apg_with_all_of_the_parallel_part_and_no_threshold_is_cfg_bitwise(answers: Answers, scale: float) -> None:
    assert torch.equal(APG(scale, 1.0)(answers), CFG(scale)(answers))
    assert torch.equal(APG(scale, 1.0, 1e3)(answers), CFG(scale)(answers))


@given(ANSWERS, SCALES)
def test_apg_moves_at_a_right_angle_to_the_cond_and_no_further_than_allowed(answers: Answers, scale: float) -> None:
    moved = APG(scale, 0.0, 0.5)(answers) - answers[COND]
    assert float((moved * answers[COND]).sum((1, 2, 3)).abs().max()) < 1e-9
    assert float(moved.flatten(1).norm(dim=1).max()) <= abs(scale - 1) * 0.5 + 1e-9


@given(ANSWERS, SCALES)
def test_cfg_zero_star_is_its_formula_on_velocities(answers: Answers, scale: float) -> None:
    wanted = []
    for x, s, c, u in rows(answers, "cond", "uncond"):
        v_c, v_u = (x - c) / s, (x - u) / s
        fit = (v_c * v_u).sum() / (v_u * v_u).sum()
        wanted.append(x - s * ((1 - scale) * fit * v_u + scale * v_c))
    assert close(CFGZeroStar(scale)(answers), wanted)


@given(ANSWERS)
def test_cfg_zero_star_guides_at_a_right_angle_to_the_uncond(answers: Answers) -> None:
    """The fit is least squares: what is left of the cond's velocity has nothing of the uncond's."""
    guidance = CFGZeroStar(2.0)(answers) - answers[COND]
    assert float((guidance * (answers.x - answers[UNCOND])).sum((1, 2, 3)).abs().max()) < 1e-9


def test_cfg_zero_star_stands_still_from_zero_init_up() -> None:
    answers = make_answers((14.0, 10.0, 9.9))
    got = CFGZeroStar(7.0, 10.0)(answers)
    assert torch.equal(got[:2], answers.x[:2])
    assert torch.equal(got[2:], CFGZeroStar(7.0)(answers)[2:])
    assert torch.equal(CFGZeroStar(1.0, 10.0)(answers)[:2], answers.x[:2])


@given(ANSWERS, SCALES)
def test_tcfg_is_its_formula_by_svd(answers: Answers, scale: float) -> None:
    wanted = []
    for x, s, c, u in rows(answers, "cond", "uncond"):
        scores = np.stack([((x - c) / s).ravel(), ((x - u) / s).ravel()])
        first = np.linalg.svd(scores, full_matrices=False)[2][0]
        kept = x - s * ((scores[1] @ first) * first).reshape(x.shape)
        wanted.append(kept + scale * (c - kept))
    assert close(TCFG(scale)(answers), wanted)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("apart", [1.0, 0.01])
def test_fp32_keeps_its_digits_where_both_answers_are_nearly_x(rule: Guidance, apart: float) -> None:
    """At sigma 14 eps is x and little else: what cond and uncond differ in must not be taken from there."""
    exact = make_answers((14.0, 9.0, 1.0), height=32, width=32)
    exact = with_answer(exact, UNCOND, exact[COND] + apart * (exact[UNCOND] - exact[COND]))
    rough = Answers(exact.x.float(), exact.sigma.float(), {b: d.float() for b, d in exact.denoised.items()},
                    exact.evaluate, {})
    assert relative(rule(rough), rule(exact)) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_with_one_answer_twice_there_is_nothing_to_guide(rule: Guidance) -> None:
    answers = make_answers((9.0, 2.5, 0.1))
    same = with_answer(answers, UNCOND, answers[COND])
    assert torch.allclose(rule(same), same[COND], atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_zeros_give_no_nan(rule: Guidance) -> None:
    answers = make_answers((9.0, 2.5, 0.1))
    none = torch.zeros_like(answers.x)
    nothing = Answers(none, answers.sigma, {COND: none, UNCOND: none}, answers.evaluate, {})
    assert torch.equal(rule(nothing), none)


@pytest.mark.parametrize("rule", [CFGZeroStar(7.0), TCFG(7.0)])
def test_parallel_velocities_need_no_change_of_direction(rule: Guidance) -> None:
    """CFG-Zero* makes the uncond's velocity the cond's, TCFG keeps all of it."""
    answers = make_answers((9.0,))
    answers = with_answer(answers, UNCOND, answers.x - 0.7 * (answers.x - answers[COND]))
    wanted = answers[COND] if isinstance(rule, CFGZeroStar) else CFG(7.0)(answers)
    assert torch.allclose(rule(answers), wanted, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_scale_1_is_the_cond_bitwise_and_asks_for_no_uncond(rule: Guidance) -> None:
    plain = rescaled(rule, 1)
    assert plain.branches == (COND,)
    answers = make_answers((9.0, 2.5, 0.1), branches=[COND], dtype=torch.float32)
    assert torch.equal(plain(answers), answers[COND])
    answers = make_answers((9.0, 2.5, 0.1), dtype=torch.float32)
    assert rule.branches == (COND, UNCOND)
    some = rescaled(rule, (7.0, 1.0, 3.0))  # a row at scale 1 among others too
    assert torch.equal(some(answers)[1], answers[COND][1])


@pytest.mark.parametrize("scale", [0.1, 1.3, 7.0, 12.7])
@pytest.mark.parametrize("rule", RULES)
def test_one_scale_and_one_per_sample_have_the_same_bits(rule: Guidance, scale: float) -> None:
    answers = make_answers((14.0, 2.5, 0.1), dtype=torch.float32)
    assert torch.equal(rescaled(rule, scale)(answers), rescaled(rule, (scale, scale, scale))(answers))


@given(ANSWERS, SEVERAL, st.sampled_from(RULES))
def test_a_batch_is_a_loop_of_singles_whatever_the_scales(answers: Answers, scales: list[float],
                                                          rule: Guidance) -> None:
    check_scales(lambda scale: rescaled(rule, scale), answers, scales)


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_values_and_can_be_wrapped(rule: Guidance) -> None:
    answers = make_answers()
    check_value(rule, NAMES)
    check_value(Rescale(rule, 0.5), NAMES)
    nested = Rescale(rule, 1.0, "x0")(answers)
    assert torch.allclose(nested.std((1, 2, 3)), answers[COND].std((1, 2, 3)))
    assert torch.allclose(nested[1:2], Rescale(rule, 1.0, "x0")(row_of(answers, 1)))


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: APG(float("inf")), ValueError, "APG's scale must be finite"),
    (lambda: APG("7"), TypeError, "APG's scale must be a number"),  # type: ignore[arg-type]
    (lambda: APG(7.0, float("nan")), ValueError, "eta must be finite"),
    (lambda: APG(7.0, 0.0, 0.0), ValueError, "threshold must be a norm above 0, or None for no limit, got 0.0"),
    (lambda: APG(7.0, 0.0, float("inf")), ValueError, "threshold must be a norm above 0, or None"),
    (lambda: CFGZeroStar(7.0, 0.0), ValueError, "zero_init must be a sigma above 0, or None"),
    (lambda: TCFG([]), ValueError, "TCFG's scale must be one number, or one per sample"),
])
def test_bad_arguments_are_found_at_construction(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]
