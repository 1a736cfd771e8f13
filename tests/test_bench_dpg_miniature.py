"""DPG-Bench's whole cycle on the miniature, whose judge reads pixels and does not err."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import studio
from benchmarks import dpg, results
from benchmarks.miniature import dpg as world
from benchmarks.miniature.scenes import Scene, Thing, render
from ella_kd.app.dpg_questions import problems

SCENE = Scene("snow", (Thing(0, "heart", "red", "striped", "dark"), Thing(5, "heart", "blue"), Thing(7, "ring", "red")))


def test_the_judge_says_yes_to_a_scene_and_no_to_what_differs() -> None:
    rows = world.questions("a", SCENE, "")
    judge = world.judge({question.text: truth for question, truth in rows})
    texts = [question.text for question, _ in rows]

    def no(scene: Scene) -> list[str]:
        said = judge([Image.fromarray(render(scene))] * len(texts), texts)
        return [text for text, answer in zip(texts, said, strict=True) if answer == "no"]

    assert not no(SCENE) and not problems([question for question, _ in rows])
    heart, other, ring = SCENE.things
    assert no(replace(SCENE, background="night")) == ["Is this snow?"]
    assert no(replace(SCENE, things=(heart, other))) == [
        "Are there exactly 3 things?", "Is there a ring?", "Is there a red ring?",
        "Is there a red ring at the bottom center?", "Is there a red ring that is plain?",
        "Is there a red ring with no rim?", "Is there a red heart above and left of a red ring?",
        "Is there a blue heart above and right of a red ring?"]
    assert no(replace(SCENE, things=(replace(heart, fill="barred", rim="light"), other, replace(ring, place=8)))) == [
        "Is there a red heart that is striped?", "Is there a red heart with dark rim?",
        "Is there a red ring at the bottom center?", "Is there a blue heart above and right of a red ring?"]
    questions = {question.id: question for question, _ in rows}
    text = "Is there a red heart above and left of a red ring?"
    about = next(question for question in questions.values() if question.text == text)
    assert [questions[parent].text for parent in about.parents] == ["Is there a red heart?", "Is there a red ring?"]


def test_the_cycle_from_prompts_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniature = studio.miniature()
    monkeypatch.setattr(dpg.Pipeline, "miniature", lambda: miniature)
    monkeypatch.setattr(dpg, "SYSTEMS", {"plain SD": "clip", "ELLA flexible": "flexible"})
    monkeypatch.setattr(dpg, "STEPS", 8)
    done = CliRunner().invoke(dpg.main, ["--count", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "dpg.json").read_text())["systems"]
    plain, ella, chance = (found[name]["average"]["corrected"] for name in ("plain SD", "ELLA flexible", dpg.CHANCE))
    assert ella > 90 and ella > plain + 10 and chance < 40
    assert found["ELLA flexible"]["prompts"] == found["ELLA flexible"]["published"]["prompts"] == 3
    assert dpg.table(found) in (tmp_path / "dpg.md").read_text()
    assert {path.name for path in (tmp_path / "run" / "ELLA flexible" / "sheets").iterdir()} == {
        f"miniature{i:03d}.png" for i in range(3)}
    assert (tmp_path / "dpg.png").stat().st_size > 5000


def test_what_is_on_file_is_what_the_page_shows() -> None:
    page, found = (results.HERE / "README.md").read_text(), json.loads((results.HERE / "dpg.json").read_text())
    assert results.between_marks(page, "dpg", dpg.table(found["systems"])) == page
    assert f"`{found['command']}` on {found['machine']}." in page
    assert (results.HERE / "dpg.png").stat().st_size < 300_000
