"""The captions of the miniature world: they say everything, say what is true, and keep held-out wordings out."""

import random
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.miniature import captions
from benchmarks.miniature.captions import NOBODY, Word, Wording
from benchmarks.miniature.scenes import COLOUR_NAMES, FILLS, PLACES, Scene, Thing, random_scene

captioned = st.builds(
    lambda seed, count, unseen: random_scene(random.Random(seed), count, unseen),
    st.integers(0, 2**32 - 1), st.integers(1, 4), st.booleans(),
)  # fmt: skip
forms = {**captions.FORMS, **captions.HELD_FORMS}
wordings = st.builds(
    Wording, st.sampled_from([None, *forms]), st.none(), st.sampled_from([None, False]),
    st.sampled_from([None, "stops", "commas", "none"]), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip


def _runs(words: list[Word]) -> list[tuple[int, str]]:
    """Who is spoken of, and what is said in one go."""
    runs: list[tuple[int, str]] = []
    for word in words:
        if runs and runs[-1][0] == word.owner:
            runs[-1] = (word.owner, f"{runs[-1][1]} {word.text}")
        else:
            runs.append((word.owner, word.text))
    return runs


STEPS = {phrase: step for step, phrases in captions.NEXT_TO.items() for phrase in phrases}


def _placed(index: int, words: list[Word], scene: Scene) -> bool:
    """Whether a caption says where a thing is, by name or by a neighbour; a wrong neighbour fails."""
    thing, runs = scene.things[index], _runs(words)
    names = captions.WHERE[PLACES[thing.place]]
    said = any(owner == index and where in text for owner, text in runs for where in names)
    for (owner, text), (other, _) in pairwise(runs):
        for phrase, step in STEPS.items():
            if owner == index and text.endswith(phrase) and other >= 0:
                neighbour = scene.things[other]
                assert (thing.row - neighbour.row, thing.column - neighbour.column) == step
                said = True
    return said


@given(captioned, wordings, st.integers(0, 1000))
def test_a_dense_caption_states_everything_in_known_words(scene: Scene, wording: Wording, seed: int) -> None:
    words = captions.dense(scene, random.Random(seed), wording)
    assert {word.text for word in words} <= set(captions.vocabulary())
    assert len(words) <= captions.LONGEST
    for index, thing in enumerate(scene.things):
        said = {word.text for word in words if word.owner == index}
        assert {thing.colour, thing.shape} <= said
        assert thing.fill == "plain" or thing.fill in said or captions.NOUNS[thing.fill] in said
        assert not (set(FILLS) - {thing.fill, "plain"}) & said
        assert {"dark", "light"} & said == {thing.rim} - {"no"}
        assert not (set(COLOUR_NAMES) - {thing.colour}) & said
        assert _placed(index, words, scene)
    about = " ".join(word.text for word in words if word.owner == captions.BACKGROUND)
    assert about in captions.SCENERY[scene.background]


@given(captioned, st.integers(0, 1000))
def test_stated_relations_are_true(scene: Scene, seed: int) -> None:
    for (owner, text), (other, _) in pairwise(_runs(captions.dense(scene, random.Random(seed)))):
        if owner >= 0 and other >= 0 and " is " in text and text.startswith("the "):
            thing, seen = scene.things[owner], scene.things[other]
            holds = {"above": thing.row < seen.row, "below": thing.row > seen.row,
                     "to the left of": thing.column < seen.column, "to the right of": thing.column > seen.column}
            assert holds.get(text.partition(" is ")[2], True), (scene, text)


def test_relations_distractors_and_repetitions_are_stated_at_all() -> None:
    rng = random.Random(0)
    paragraphs = [(scene := random_scene(rng, 3), captions.dense(scene, rng)) for _ in range(300)]
    for wanted, least, most in (
        (lambda scene, words: any(not _placed_by_name(i, words, scene) for i in range(3)), 30, 150),
        (lambda scene, words: any(word.owner == NOBODY and word.text in ("quiet", "moves", "nobody") for word in words),
         30, 150),
        (lambda scene, words: all(sum(w.owner == i and w.text == scene.things[i].shape for w in words) > 1
                                  for i in range(3)), 20, 120),
        (lambda scene, words: "." not in {word.text for word in words}, 60, 200),
    ):  # fmt: skip
        assert least < sum(wanted(scene, words) for scene, words in paragraphs) < most


def _placed_by_name(index: int, words: list[Word], scene: Scene) -> bool:
    said = " ".join(word.text for word in words if word.owner == index)
    return any(where in said for where in captions.WHERE[PLACES[scene.things[index].place]])


def _held(words: list[Word]) -> set[str]:
    """Which held-out forms and orders a caption has, found without the grammar."""
    text = " ".join(word.text for word in words)
    rims = [f"{rim} rimmed" for rim in ("dark", "light")]
    orders = {"colour fill rim": product(COLOUR_NAMES, FILLS, rims),
              "rim colour fill": product(rims, COLOUR_NAMES, FILLS)}  # fmt: skip
    found = {name for name, phrases in orders.items() if any(" ".join(phrase) in text for phrase in phrases)}
    found |= {"what"} if any(f"what {verb}" in text for verb in captions.VERBS) else set()
    return found | ({"has"} if "the picture has a " in text else set())


def test_held_out_forms_and_orders_are_kept_from_training() -> None:
    rng = random.Random(0)
    for n in range(2000):
        scene = random_scene(rng, 1 + n % 4)
        assert not any(_held(write(scene, rng)) for write in (captions.dense, captions.tags, captions.web))
    scene = Scene("snow", (Thing(0, "ring", "red", "striped", "dark"),))
    found = {name for _ in range(50) for form in captions.HELD_FORMS
             for name in _held(captions.dense(scene, rng, Wording(form=form, held=True)))}  # fmt: skip
    assert found == {"colour fill rim", "rim colour fill", "what", "has"}


@pytest.mark.parametrize("form", forms)
def test_a_form_alone_and_an_order_are_kept(form: str) -> None:
    scene = Scene("snow", (Thing(0, "ring", "red"), Thing(4, "heart", "pink"), Thing(8, "cross", "blue")))
    words = captions.dense(scene, random.Random(1), Wording(form=form, order=(2, 0, 1), twice=False, relations=0.0))
    said = [word.owner for word in words if word.owner >= 0 and word.text == scene.things[word.owner].shape]
    assert list(dict.fromkeys(said)) == [2, 0, 1]


def test_lengths_go_from_four_words_to_the_longest() -> None:
    rng = random.Random(0)
    lengths = [len(captions.dense(random_scene(rng, 4), rng)) for _ in range(200)]
    lengths += [len(captions.tags(random_scene(rng, 1), rng, noise=0.0)) for _ in range(500)]
    assert min(lengths) <= 6
    assert 110 <= max(lengths) <= captions.LONGEST


def test_noisy_tags_leave_things_out_and_complete_ones_do_not() -> None:
    scene = Scene("snow", (Thing(0, "ring", "red", "striped"), Thing(8, "cross", "blue", "plain", "dark")))
    noisy = [captions.text(captions.tags(scene, random.Random(i), noise=0.5)) for i in range(50)]
    assert any("red" not in caption for caption in noisy)
    for i in range(50):
        complete = {word.text for word in captions.tags(scene, random.Random(i), noise=0.0)}
        assert {"red", "ring", "striped", "blue", "cross", "dark", "snow"} - complete <= {"snow"}
        assert "snow" in complete or "snowy" in complete
