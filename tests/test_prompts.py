from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ella_kd.prompts import check_wildcards, expand_wildcards, split_and

WORDS = st.text("abc ()[]\n", min_size=1).filter(str.strip).map(str.strip)
WEIGHTS = st.floats(-3, 3).map(lambda w: round(w, 3))


@pytest.mark.parametrize(("prompt", "terms"), [
    ("a cat", [("a cat", 1.0)]),
    ("a cat AND a dog :0.7 AND fog : -.5", [("a cat", 1.0), ("a dog", 0.7), ("fog", -0.5)]),
    ("a cat:2", [("a cat", 2.0)]),
    ("a (red:1.3) cat AND [blue]", [("a (red:1.3) cat", 1.0), ("[blue]", 1.0)]),
    ("a (cat:1.3)", [("a (cat:1.3)", 1.0)]),
    ("SAND AND bRAND AND HANDY", [("SAND", 1.0), ("bRAND", 1.0), ("HANDY", 1.0)]),
    ("a and b", [("a and b", 1.0)]),
    (r"this \AND that AND those", [("this AND that", 1.0), ("those", 1.0)]),
    (r"a backslash \\AND more", [("a backslash \\\\", 1.0), ("more", 1.0)]),
    (r"film in 16\:9 AND a cat", [(r"film in 16\:9", 1.0), ("a cat", 1.0)]),
    ("a cat :1.2.3", [("a cat :1.2.3", 1.0)]),
    ("", [("", 1.0)]),
    ("a\nAND\nb :+2.", [("a", 1.0), ("b", 2.0)]),
])
def test_and_as_the_web_ui_reads_it(prompt: str, terms: list[tuple[str, float]]) -> None:
    assert split_and(prompt) == terms


@given(st.lists(st.tuples(WORDS, WEIGHTS), min_size=1, max_size=4))
def test_what_is_joined_is_split(terms: list[tuple[str, float]]) -> None:
    assert split_and(" AND ".join(f"{text} :{weight}" for text, weight in terms)) == terms


@pytest.mark.parametrize("prompt", ["a AND", "AND b", "a AND AND b", "a AND :0.5"])
def test_nothing_on_one_side_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="an AND has nothing on one side"):
        split_and(prompt)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "animals").mkdir()
    (tmp_path / "colour.txt").write_text("# bright ones\n\nred\n  blue \n", encoding="utf-8-sig")
    (tmp_path / "animals" / "cats.txt").write_text("a lynx\nan ocelot\n")
    (tmp_path / "thing.txt").write_text("a __colour__ ball\n__animals/cats__\n")
    (tmp_path / "loop.txt").write_text("__round__\n")
    (tmp_path / "round.txt").write_text("and __loop__ again\n")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00red")
    return tmp_path


def test_a_wildcard_becomes_a_line_of_its_file(folder: Path) -> None:
    found = {expand_wildcards("A __colour__ and a __colour__ one", folder, seed) for seed in range(40)}
    assert found == {f"A {a} and a {b} one" for a in ("red", "blue") for b in ("red", "blue")}
    assert expand_wildcards("none_here __ nor __ here", folder, 1) == "none_here __ nor __ here"


def test_lines_may_hold_wildcards(folder: Path) -> None:
    found = {expand_wildcards("__thing__", folder, seed) for seed in range(60)}
    assert found == {"a red ball", "a blue ball", "a lynx", "an ocelot"}


def test_the_choice_is_the_same_on_every_machine(folder: Path) -> None:
    found = [expand_wildcards("__thing__", folder, seed) for seed in range(6)]
    assert found == ["an ocelot", "a blue ball", "a lynx", "an ocelot", "a blue ball", "a lynx"]


@pytest.mark.parametrize(("prompt", "error", "message"), [
    ("__color__", FileNotFoundError, r"no wildcard file .*color.txt for __color__: there is colour"),
    ("__animals/cat__", FileNotFoundError, "there is animals/cats"),
    ("__loop__", ValueError, "lead back to themselves: loop -> round -> loop"),
    ("__empty__", ValueError, "empty.txt holds no line to choose"),
    ("__binary__", ValueError, "binary.txt is not a text file in UTF-8"),
])
def test_bad_wildcards(folder: Path, prompt: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        expand_wildcards(prompt, folder, 1)
    with pytest.raises(error, match=message):
        check_wildcards(prompt, folder)


def test_a_wildcard_that_only_some_seeds_choose_is_checked_before_any_is_chosen(folder: Path) -> None:
    (folder / "late.txt").write_text("fine\n" * 99 + "__gone__\n")
    assert {expand_wildcards("__late__", folder, seed) for seed in range(9)} == {"fine"}
    with pytest.raises(FileNotFoundError, match="for __gone__"):
        check_wildcards("a __late__ one", folder)
    check_wildcards("a __thing__", folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder of wildcards at .*nowhere"):
        expand_wildcards("__a__", tmp_path / "nowhere", 1)
    with pytest.raises(FileNotFoundError, match=r"the folder holds no \.txt file"):
        expand_wildcards("__a__", tmp_path, 1)
