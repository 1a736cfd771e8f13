"""Rules as text: what repr writes is read back, and nothing else is."""

import math
from dataclasses import MISSING, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ella_kd import CFG, PAG, SAG, Guidance, Interval, Rescale
from ella_kd.guidance.text import known, parse

SCALES = st.floats(-20, 20) | st.lists(st.floats(-20, 20), min_size=1, max_size=3)
RULES: st.SearchStrategy[Guidance] = st.recursive(
    st.builds(CFG, SCALES),
    lambda inner: st.builds(Interval, inner, st.floats(0, 1), st.floats(1.5, 20) | st.just(math.inf)),
    max_leaves=4,
)


@given(RULES)
def test_what_repr_writes_is_read_back(rule: Guidance) -> None:
    assert parse(repr(rule)) == rule


def test_a_rule_as_a_user_types_it() -> None:
    assert parse(" Interval(CFG(7), sigma_lo=1.5) ") == Interval(CFG(7.0), 1.5, math.inf)
    assert parse("CFG((1, 7))") == CFG([1, 7])
    assert parse("CFG(-2)") == CFG(-2)


def test_every_rule_is_known() -> None:
    assert set(known()) == {"APG", "CFG", "CFGZeroStar", "DynamicThreshold", "InstructPix2Pix", "Interval",
                            "MimicScale", "PAG", "Rescale", "SAG", "SEG", "SLG", "TCFG"}


WRITTEN = [  # what a picture's settings say of each rule's defaults: another default would draw another picture
    "APG(scale=7.0, eta=0.0, threshold=None)",
    "CFGZeroStar(scale=7.0, zero_init=None)",
    "DynamicThreshold(base=CFG(scale=7.0), quantile=0.995, limit=4.5)",
    "InstructPix2Pix(text=7.5, image=1.5)",
    "MimicScale(base=CFG(scale=7.0), mimic=7.0, quantile=1.0, spread='range')",
    "PAG(base=CFG(scale=7.0), scale=3.0, places=('middle_block.1',))",
    "Rescale(base=CFG(scale=7.0), phi=0.7, space='v')",
    "SAG(base=CFG(scale=7.0), scale=0.75, sigma=1.0, threshold=1.0, place='middle_block.1')",
    "SEG(base=CFG(scale=7.0), scale=3.0, sigma=inf, places=('middle_block.1',))",
    "SLG(base=CFG(scale=7.0), scale=2.8, places=('middle_block.1',))",
    "TCFG(scale=7.0)",
    "Interval(base=CFG(scale=7.0), sigma_lo=0.0, sigma_hi=inf)",
]


@pytest.mark.parametrize("text", WRITTEN)
def test_every_rule_is_written_with_its_defaults_and_read_back(text: str) -> None:
    made = known()[text.split("(")[0]]
    rule = made(*(CFG(7) if f.name == "base" else 7.0 for f in fields(made) if f.default is MISSING))  # type: ignore[arg-type]
    assert repr(rule) == text
    assert parse(text) == rule


def test_rules_nest() -> None:
    rule = Rescale(SAG(PAG(CFG(7), 3, ("middle_block.1", "output_blocks.3.1"))), 0.5, "eps")
    assert parse(repr(rule)) == rule
    assert parse("Rescale(SAG(PAG(CFG(7), 3, ('middle_block.1', 'output_blocks.3.1'))), phi=.5, space='eps')") == rule


@pytest.mark.parametrize(("text", "message"), [
    ("CGF(7)", "unknown guidance rule 'CGF': did you mean CFG"),
    ("Nonsense(7)", "unknown guidance rule 'Nonsense': choose .*CFG, "),
    ("7", "not a guidance rule: '7': expected something like"),
    ("CFG(7", "not a guidance rule"),
    ("", "not a guidance rule"),
    ("CFG()", "CFG: missing 1 required positional argument: 'scale'"),
    ("CFG(7, colour=2)", "CFG: got an unexpected keyword argument 'colour'"),
    ("CFG(seven)", "cannot read 'seven'"),
    ("CFG(__import__('os').getpid())", "cannot read"),
    ("CFG('7')", "CFG: .*must be a number.*'7'"),
    ("Interval(7)", "Interval: .*wraps a guidance rule.*got 7"),
    ("AutoGuidance(CFG(7), 3)", "takes a second model, which a text cannot name"),
    ("CFG(scale=2, scale=3)", "CFG takes each argument once, by its name"),
    ("CFG(**{'scale': 3})", "CFG takes each argument once, by its name"),
    ("-" * 20000 + "1", "not a guidance rule: '-----"),
    ("Interval(" * 3000 + "CFG(7)" + ")" * 3000, "not a guidance rule: 'Interval"),
    ("CFG(\udcff)", "not a guidance rule"),
    ("Interval(CFG(7), 3, 2)", "sigma_lo < sigma_hi, got 3 and 2"),
])
def test_bad_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
