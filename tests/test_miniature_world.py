"""The miniature world: what is drawn is what is read, what is written is true, and the score counts what it says."""

import random
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.miniature import captions
from benchmarks.miniature.questions import ask, summary
from benchmarks.miniature.scenes import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    PLACES,
    SHAPES,
    Scene,
    Thing,
    parse,
    random_scene,
    render,
    to_pictures,
    to_tensor,
)

things = st.builds(Thing, st.integers(0, 8), st.sampled_from(SHAPES), st.sampled_from(COLOUR_NAMES))
scenes = st.builds(
    lambda background, found: Scene(background, tuple(sorted(found))),
    st.sampled_from(BACKGROUND_NAMES),
    st.lists(things, min_size=1, max_size=9, unique_by=lambda thing: thing.place),
)
captioned = st.builds(
    lambda seed, count, unseen: random_scene(random.Random(seed), count, unseen),
    st.integers(0, 2**32 - 1), st.integers(1, 3), st.booleans(),
)  # fmt: skip


@given(scenes)
def test_a_picture_reads_back_as_its_scene(scene: Scene) -> None:
    assert parse(render(scene)) == scene
    assert parse(to_pictures(to_tensor([render(scene)]))[0]) == scene


@given(scenes, st.integers(0, 2**32 - 1))
def test_reading_survives_noise(scene: Scene, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 12, (32, 32, 3))
    assert parse((render(scene) + noise).clip(0, 255).round().astype(np.uint8)) == scene


def test_half_a_thing_is_a_smudge_and_not_a_thing() -> None:
    picture = render(Scene("night", (Thing(4, "square", "yellow"),)))
    picture[12:20, 12:16] = render(Scene("night", ()))[12:20, 12:16]
    found = parse(picture)
    assert found.smudges == 1
    assert found.things == ()


def test_parse_refuses_another_size() -> None:
    with pytest.raises(ValueError, match=r"\(32, 32, 3\), got \(64, 64, 3\)"):
        parse(np.zeros((64, 64, 3), np.uint8))


def test_unseen_triples_are_a_tenth_and_leave_every_pair_to_training() -> None:
    triples = [Thing(p, s, c) for p, s, c in product(range(9), SHAPES, COLOUR_NAMES)]
    seen = [thing for thing in triples if not thing.unseen]
    assert len(triples) - len(seen) == 25
    assert {(t.shape, t.colour) for t in seen} == set(product(SHAPES, COLOUR_NAMES))
    assert {(t.shape, t.place) for t in seen} == set(product(SHAPES, range(9)))
    assert {(t.colour, t.place) for t in seen} == set(product(COLOUR_NAMES, range(9)))


@given(captioned)
def test_a_dense_caption_states_everything_in_known_words(scene: Scene) -> None:
    words = captions.dense(scene, random.Random(0))
    assert {word.text for word in words} <= set(captions.vocabulary())
    for index, thing in enumerate(scene.things):
        said = " ".join(word.text for word in words if word.owner == index)
        assert f"{thing.colour} {thing.shape}" in said
        assert any(place in said for place in captions.WHERE[PLACES[thing.place]])
    about = " ".join(word.text for word in words if word.owner == captions.BACKGROUND)
    assert about in captions.SCENERY[scene.background]


def _relations(words: list[captions.Word]) -> Iterator[tuple[int, str, str]]:
    """(who, relation, other shape) of every 'the A is above the B .' in a caption."""
    for i, word in enumerate(words):
        if word.text == "is" and word.owner >= 0 and words[i + 1].owner == captions.NOBODY:
            sentence = [w.text for w in words[i + 1 :]]
            sentence = sentence[: sentence.index(".")]
            yield word.owner, " ".join(sentence[:-2]), sentence[-1]


@given(captioned, st.integers(0, 1000))
def test_stated_relations_are_true(scene: Scene, seed: int) -> None:
    for who, relation, shape in _relations(captions.dense(scene, random.Random(seed))):
        thing = scene.things[who]
        holds = {
            "above": lambda other, thing=thing: thing.row < other.row,
            "below": lambda other, thing=thing: thing.row > other.row,
            "to the left of": lambda other, thing=thing: thing.column < other.column,
            "to the right of": lambda other, thing=thing: thing.column > other.column,
        }[relation]
        assert any(holds(other) for other in scene.things if other.shape == shape)


def test_relations_are_stated_at_all() -> None:
    rng = random.Random(0)
    said = [list(_relations(captions.dense(random_scene(rng, 2), rng))) for _ in range(100)]
    assert 20 < sum(map(bool, said)) < 60


def test_noisy_tags_leave_things_out_and_complete_ones_do_not() -> None:
    scene = Scene("snow", (Thing(0, "ring", "red"), Thing(8, "cross", "blue")))
    noisy = [captions.text(captions.tags(scene, random.Random(i), noise=0.5)) for i in range(50)]
    assert any("red" not in caption for caption in noisy)
    complete = [captions.text(captions.tags(scene, random.Random(i), noise=0.0)).lower() for i in range(50)]
    assert all("red ring" in caption and "blue cross" in caption and "snow" in caption for caption in complete)


WANTED = Scene("night", (Thing(0, "ring", "red"), Thing(8, "cross", "blue")))


@pytest.mark.parametrize(
    ("found", "right", "all_right"),
    [
        (WANTED, 9, True),
        (Scene("snow", WANTED.things), 8, False),
        # the ring in another colour
        (Scene("night", (Thing(0, "ring", "green"), Thing(8, "cross", "blue"))), 8, False),
        # the cross gone: its entity, two attributes, the relation and the count
        (Scene("night", (Thing(0, "ring", "red"),)), 4, False),
        # places exchanged: two attributes and the relation
        (Scene("night", (Thing(0, "cross", "blue"), Thing(8, "ring", "red"))), 6, False),
        # a third thing: only the count
        (Scene("night", (*WANTED.things, Thing(4, "heart", "pink"))), 8, False),
        (Scene("night", WANTED.things, smudges=1), 8, False),
        (Scene("snow", ()), 0, False),
    ],
)
def test_questions(found: Scene, right: int, all_right: bool) -> None:
    answers = ask(WANTED, found)
    assert len(answers.answers) == 9
    assert sum(answer for _, answer in answers.answers) == right
    assert answers.all_right is all_right
    assert answers.score == pytest.approx(100 * right / 9)


def test_two_of_a_shape_answer_for_themselves() -> None:
    wanted = Scene("night", (Thing(0, "ring", "red"), Thing(8, "ring", "blue")))
    assert ask(wanted, wanted).all_right
    swapped = Scene("night", (Thing(0, "ring", "blue"), Thing(8, "ring", "red")))
    assert sum(answer for _, answer in ask(wanted, swapped).answers) == 7  # both colours wrong, all else right


@given(st.lists(scenes, min_size=1, max_size=4))
def test_a_perfect_set_scores_100(wanted: list[Scene]) -> None:
    small = [Scene(scene.background, scene.things[:3]) for scene in wanted]
    result = summary([ask(scene, scene) for scene in small])
    assert all(value == 100 for value in result.values())
