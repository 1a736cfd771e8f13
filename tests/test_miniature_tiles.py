"""Prompts of their own for the tiles of one picture, read back from the pixels."""

import studio
from benchmarks import tiles


def test_a_prompt_for_each_tile() -> None:
    """Every quarter is the picture that its prompt asks for; the network on the whole draws other things."""
    found = tiles.measure(studio.miniature(), 1, ("dpmpp_2m",))
    assert found["tiles without overlap"]["dpmpp_2m"] == found["each prompt in a picture of its own"]["dpmpp_2m"] == (
        1.0, 100.0)
    assert found["the whole picture at once"]["dpmpp_2m"][0] < 0.6
    assert "| tiles without overlap | 1.00 | 100.0 |" in tiles.table(found, 1)
