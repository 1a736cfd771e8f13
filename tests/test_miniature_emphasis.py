"""Weights on words change the pictures of the miniature: the more a colour weighs, the more often it is drawn."""

import pytest

from benchmarks.miniature.scenes import COLOUR_NAMES, PLACES
from studio import latents, miniature, read, t5

PAIRS = [(a, b) for a in COLOUR_NAMES for b in COLOUR_NAMES if a != b][:20]


def drawn(weight: float, max_length: int | None) -> tuple[int, int]:
    """How many of 20 "red blue" hearts, "red" of this weight, come out in the first colour, and in the second."""
    encoder = miniature().t5
    assert encoder is not None
    texts = [f"The picture shows snow. A ({a}:{weight}) {b} heart sits in the center." for a, b in PAIRS]
    scenes = read(latents(encoder.weighted(texts, max_length), t5(""), len(PAIRS)))
    centers = [next((thing.colour for thing in scene.things if PLACES[thing.place] == "center"), None)
               for scene in scenes]
    first, second = (sum(got == pair[i] for got, pair in zip(centers, PAIRS, strict=True)) for i in (0, 1))
    return first, second


@pytest.mark.parametrize(("max_length", "weights"), [(None, (0.3, 4, 10)), (128, (0.3, 10))])
def test_a_colour_is_drawn_more_often_the_more_it_weighs(max_length: int | None, weights: tuple[float, ...]) -> None:
    """Of 30 pairs the first colour won 7, 9, 16, 23 times at weights 0.3, 1, 4, 10, and the second 17, 10, 8, 5."""
    first, second = zip(*(drawn(weight, max_length) for weight in weights))
    assert list(first) == sorted(set(first)), first
    assert list(second) == sorted(second, reverse=True), second
    assert first[-1] >= 2 * first[0] and second[0] >= 2 * second[-1]
