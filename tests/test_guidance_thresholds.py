import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ella_kd.guidance as guidance
from ella_kd.guidance import CFG, COND, UNCOND, Answers, Guidance
from ella_kd.guidance.thresholds import DynamicThreshold, MimicScale, Rescale, Space, Spread
from rules import ANSWERS, SCALES, SEVERAL, check_scales, check_value, close, make_answers, rows, with_answer

SPACES: list[Space] = ["v", "eps", "x0"]
SPREADS: list[Spread] = ["range", "std"]
PLAIN = CFG(7.0)
WRAPPERS = [Rescale(PLAIN), Rescale(PLAIN, 1.0, "eps"), Rescale(PLAIN, 0.3, "x0"), DynamicThreshold(PLAIN),
            DynamicThreshold(PLAIN, 0.9, 1.0), MimicScale(PLAIN, 3.0), MimicScale(PLAIN, 3.0, 0.9),
            MimicScale(PLAIN, 3.0, spread="std")]
NAMES = {name: getattr(guidance, name) for name in guidance.__all__} | {
    "Rescale": Rescale, "DynamicThreshold": DynamicThreshold, "MimicScale": MimicScale}


def rewrapped(rule: Guidance, base: Guidance) -> Guidance:
    """The same wrapper around another rule."""
    return type(rule)(**{**vars(rule), "base": base})


def to_space(d: np.ndarray, x: np.ndarray, s: np.ndarray, space: Space) -> np.ndarray:
    eps = (x - d) / s
    return {"v": (eps - s * d) / np.sqrt(1 + s**2), "eps": eps, "x0": d}[space]


def from_space(y: np.ndarray, x: np.ndarray, s: np.ndarray, space: Space) -> np.ndarray:
    return {"v": x / (1 + s**2) - y * s / np.sqrt(1 + s**2), "eps": x - s * y, "x0": y}[space]


@given(ANSWERS, SCALES, st.floats(0, 1), st.sampled_from(SPACES))
def test_rescale_is_its_formula_in_each_space(answers: Answers, scale: float, phi: float, space: Space) -> None:
    wanted = []
    for x, s, c, u in rows(answers, "cond", "uncond"):
        y_c, y = (to_space(d, x, s, space) for d in (c, u + scale * (c - u)))
        wanted.append(from_space(phi * y * y_c.std(ddof=1) / y.std(ddof=1) + (1 - phi) * y, x, s, space))
    assert close(Rescale(CFG(scale), phi, space)(answers), wanted)


@pytest.mark.parametrize("space", SPACES)
def test_rescale_changes_nothing_with_phi_0_or_scale_1_bitwise(space: Space) -> None:
    answers = make_answers(dtype=torch.float32)
    assert torch.equal(Rescale(PLAIN, 0.0, space)(answers), PLAIN(answers))
    assert torch.equal(Rescale(CFG(1.0), 1.0, space)(answers), answers[COND])
    assert Rescale(CFG(1.0)).branches == (COND, COND)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("limit", [0.5, 2.0, 50.0])
def test_dynamic_threshold_is_its_formula(quantile: float, limit: float) -> None:
    answers = make_answers()
    wanted = []
    for _, _, c, u in rows(answers, "cond", "uncond"):
        g = u + 7 * (c - u)
        s = np.quantile(np.abs(g), quantile)
        wanted.append(np.clip(g, -s, s) * limit / s if s > limit else g)
    got = DynamicThreshold(PLAIN, quantile, limit)(answers)
    assert close(got, wanted)
    assert limit == 50 or float(got.abs().max()) == pytest.approx(limit)


@given(ANSWERS, SCALES)
def test_dynamic_threshold_leaves_what_is_within_the_limit_bitwise(answers: Answers, scale: float) -> None:
    guided = CFG(scale)(answers)
    limit = float(guided.abs().max())
    assert torch.equal(DynamicThreshold(CFG(scale), 1.0, limit)(answers), guided)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("mimic", [0.0, 3.0, 12.0])
def test_mimic_scale_is_its_formula(quantile: float, spread: Spread, mimic: float) -> None:
    answers = make_answers()
    wanted = []
    for _, _, c, u in rows(answers, "cond", "uncond"):
        channels = []
        for g, m in zip(u + 7 * (c - u), u + mimic * (c - u), strict=True):
            g0, m0 = g - g.mean(), m - m.mean()
            if spread == "std":
                channels.append(g0 / g0.std() * m0.std() + g.mean())
                continue
            a, b = np.abs(m0).max(), np.quantile(np.abs(g0), quantile)
            top = max(a, b)
            channels.append(np.clip(g0, -top, top) / top * a + g.mean())
        wanted.append(np.stack(channels))
    assert close(MimicScale(PLAIN, mimic, quantile, spread)(answers), wanted)


@given(ANSWERS, SCALES, st.floats(0.1, 1), st.sampled_from(SPREADS))
def test_mimicking_the_scale_itself_changes_nothing_bitwise(answers: Answers, scale: float, quantile: float,
                                                            spread: Spread) -> None:
    assert torch.equal(MimicScale(CFG(scale), scale, quantile, spread)(answers), CFG(scale)(answers))


@pytest.mark.parametrize("rule", WRAPPERS)
def test_constant_answers_stay(rule: Guidance) -> None:
    """No spread to divide by: no NaN."""
    answers = make_answers()
    flat = Answers(torch.zeros_like(answers.x), answers.sigma,
                   {b: torch.full_like(d, 0.25) for b, d in answers.denoised.items()}, answers.evaluate, {})
    assert torch.equal(rule(flat), flat[COND])


@given(ANSWERS, SEVERAL, st.sampled_from(WRAPPERS))
def test_a_batch_is_a_loop_of_singles_whatever_the_scales(answers: Answers, scales: list[float],
                                                          rule: Guidance) -> None:
    check_scales(lambda scale: rewrapped(rule, CFG(scale)), answers, scales)
    check_scales(lambda scale: MimicScale(CFG(7.0), scale, 0.9), answers, scales)


@given(ANSWERS, st.sampled_from(WRAPPERS), st.sampled_from(WRAPPERS))
def test_rules_nest_in_any_order(answers: Answers, inner: Guidance, outer: Guidance) -> None:
    """The outer rule sees what the inner one answers, as if it came from the network with guidance 1."""
    nested = rewrapped(outer, inner)
    assert set(nested.branches) == {COND, UNCOND}
    assert torch.equal(nested(answers), rewrapped(outer, _Given(inner(answers)))(answers))
    check_value(nested, NAMES)


class _Given(Guidance):
    branches = ()

    def __init__(self, answer: torch.Tensor) -> None:
        self.answer = answer

    def __call__(self, answers: Answers) -> torch.Tensor:
        return self.answer


def test_only_the_answers_at_hand_are_asked_for() -> None:
    assert set(Rescale(CFG(1.0)).branches) == set(DynamicThreshold(CFG(1.0)).branches) == {COND}
    assert set(MimicScale(CFG(1.0), 1.0).branches) == {COND}
    assert set(MimicScale(CFG(1.0), 3.0).branches) == {COND, UNCOND}


def test_rescaling_in_eps_leaves_noise_in_the_answer_where_the_other_spaces_do_not() -> None:
    answers = make_answers((14.0,), height=16, width=16)
    answers = with_answer(answers, COND, answers[COND] + answers.x / 28)  # as guidance finds it: D leans towards x
    noise = {space: Rescale(PLAIN, 1.0, space)(answers) - PLAIN(answers) for space in SPACES}
    along = {space: float((d * answers.x).sum() / answers.x.square().sum()) for space, d in noise.items()}
    assert along["eps"] > 0.02 > max(along["v"], along["x0"])


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: Rescale(PLAIN, 1.1), ValueError, "phi must be between 0"),
    (lambda: Rescale(PLAIN, -0.1), ValueError, "phi must be between 0"),
    (lambda: Rescale(PLAIN, float("nan")), ValueError, "phi must be between 0"),
    (lambda: Rescale(PLAIN, 0.7, "z"), ValueError, "unknown space 'z': choose v, eps, x0"),  # type: ignore[arg-type]
    (lambda: Rescale(7.0), TypeError, "wraps a guidance rule, such as CFG.*got 7.0"),  # type: ignore[arg-type]
    (lambda: DynamicThreshold(PLAIN, 0.0), ValueError, "quantile must be above 0 and at most 1, got 0.0"),
    (lambda: DynamicThreshold(PLAIN, 99.5), ValueError, "quantile must be above 0 and at most 1, got 99.5"),
    (lambda: DynamicThreshold(PLAIN, 0.9, 0.0), ValueError, "limit must be above 0"),
    (lambda: DynamicThreshold(PLAIN, 0.9, float("inf")), ValueError, "limit must be above 0"),
    (lambda: MimicScale(PLAIN, float("nan")), ValueError, "MimicScale's mimic must be finite"),
    (lambda: MimicScale(PLAIN, 3.0, 2.0), ValueError, "quantile must be above 0"),
    (lambda: MimicScale(PLAIN, 3.0, spread="z"), ValueError, "choose range, std"),  # type: ignore[arg-type]
])
def test_bad_arguments_are_found_at_construction(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]
