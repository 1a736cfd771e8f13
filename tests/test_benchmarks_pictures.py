"""How pictures that start from pictures, and prompts of which one word is swapped, are judged; the shares need time."""

import json
from dataclasses import replace

import pytest

from benchmarks import pictures, prompt_to_prompt, results
from benchmarks.miniature import captions
from benchmarks.miniature.scenes import render
from benchmarks.prompt_to_prompt import FACTS, judge, triples


def test_what_is_on_file_is_what_the_page_shows() -> None:
    page = (results.HERE / "README.md").read_text()
    for module, name in ((pictures, "pictures"), (prompt_to_prompt, "prompt to prompt")):
        found = json.loads((results.HERE / f"{name.replace(' ', '_')}.json").read_text())
        assert results.between_marks(page, name, module.table(found["rows"])) == page
        assert f"`{found['command']}` on" in page


def test_pairs_differ_in_one_word_and_are_judged_by_what_else_changed() -> None:
    for triple in triples(captions.dense, 4):
        words = [prompt.split() for prompt in (triple.prompt, *(prompt for _, prompt in triple.edits))]
        assert [sum(a != b for a, b in zip(words[0], each, strict=True)) for each in words[1:]] == [1, 1]
        wanted = [triple.expected(triple.scene, fact, value) for fact, (value, _) in zip(FACTS, triple.edits)]
        scenes = [triple.scene, *wanted]
        assert judge(triple, [render(scene) for scene in scenes]) == {fact: [100, 100, 100, 0] for fact in FACTS}
        same = judge(triple, [render(triple.scene)] * 3)
        assert same == {fact: [0, 0, 100, 0] for fact in FACTS}
        other = [scenes[0], *(replace(scene, things=tuple(each for each in scene.things if each.place == triple.place))
                              for scene in wanted)]
        told = judge(triple, [render(scene) for scene in other])
        assert told is not None
        assert all(told[fact][:3] == [0, 100, 0] and told[fact][3] > 1 for fact in FACTS)
        assert judge(triple, [render(replace(triple.scene, things=()))] * 3) is None
    with pytest.raises(ValueError, match="differ in one word"):
        triples(lambda scene, rng: [], 1)
