"""Weights on sentences change the pictures of the miniature: of two that contradict, the heavier one is drawn."""

import pytest

from benchmarks.miniature.scenes import COLOUR_NAMES, PLACES
from studio import latents, miniature, read, t5

PAIRS = [(a, b) for a in COLOUR_NAMES for b in COLOUR_NAMES if a != b][:20]


def drawn(weight: float, max_length: int | None) -> tuple[int, int]:
    """How many of 20 hearts come out in the colour of the sentence with this weight, and in the other's."""
    encoder = miniature().t5
    assert encoder is not None
    texts = [f"The scene is set in a dark night. A {b} heart sits in the center. "
             f"(A {a} heart sits in the center.:{weight})" for a, b in PAIRS]
    scenes = read(latents(encoder.weighted(texts, max_length), t5(""), len(PAIRS)))
    centers = [next((thing.colour for thing in scene.things if PLACES[thing.place] == "center"), None)
               for scene in scenes]
    first, second = (sum(got == pair[i] for got, pair in zip(centers, PAIRS, strict=True)) for i in (0, 1))
    return first, second


@pytest.mark.parametrize("max_length", [None, 128])
def test_a_sentence_is_drawn_more_often_the_more_it_weighs(max_length: int | None) -> None:
    """At weights 0.3, 1, 3, 10 it won 0, 2, 17, 20 of 20, in fixed mode 0, 3, 11, 18; the other 20, 15, 1, 0, in fixed
    mode 20, 16, 8, 1."""
    first, second = zip(*(drawn(weight, max_length) for weight in (0.3, 3, 10)))
    assert list(first) == sorted(set(first)), first
    assert list(second) == sorted(second, reverse=True), second
    assert first[0] <= 2 and first[-1] >= 15 and second[0] >= 17 and second[-1] <= 4
