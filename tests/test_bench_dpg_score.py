"""DPG-Bench's arithmetic against numbers worked out by hand, as it is published and as it is meant."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from ella_kd.app.dpg_answers import Answers, read_answers
from ella_kd.app.dpg_questions import Question, problems, read_questions
from ella_kd.app.dpg_report import markdown, plot, report
from ella_kd.app.dpg_score import counted, published, score

WHOLE, COLOUR, SPATIAL, GLOBAL = ("entity - whole (car)", "attribute - color (car, red)",
                                  "relation - spatial (car, tree, non-left of)", "global - (photo)")
Row = tuple[str, int, str, str]  # item, id, dependency, tuple

#: Every prompt of these lacks nothing; in the published reading the first one loses question 1, and with it everything.
ROWS: list[Row] = [("first", 1, "0", WHOLE), ("first", 2, "1", COLOUR),
                   ("a", 1, "0", WHOLE), ("a", 2, "1", COLOUR), ("a", 3, "0", WHOLE), ("a", 4, "2", SPATIAL),
                   ("b", 1, "0", GLOBAL)]
SAID = {"first": ("yy", "yy", "yy", "yn"), "a": ("ynyy", "nyyy", "yyyy", "nnnn"), "b": ("y", "n", "n", "y")}


def rows(given: Iterable[Row]) -> list[Question]:
    return [Question(item, number, dependency, about, f"{item} {number}?", line=line)
            for line, (item, number, dependency, about) in enumerate(given, 2)]


def answers(said: Mapping[str, Sequence[str]], ids: Mapping[str, Sequence[int]] | None = None) -> Answers:
    """y and n of every cell, in the order of the ids."""
    return {(item, cell, number): {"y": "yes", "n": "no"}[letter] for item, cells in said.items()
            for cell, letters in enumerate(cells)
            for number, letter in zip((ids or {}).get(item, range(1, len(letters) + 1)), letters, strict=True)}


def write_csv(path: Path, given: Iterable[Row]) -> Path:
    """As it is published, but for columns that nobody reads."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow("item_id text keywords proposition_id dependency category_broad category_detailed tuple "
                        "question_natural_language".split())
        writer.writerows([item, f"a picture of {item}, \"said\"", "", number, dependency, "", "", about,
                          f"{item} {number}?"] for item, number, dependency, about in given)
    return path


def test_as_it_is_meant() -> None:
    dpg = score(rows(ROWS), answers(SAID))
    assert dpg.items == {"first": 0.875, "a": 0.4375, "b": 0.5}  # the cells of a: .5 .25 1 0
    assert dpg.average.value == pytest.approx(100 * (0.875 + 0.4375 + 0.5) / 3)
    assert {name: (mean.value, mean.count) for name, mean in dpg.level_2.items()} == {  # before zeroing, all cells
        "entity - whole": (75.0, 12), "attribute - color": (62.5, 8), "relation - spatial": (75.0, 4),
        "global -": (50.0, 4)}
    assert {name: mean.value for name, mean in dpg.level_1.items()} == {
        "entity": 75.0, "attribute": 62.5, "relation": 75.0, "global": 50.0}
    dsg = score(rows(ROWS), answers(SAID), zeroing="dsg")
    assert dsg.items == {"first": 0.875, "a": 0.5, "b": 0.5}  # the cells of a: .5 .5 1 0
    assert score(rows(ROWS), answers(SAID), cells=1).items == {"first": 1, "a": 0.5, "b": 1}


def test_as_it_is_published() -> None:
    found = published(rows(ROWS), answers(SAID), SAID)
    assert found.dropped == {"first": "KeyError: 1"} and found.prompts == 2
    assert found.average == 100 * (0.4375 + 0.5) / 2
    assert found.level_2 == {"attribute - color": 0, "entity - whole": 0, "global -": 100, "relation - spatial": 0}
    assert found.level_1 == {"attribute": 0, "entity": 0, "global": 100, "relation": 0}  # of the last cell
    assert published(rows(ROWS), answers(SAID), SAID, cells=1).level_1["relation"] == 100  # before zeroing
    assert published(rows(ROWS), answers(SAID), ["b"]).average == 50  # a sheet that is not there is not missed
    assert math.isnan(published(rows(ROWS), answers(SAID), []).average)


@pytest.mark.parametrize(("dependencies", "said", "dpg", "dsg", "old"), [
    ({1: "0", 2: "0", 3: "1,2"}, "yny", 1, 1, 1),  # one of two parents
    ({1: "0", 2: "0", 3: "1, 2"}, "yyy", 3, 3, 3),
    ({3: "2", 2: "1", 1: "0"}, "yyn", 0, 1, 1),  # children listed before their parents, the answers too
    ({1: "0", 2: "9"}, "yy", 2, 2, None),  # no parent of that number: the published script drops the prompt
    ({1: "0", 2: "1,9"}, "ny", 0, 0, 0),  # which it does not notice after a no
    ({1: "2", 2: "1"}, "yn", 0, 0, 0),  # a circle
    ({1: "1"}, "y", 1, 1, 1),
])
def test_how_far_a_no_reaches(dependencies: dict[int, str], said: str, dpg: int, dsg: int, old: int | None) -> None:
    own = rows([("x", 1, "0", WHOLE), *(("a", number, text, WHOLE) for number, text in dependencies.items())])
    yes = {number: letter == "y" for number, letter in zip(dependencies, said, strict=True)}
    questions = {question.id: question for question in own[1:]}
    assert sum(counted(questions, yes)) == dpg and sum(counted(questions, yes, "dsg")) == dsg
    found = published(own, answers({"a": [said]}, {"a": [*dependencies]}), ["a"], cells=1)
    assert found.prompts == (old is not None)
    if old is not None:
        assert found.average == pytest.approx(100 * old / len(said))


def test_items_in_pieces_and_names_with_dots() -> None:
    own = rows([("x", 1, "0", WHOLE), ("a", 1, "0", WHOLE), ("b.c", 1, "0", WHOLE), ("a", 2, "1", COLOUR),
                ("a", 3, "0", WHOLE)])
    said = answers({"x": "y", "a": ("yny",), "b.c": "y"})
    assert score(own, said, cells=1).items == {"x": 1, "a": 2 / 3, "b.c": 1}
    found = published(own, said, ["x", "a", "b.c"], cells=1)
    assert found.dropped == {"a": "KeyError: 1", "b.c": "no questions for b", "x": "no questions for x"}
    assert [text.partition(": ")[2] for text in problems(own)] == ["more questions of an item that ended before"]


def test_several_processes_mix_up_categories_and_nothing_else() -> None:
    own = rows([("x", 1, "0", WHOLE)] + [(item, number, "0", about) for item in "ab"
                                        for number, about in ((1, WHOLE), (2, COLOUR))])
    said = answers({"a": ("yn",), "b": ("yn",)})
    found = [published(own, said, "ab", cells=1, processes=2, seed=seed) for seed in range(20)]
    assert {each.average for each in found} == {50}
    assert {tuple(each.level_2.values()) for each in found} == {(0, 100), (50, 50)}  # right, and mixed up


def test_what_counts_as_yes() -> None:
    given: list[str | float] = ["yes", " Yes, it is.", "YES", "no", "No!", "maybe", "", "yesterday", "?", 0.51,
                                0.5]
    said: Answers = {("a", 0, n): answer for n, answer in enumerate(given, 1)}
    own = rows([("x", 1, "0", WHOLE)] + [("a", n, "0", WHOLE) for n in range(1, 12)])
    found = score(own, said, cells=1, missing={"x": "no sheet"})
    assert found.average.value == pytest.approx(400 / 11) and found.unclear == 4
    assert published(own, said, ["a"], cells=1).average == pytest.approx(200 / 11)  # "yes" to the letter, and .51
    assert published(own, said, ["a"], cells=1, exact=False).average == pytest.approx(400 / 11)
    assert found.missing == {"x": "no sheet"}


def test_what_lacks_an_answer_is_named_and_does_not_count() -> None:
    said = {key: answer for key, answer in answers(SAID).items() if key != ("a", 2, 3)}
    found = score(rows(ROWS), said)
    assert found.missing == {"a": "1 of 16 answers are missing"} and [*found.items] == ["first", "b"]
    with pytest.raises(ValueError, match="no prompt has all its answers: first \\(8 of 8"):
        score(rows(ROWS), {})
    with pytest.raises(ValueError, match="unknown zeroing 'none': choose dpg, dsg"):
        score(rows(ROWS), said, zeroing="none")  # type: ignore[arg-type]


def test_intervals_are_those_of_the_mean() -> None:
    own = rows([(f"p{i}", 1, "0", WHOLE) for i in range(400)])
    half = {(f"p{i}", 0, 1): "yes" if i % 2 else "no" for i in range(400)}
    mean = score(own, half, cells=1).average
    assert mean.value == 50
    assert (mean.high - mean.low) / 2 == pytest.approx(100 * 1.96 * 0.5 / 20, rel=0.1)
    assert score(own, half, cells=1).average == mean  # seeded
    same = score(own, dict.fromkeys(half, "yes"), cells=1).average
    assert (same.low, same.value, same.high) == (100, 100, 100)


def test_a_csv_with_the_faults_of_dsg_1k_is_read(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "q.csv", [("a", 1, "3", WHOLE), ("a", 2, "1, right", COLOUR), ("a", 3, "0", WHOLE),
                                          ("b.1", 1, "", "global - - (photo, \"x\")"), ("b.1", 2, "7,1", SPATIAL)])
    own = read_questions(path)
    assert [question.parents for question in own] == [(3,), (1,), (), (), (7, 1)]
    assert own[3].prompt == 'a picture of b.1, "said"' and (own[3].level_1, own[3].level_2) == ("global", "global - -")
    assert [text.partition(": ")[2] for text in problems(own)] == [
        "no parent can be read in 'right'", "no parent can be read in ''", "no parent 7"]
    assert score(own, answers({"a": ["yyn"], "b.1": ["yy"]}), cells=1).items == {"a": 0, "b.1": 1}
    with pytest.raises(ValueError, match="line 3: the published script stops at the dependency '1, right'"):
        published(own, {}, [])
    assert report(own, answers({"a": ["yyn"], "b.1": ["yy"]}), ["a", "b.1"], judge="j", cells=1)["published"]["stops"]


@pytest.mark.parametrize(("text", "message"), [
    ("item_id,text\na,b\n", "lacks the columns proposition_id, dependency, tuple, question_natural_language"),
    ("", "lacks the columns item_id"),
    ("item_id,text,proposition_id,dependency,tuple,question_natural_language\n", "holds no question"),
    ("item_id,text,proposition_id,dependency,tuple,question_natural_language\na,b,one,0,t,q\n", "line 2: expected an"),
])
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "q.csv")
    with pytest.raises(FileNotFoundError, match="no questions at"):
        read_questions(tmp_path / "none.csv")


def test_the_report_has_both_readings_and_names_what_is_missing(tmp_path: Path) -> None:
    said = {key: value for key, value in answers(SAID).items() if key[0] != "b"}
    found = report(rows(ROWS), said, ["first", "a", "stray"], judge="a|judge", missing={"b": "no sheet"})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["average"]["published"] == 43.75 and found["average"]["corrected"] == 65.625
    assert "global -" not in found["level_2"]
    page = markdown(found)
    assert "| judge: a\\|judge | published | corrected | 95 % | n |" in page
    assert "| **average** | 43.75 | 65.62 | 43.75 to 87.50 | 2 prompts |" in page
    assert "| attribute - color | 0.00 | 62.50 | 50.00 to 75.00 | 8 |" in page
    assert "2 of 3 prompts, 4 pictures each; zeroing `dpg`" in page
    assert "counts 1 prompts, drops 2: first (KeyError: 1); stray (no questions for stray)" in page
    assert "Without a score: 1: b (no sheet)." in page and "Sheets without questions: 1: stray." in page
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_table_of_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    lines = [{"item": "a", "cell": 0, "id": 1, "answer": "no"}, {"item": "a", "cell": 0, "id": 1, "answer": "yes"},
             {"item": "a", "cell": 1, "id": 1, "answer": 0.25}]
    path.write_text("\n".join(map(json.dumps, lines)))  # without an end
    assert read_answers(path) == ("recorded answers", {("a", 0, 1): "yes", ("a", 1, 1): 0.25})
    path.write_text("\n".join(json.dumps({**line, "judge": judge}) for line in lines for judge in ("m", "n")))
    assert read_answers(path, "n")[0] == "n"
    with pytest.raises(ValueError, match="holds answers of m, n: expected one of them by name"):
        read_answers(path)
    with pytest.raises(ValueError, match="of m, n: expected o"):
        read_answers(path, "o")
    for wrong in ('{"item": "a"}', '{"item": "a", "cell": 0, "id": 1, "answer": 2}', "[]", "yes"):
        path.write_text(wrong + "\n")
        with pytest.raises(ValueError, match="line 1: expected an answer with item, cell, id and answer, got"):
            read_answers(path)
