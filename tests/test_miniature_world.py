"""The miniature world: what is drawn is what is read, early facts are early and late ones late, the score counts."""

import random
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.miniature import bayes, latents
from benchmarks.miniature.questions import ask, summary
from benchmarks.miniature.scenes import (
    BACKGROUND_NAMES,
    CELL,
    COLOUR_NAMES,
    COLOURS,
    FILLS,
    RIMS,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    parse,
    random_scene,
    render,
    to_pictures,
    to_tensor,
)

kinds = st.sampled_from([*product(SHAPES, COLOUR_NAMES, FILLS, RIMS)])
things = st.builds(lambda place, kind: Thing(place, *kind), st.integers(0, 8), kinds)
scenes = st.builds(
    lambda background, found: Scene(background, tuple(sorted(found))),
    st.sampled_from(BACKGROUND_NAMES),
    st.lists(things, min_size=1, max_size=9, unique_by=lambda thing: thing.place),
)


def _full(background: str, first: int) -> Scene:
    """Nine things side by side; over all `first` every thing stands at every place."""
    every = [*product(SHAPES, COLOUR_NAMES, FILLS, RIMS)]
    return Scene(background, tuple(Thing(place, *every[(first + 40 * place) % len(every)]) for place in range(9)))


@pytest.mark.parametrize("background", BACKGROUND_NAMES)
def test_everything_at_every_place_reads_back_clean_and_with_an_error(background: str) -> None:
    """So two scenes that differ in one fact never look the same. The error is three times an autoencoder's."""
    noise = np.random.default_rng(0)
    for first in range(360):
        scene = _full(background, first)
        picture = render(scene)
        assert parse(picture) == scene
        worse = (picture + noise.normal(0, 12, picture.shape)).clip(0, 255).round().astype(np.uint8)
        assert parse(worse) == scene


@given(scenes)
def test_a_picture_reads_back_as_its_scene(scene: Scene) -> None:
    assert parse(to_pictures(to_tensor([render(scene)]))[0]) == scene


def test_half_a_thing_is_a_smudge_and_half_a_pattern_is_unclear() -> None:
    empty, square = render(Scene("night", ())), Thing(4, "square", "yellow")
    picture = render(Scene("night", (square,)))
    picture[CELL : 2 * CELL, CELL : CELL + 8] = empty[CELL : 2 * CELL, CELL : CELL + 8]
    assert parse(picture) == Scene("night", (), smudges=1)
    plain, full = render(Scene("night", (square,))), render(Scene("night", (Thing(4, "square", "yellow", "checked"),)))
    found = parse(((plain.astype(float) + full) / 2).round().astype(np.uint8)).things[0]
    assert (found.shape, found.fill, found.rim) == ("square", "unclear", "no")


def test_no_pattern_is_clipped() -> None:
    for colour, fill, rim in product(COLOURS, FILLS, RIMS):
        crop = render(Scene("night", (Thing(0, "square", colour, fill, rim),)))[1:15, 1:15].astype(int)
        assert abs(crop.mean((0, 1)) - COLOURS[colour]).max() <= 10


def test_parse_refuses_another_size() -> None:
    with pytest.raises(ValueError, match=r"\(48, 48, 3\), got \(64, 64, 3\)"):
        parse(np.zeros((64, 64, 3), np.uint8))


def test_unseen_combinations_are_a_sixth_and_leave_every_pair_to_training() -> None:
    every = [Thing(place, *kind) for place, kind in product(range(9), product(SHAPES, COLOUR_NAMES, FILLS))]
    seen = [thing for thing in every if not thing.unseen]
    assert 0.12 < 1 - len(seen) / len(every) < 0.2
    for a, b in (("shape", "colour"), ("shape", "place"), ("colour", "place"), ("shape", "fill"), ("colour", "fill")):
        pairs = {(getattr(thing, a), getattr(thing, b)) for thing in every}
        assert {(getattr(thing, a), getattr(thing, b)) for thing in seen} == pairs


def test_random_scenes_are_all_seen_or_not() -> None:
    rng = random.Random(0)
    for count in range(1, 5):
        assert not any(random_scene(rng, count).unseen for _ in range(50))
        assert all(random_scene(rng, count, unseen=True).unseen for _ in range(50))


def test_early_facts_are_decided_at_four_times_the_noise_of_late_ones() -> None:
    sigmas = (0.18, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 14.6)
    result = bayes.curves(bayes.coded, draws=60, sigmas=sigmas)
    where = {name: bayes.halfway(mass, sigmas) for name, mass in result.items()}
    for early, late in product(bayes.EARLY, bayes.LATE):
        assert where[early] > 4 * where[late], where


@given(scenes, st.integers(0, 1000))
def test_a_code_says_its_scene_also_with_noise(scene: Scene, seed: int) -> None:
    code = latents.codes([scene])
    assert code.shape == (1, 4, SIZE // 8, SIZE // 8)
    noise = torch.randn(code.shape, generator=torch.Generator().manual_seed(seed))
    if len(scene.things) < 9:  # else there is no background to be read
        assert latents.read(code + 0.08 * noise) == [scene]


def test_codes_have_about_unit_variance_and_no_mean() -> None:
    rng = random.Random(0)
    code = latents.codes([random_scene(rng, 1 + n % 4) for n in range(1000)])
    assert code.mean((0, 2, 3)).abs().max() < 0.1
    assert code.std() == pytest.approx(1, abs=0.1)


WANTED = Scene("night", (Thing(0, "ring", "red", "striped"), Thing(8, "cross", "blue", "plain", "dark")))
RING, CROSS = WANTED.things


@pytest.mark.parametrize(
    ("found", "right", "all_right", "early_right"),
    [
        (WANTED, 13, True, True),
        (Scene("snow", WANTED.things), 12, False, False),
        # the ring in another colour
        (Scene("night", (Thing(0, "ring", "green", "striped"), CROSS)), 12, False, False),
        # the ring without its pattern, then with one that is unclear, then the cross without its rim
        (Scene("night", (Thing(0, "ring", "red"), CROSS)), 12, False, True),
        (Scene("night", (Thing(0, "ring", "red", "unclear"), CROSS)), 12, False, True),
        (Scene("night", (RING, Thing(8, "cross", "blue"))), 12, False, True),
        # the cross gone: its entity, two attributes, two details, the relation and the count
        (Scene("night", (RING,)), 6, False, False),
        # places exchanged: two attributes and the relation
        (Scene("night", (Thing(0, "cross", "blue", "plain", "dark"), Thing(8, "ring", "red", "striped"))), 10, False,
         False),
        # a third thing: only the count
        (Scene("night", (RING, Thing(4, "heart", "pink"), CROSS)), 12, False, False),
        (Scene("night", WANTED.things, smudges=1), 12, False, False),
        (Scene("snow", ()), 0, False, False),
    ],
)  # fmt: skip
def test_questions(found: Scene, right: int, all_right: bool, early_right: bool) -> None:
    answers = ask(WANTED, found)
    assert len(answers.answers) == 13
    assert sum(answer for _, answer in answers.answers) == right
    assert (answers.all_right, answers.early_right) == (all_right, early_right)
    assert answers.score == pytest.approx(100 * right / 13)


def test_two_of_a_shape_answer_for_themselves() -> None:
    wanted = Scene("night", (Thing(0, "ring", "red"), Thing(8, "ring", "blue")))
    assert ask(wanted, wanted).all_right
    swapped = Scene("night", (Thing(0, "ring", "blue"), Thing(8, "ring", "red")))
    assert sum(answer for _, answer in ask(wanted, swapped).answers) == 11  # both colours wrong, all else right


@given(st.lists(scenes, min_size=1, max_size=4))
def test_a_perfect_set_scores_100(wanted: list[Scene]) -> None:
    small = [Scene(scene.background, scene.things[:4]) for scene in wanted]
    result = summary([ask(scene, scene) for scene in small])
    assert all(value == 100 for value in result.values())
