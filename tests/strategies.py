"""Hypothesis strategies of conditionings of every kind: a tree as plain tuples, the conditioning it says, and what each
row of it must show, found without any of the library's combinations: one row, one prompt, one sigma at a time."""

from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ella_kd.conditioning import ELLA, Box, Channels, Concat, Conditioning, Constant, Lerp, Mask, Stack, Switch, window
from ella_kd.models.noise_schedule import NoiseSchedule
from ella_kd.models.text import TextFeatures
from ella_kd.models.tsc import TSC
from tiny import FEATURES, WIDTH, noise, tiny_tsc

Spec = tuple[Any, ...]
SIGMAS = (0.1, 0.5, 1.0, 5.0, 14.0)
T = NoiseSchedule.sd15().sigma_to_t(torch.tensor(SIGMAS))
MASKS = ("flexible", "fixed", "weights")


class CountingTSC(TSC):
    """A small connector with random weights that counts its calls."""

    calls = 0

    def forward(self, features: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(features, t, mask)


@lru_cache(1)
def counting_tsc() -> CountingTSC:
    tsc = tiny_tsc()
    tsc.__class__ = CountingTSC
    assert isinstance(tsc, CountingTSC)
    return tsc


def texts(lengths: tuple[int, ...], kind: str, seed: int, width: int) -> TextFeatures:
    """Prompts of these lengths, padded with garbage; kind "fixed": nothing masks it; "weights": factors."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(len(lengths), max(lengths), width, generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    if kind == "weights":
        return TextFeatures(tokens, mask * torch.rand(mask.shape, generator=generator).add(0.5))
    return TextFeatures(tokens, None if kind == "fixed" or mask.all() else mask)


@st.composite
def leaves(draw: Any, rows: int, kinds: tuple[str, ...] = ("ella", "clip")) -> Spec:
    lengths = draw(st.lists(st.integers(1, 6), min_size=rows, max_size=rows))
    return draw(st.sampled_from(kinds)), tuple(lengths), draw(st.sampled_from(MASKS)), draw(st.integers(0, 99))


def boundaries(n: int) -> st.SearchStrategy[tuple[float, ...]]:
    """n falling sigmas, many of them exactly at one of SIGMAS."""
    return st.lists(st.sampled_from((*SIGMAS, 0.3, 2.0, 9.0)), min_size=n, max_size=n, unique=True).map(
        lambda values: tuple(sorted(values, reverse=True)))


@st.composite
def trees(draw: Any, rows: int, depth: int = 3, same_shape: bool = False) -> Spec:
    """A conditioning of one row, or of `rows`. same_shape: its tokens are ELLA's alone, so that Lerp takes it."""
    own = draw(st.sampled_from((1, rows)))
    kinds = ["leaf"] if depth == 0 else ["leaf", "switch", "lerp"] + ([] if same_shape else ["concat", "window"])
    if depth and own == rows:
        kinds += ["repeat"] + (["stack"] if own > 1 else [])
    kind = draw(st.sampled_from(kinds))
    below = lambda rows_: trees(rows_, depth - 1, same_shape)  # noqa: E731
    if kind == "leaf":
        return draw(leaves(own, ("ella",) if same_shape else ("ella", "clip")))
    if kind == "switch":
        parts = draw(st.lists(below(own), min_size=1, max_size=3))
        return "switch", tuple(parts), draw(boundaries(len(parts) - 1))
    if kind == "lerp":
        either = trees(own, depth - 1, True)
        return "lerp", draw(either), draw(either), draw(st.sampled_from((-0.5, 0.0, 0.3, 1.0)))
    if kind == "concat":
        return "concat", tuple(draw(st.lists(below(own), min_size=1, max_size=3)))
    if kind == "window":  # without `otherwise`, so beside others
        hi, lo = draw(boundaries(2))
        return "concat", draw(st.permutations((draw(below(own)), ("window", draw(below(own)), hi, lo))))
    if kind == "stack":
        first = draw(st.integers(1, own - 1))
        return "stack", (draw(exactly(first, depth - 1, same_shape)), draw(exactly(own - first, depth - 1, same_shape)))
    n = draw(st.sampled_from([n for n in range(1, own + 1) if own % n == 0]))
    return "repeat", draw(exactly(own // n, depth - 1, same_shape)), n


def exactly(rows: int, depth: int, same_shape: bool = False) -> st.SearchStrategy[Spec]:
    """Trees of just so many rows."""
    return trees(rows, depth, same_shape).filter(lambda spec: rows_of(spec) == rows)


@st.composite
def calls(draw: Any, depth: int = 3) -> tuple[Spec, tuple[float, ...]]:
    """A conditioning, perhaps with channels, and the sigma of each row of a batch that it fits."""
    batch = draw(st.integers(1, 4))
    one = st.sampled_from(SIGMAS)
    sigmas = draw(st.one_of(one.map(lambda sigma: (sigma,) * batch), st.tuples(*[one] * batch)))
    spec = draw(trees(batch, depth))
    if draw(st.booleans()):
        spec = ("channels", spec, draw(st.sampled_from((1, batch))))
    return spec, sigmas


def rows_of(spec: Spec) -> int:
    kind, *rest = spec
    if kind in ("ella", "clip"):
        return len(rest[0])
    if kind in ("switch", "concat"):
        return max(map(rows_of, rest[0]))
    if kind == "stack":
        return sum(map(rows_of, rest[0]))
    if kind == "lerp":
        return max(rows_of(rest[0]), rows_of(rest[1]))
    if kind == "repeat":
        return rows_of(rest[0]) * rest[1]
    return max(rows_of(rest[0]), rest[1] if kind == "channels" else 1)


def build(spec: Spec, tsc: TSC) -> Conditioning:
    """The conditioning that a tree says."""
    kind, *rest = spec
    if kind == "ella":
        return ELLA(tsc, texts(rest[0], rest[1], rest[2], FEATURES))
    if kind == "clip":
        return Constant(texts(rest[0], rest[1], rest[2], WIDTH))
    if kind == "channels":
        return Channels(build(rest[0], tsc), images(rest[1]))
    if kind == "repeat":
        return build(rest[0], tsc).repeat(rest[1])
    if kind == "lerp":
        return Lerp(build(rest[0], tsc), build(rest[1], tsc), rest[2])
    if kind == "window":
        return window(build(rest[0], tsc), *rest[1:])
    parts = [build(part, tsc) for part in rest[0]]
    if kind == "switch":
        return Switch(*parts, at=rest[1])
    return Concat(*parts) if kind == "concat" else Stack(*parts)


def images(rows: int) -> Tensor:
    return noise(rows, 2, 8, 8, seed=31)


def naive(spec: Spec, row: int, sigma: float, t: Tensor, tsc: TSC) -> tuple[Tensor, Tensor]:
    """What one row shows: the tokens that are seen [L, D] and the factors of their attention [L]."""
    kind, *rest = spec
    row = row if rows_of(spec) > 1 else 0
    if kind in ("ella", "clip"):
        lengths, masks, seed = rest
        text = texts(lengths, masks, seed, FEATURES if kind == "ella" else WIDTH)
        tokens = text.tokens[row]
        weights = torch.ones(len(tokens)) if text.mask is None else text.mask[row].float()
        tokens, weights = tokens[weights > 0], weights[weights > 0]
        if kind == "clip":
            return tokens, weights
        seen = tsc(tokens[None], t[None], weights[None])[0]
        return seen, torch.ones(len(seen))
    if kind == "repeat":
        return naive(rest[0], row // rest[1], sigma, t, tsc)
    if kind == "channels":
        return naive(rest[0], row, sigma, t, tsc)
    if kind == "window":
        inner = naive(rest[0], row, sigma, t, tsc)
        return inner if rest[2] < sigma <= rest[1] else (torch.zeros(0, WIDTH), torch.zeros(0))
    if kind == "switch":
        chosen = 0
        while chosen < len(rest[1]) and sigma <= rest[1][chosen]:
            chosen += 1
        return naive(rest[0][chosen], row, sigma, t, tsc)
    if kind == "stack":
        part = 0
        while row >= rows_of(rest[0][part]):
            row -= rows_of(rest[0][part])
            part += 1
        return naive(rest[0][part], row, sigma, t, tsc)
    if kind == "lerp":
        (a, weights), (b, _) = (naive(part, row, sigma, t, tsc) for part in rest[:2])
        return a + rest[2] * (b - a), weights
    parts = [naive(part, row, sigma, t, tsc) for part in rest[0]]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([weights for _, weights in parts])


GRID = 8


@st.composite
def boxes(draw: Any) -> Box:
    left, right = sorted(draw(st.lists(st.integers(0, GRID), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(draw(st.lists(st.integers(0, GRID), min_size=2, max_size=2, unique=True)))
    return Box(left / GRID, top / GRID, right / GRID, bottom / GRID)


DRAWN = st.builds(lambda h, w, seed: Mask(noise(h, w, seed=seed).sigmoid()), st.integers(1, 9), st.integers(1, 9),
                  st.integers(0, 9))
FEATHERS = st.sampled_from((0.0, 0.05, 0.3, 1.0))
