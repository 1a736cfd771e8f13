"""Areas of a picture: how much of each latent pixel a box or a drawn mask covers, with hard and soft edges."""

from itertools import pairwise, product

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ella_kd import Box, Mask
from strategies import DRAWN, FEATHERS, GRID, boxes


def along(start: float, stop: float, n: int, feather: float) -> np.ndarray:
    """A box's share of n pixels, by the trapezoid rule between the kinks of its outline."""
    def outline(x: float) -> float:
        if not feather:
            raise AssertionError
        up = 1.0 if start == 0 else min(1.0, max(0.0, (x - start) / feather + 0.5))
        down = 0.0 if stop == 1 else min(1.0, max(0.0, (x - stop) / feather + 0.5))
        return up - down

    shares: list[float] = []
    for a, b in ((k / n, (k + 1) / n) for k in range(n)):
        if feather:
            kinks = (edge + side * feather / 2 for edge in (start, stop) for side in (-1, 1))
            points = sorted({a, b, *(k for k in kinks if a < k < b)})
            shares.append(float(np.trapezoid([outline(p) for p in points], points)) * n)
        else:
            shares.append(max(0.0, min(b, stop) - max(a, start)) * n)
    return np.array(shares)


SIZES = st.integers(1, 12)
FRACTIONS = st.floats(0, 1)


@settings(max_examples=200)
@given(st.tuples(FRACTIONS, FRACTIONS), st.tuples(FRACTIONS, FRACTIONS), SIZES, SIZES, st.floats(0, 1))
def test_a_box_covers_of_each_pixel_what_its_outline_says(xs: tuple[float, float], ys: tuple[float, float], h: int,
                                                         w: int, feather: float) -> None:
    (left, right), (top, bottom) = sorted(xs), sorted(ys)
    if right - left < 1e-3 or bottom - top < 1e-3:
        return
    feather = feather if feather > 1e-3 else 0.0
    drawn = Box(left, top, right, bottom).draw(h, w, feather).numpy()
    assert np.allclose(drawn, np.outer(along(top, bottom, h, feather), along(left, right, w, feather)), atol=1e-9)
    assert feather or np.isclose(drawn.mean(), (right - left) * (bottom - top), atol=1e-12)


@settings(max_examples=100)
@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4, unique=True), SIZES, SIZES, FEATHERS)
def test_adjacent_boxes_sum_to_1_however_soft(cuts: list[float], h: int, w: int, feather: float) -> None:
    edges = [0.0, *sorted(cuts), 1.0]
    columns = [Box(a, 0, b, 1).draw(h, w, feather) for a, b in pairwise(edges) if b > a]
    assert torch.allclose(torch.stack(columns).sum(0), torch.ones(h, w, dtype=torch.float64), rtol=0, atol=1e-12)
    quarters = [Box(*corner, *end).draw(h, w, feather) for corner, end in (
        ((0, 0), (0.5, 0.4)), ((0.5, 0), (1, 0.4)), ((0, 0.4), (0.5, 1)), ((0.5, 0.4), (1, 1)))]
    assert torch.allclose(torch.stack(quarters).sum(0), torch.ones(h, w, dtype=torch.float64), rtol=0, atol=1e-12)


@settings(max_examples=100)
@given(boxes(), SIZES, SIZES, FEATHERS, st.sampled_from((GRID, 3 * GRID)))
def test_the_mask_of_a_drawn_box_is_the_box(box: Box, h: int, w: int, feather: float, size: int) -> None:
    drawn = Mask(box.draw(size, size, 0.0))
    assert torch.allclose(drawn.draw(h, w, feather), box.draw(h, w, feather), atol=1e-9)


@given(DRAWN, SIZES, SIZES)
def test_a_mask_is_its_mean_over_each_pixel(mask: Mask, h: int, w: int) -> None:
    rows, columns = mask.values.shape
    drawn = mask.draw(h, w, 0.0)
    for y, x in product(range(h), range(w)):
        share = [[max(0.0, min((y + 1) / h, (r + 1) / rows) - max(y / h, r / rows)) * h
                  * max(0.0, min((x + 1) / w, (c + 1) / columns) - max(x / w, c / columns)) * w
                  for c in range(columns)] for r in range(rows)]
        assert abs(float((torch.tensor(share, dtype=torch.float64) * mask.values).sum() - drawn[y, x])) < 1e-9


def test_masks_come_as_bool_or_floats_of_any_dtype() -> None:
    assert torch.allclose(Mask(torch.ones(2, 2, dtype=torch.bool)).draw(3, 3, 0.0), torch.ones(3, 3).double())
    assert Mask(torch.rand(4, 4).half()).draw(2, 2, 0.1).dtype == torch.float64
