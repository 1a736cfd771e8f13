"""The attention syntax against tables, a reference reading of nested brackets, and round trips."""

import math
import time
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ella_kd.models.emphasis import chunks, escape, parse

UP, DOWN = 1.1, 1 / 1.1

# Any text, rich in what the syntax reads.
TEXT = st.lists(st.one_of(st.sampled_from([*"()[]:|\\. \n1", "BREAK", "a", "red", "\\BREAK", ":1.3", "_"]), st.text()),
                max_size=12).map("".join)


@pytest.mark.parametrize(("prompt", "pieces"), [
    ("normal text", [("normal text", 1)]),
    ("", [("", 1)]),
    ("()", [("", 1)]),
    ("an (important) word", [("an ", 1), ("important", UP), (" word", 1)]),
    ("((x)) [y] [[z]]", [("x", UP**2), (" ", 1), ("y", DOWN), (" ", 1), ("z", DOWN**2)]),
    ("(x:1.3)(y: .5 )(z:2.)(w:-1)(v:+3)", [("x", 1.3), ("y", .5), ("z", 2), ("w", -1), ("v", 3)]),
    ("(a (b:2) c:.5)", [("a ", .5), ("b", 1), (" c", .5)]),
    ("([x])", [("x", 1)]),
    (r"\(literal\] \[x\) \\ \:) \|", [(r"(literal] [x) \ :) |", 1)]),
    (r"a\b \n", [(r"a\b \n", 1)]),  # where A1111 drops the backslash
    ("(a:2:3)", [("a:2", 3)]),
    (r"(12\:30)", [("12:30", UP)]),
    ("(12:30)", [("12", 30)]),
    ("(a:1.2.3) (b:) (c:x) (d:1e3)", [("a:1.2.3", UP), (" ", 1), ("b:", UP), (" ", 1), ("c:x", UP), (" ", 1),
                                      ("d:1e3", UP)]),
    ("a:1.3) b] c", [("a:1.3) b] c", 1)]),  # closes nothing: characters
    ("a:1.3] b", [("a:1.3] b", 1)]),
    ("(unbalanced", [("unbalanced", UP)]),
    ("a [unbalanced (b", [("a ", 1), ("unbalanced ", DOWN), ("b", 1)]),
    ("(a [b) c]", [("a ", UP), ("b", 1), (" c", DOWN)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", UP)]),
    ("[a:b] a|b (c|d) [(e|f)]", [("a:b", DOWN), (" a|b ", 1), ("c|d", UP), (" e|f", 1)]),
    ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
     [("a ", 1), ("house", 1.3 * UP**2), (" ", UP), ("on", 1), (" a ", UP), ("hill", .5 * UP), (", sun, ", UP),
      ("sky", UP**4), (".", UP)]),
    ("a BREAK b", [("a b", 1)]),
    ("BREAKFAST _BREAK break", [("BREAKFAST _BREAK break", 1)]),
    (r"a \BREAK b \BREAKS", [(r"a BREAK b \BREAKS", 1)]),
])
def test_a_prompt_and_its_pieces(prompt: str, pieces: list[tuple[str, float]]) -> None:
    got = parse(prompt)
    assert [text for text, _ in got] == [text for text, _ in pieces]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in pieces], rel=1e-14)


@pytest.mark.parametrize("prompt", ["a [cat:dog:0.5]", "[dog:0.5]", "[cat::10]", "[cat|dog]", "([a|b", "[a (b) : .5 ]",
                                    "[a (b|c) |d]"])
def test_prompt_editing_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"edits the prompt while it is drawn .* switch between them by sigma"):
        parse(prompt)


def test_weights_that_overflow_are_refused() -> None:
    for prompt in ("(a:" + "9" * 400 + ")", "(" * 8000 + "a"):
        with pytest.raises(ValueError, match="give finite ones"):
            parse(prompt)


def test_long_prompts_take_linear_time() -> None:
    """Step by step for each pair of brackets, or of spaces, it would be minutes."""
    begin = time.process_time()
    assert parse("([" * 20000 + "a") == parse("([" * 20000 + "a" + "])" * 20000) == [("a", 1.0)]
    assert parse("(" * 20000 + "a" + ":1)" * 20000) == [("a", 1.0)]
    assert parse(" " * 40000 + "BREAK a") == [(" a", 1.0)]
    assert parse("a:" + "1" * 40000) == [("a:" + "1" * 40000, 1.0)]
    assert time.process_time() - begin < 10


@given(TEXT, st.floats(0, 100).map(lambda w: round(w, 3)))
@example("\\BREAK", 2.0)
@example("\\\\BREAK:", 2.0)
@example("a:2", 3.0)
def test_an_escaped_text_is_itself_wherever_it_stands(text: str, weight: float) -> None:
    assert parse(escape(text)) == [(text, 1.0)]
    assert chunks(escape(text)) == [[(text, 1.0)]]
    if text:
        assert parse(f"({escape(text)}:{weight:.3f})") == [(text, weight)]
        assert parse(f"[{escape(text)}]") == [(text, 1 / 1.1)]
        assert "".join(t for t, _ in parse(f"x({escape(text)})[y]")) == f"x{text}y"


NESTED = st.recursive(
    st.text("ab ,\\()|:", min_size=1, max_size=4).map(lambda s: ("text", s, 1.0)),
    lambda inner: st.tuples(st.sampled_from(["()", "[]", "(:)"]), st.lists(inner, max_size=3),
                            st.floats(0, 10).map(lambda w: round(w, 2))),
    max_leaves=12)


def written(node: tuple) -> str:
    kind, content, number = node
    if kind == "text":
        return escape(content)
    inside = "".join(map(written, content))
    return {"()": f"({inside})", "[]": f"[{inside}]", "(:)": f"({inside}:{number:.2f})"}[kind]


def meant(node: tuple, weight: float = 1.0) -> list[tuple[str, float]]:
    """Each character with the product of the brackets around it."""
    kind, content, number = node
    if kind == "text":
        return [(character, weight) for character in content]
    factor = {"()": UP, "[]": DOWN, "(:)": number}[kind]
    return [piece for child in content for piece in meant(child, weight * factor)]


@given(st.lists(NESTED, max_size=4))
def test_nested_weights_multiply_and_no_text_is_lost(nodes: list[tuple]) -> None:
    got = [(character, weight) for text, weight in parse("".join(map(written, nodes))) for character in text]
    want = [piece for node in nodes for piece in meant(node)]
    assert [character for character, _ in got] == [character for character, _ in want]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in want], rel=1e-12)


@given(TEXT)
def test_any_text_reads_or_is_refused_and_pieces_are_merged(text: str) -> None:
    try:
        pieces = parse(text)
    except ValueError:  # an editing prompt
        assert "[" in text and ("|" in text or ":" in text)
        return
    assert pieces == [("", 1.0)] or all(t for t, _ in pieces)
    assert all(a[1] != b[1] and math.isfinite(b[1]) for a, b in pairwise(pieces))
    letters = [c for c in text.replace("BREAK", "") if c not in "()[]:|\\" and not c.isspace()]
    if "BREAK" not in text and not any(c in "0123456789" for c in letters):
        assert [c for t, _ in pieces for c in t if c in letters] == letters


@pytest.mark.parametrize(("prompt", "want"), [
    ("a cat", [["a cat"]]),
    ("a cat BREAK a dog", [["a cat"], ["a dog"]]),
    ("a\n BREAK\tb BREAK", [["a"], ["b"]]),
    ("BREAK a", [[""], ["a"]]),
    ("BREAK", [[""]]),
    ("a BREAK BREAK b", [["a"], [""], ["b"]]),
    ("(a BREAK b:2) c", [["a"], ["b", " c"]]),
    (r"a \BREAK b", [["a BREAK b"]]),
])
def test_break_begins_a_new_chunk(prompt: str, want: list[list[str]]) -> None:
    assert [[text for text, _ in chunk] for chunk in chunks(prompt)] == want
    assert "".join(t for t, _ in parse(prompt)) == " ".join("".join(chunk) for chunk in want)


def test_break_keeps_the_weight_of_the_brackets_around_it() -> None:
    assert chunks("(a BREAK b:2) c") == [[("a", 2.0)], [("b", 2.0), (" c", 1.0)]]
