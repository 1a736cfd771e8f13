"""Answers for a guidance rule without a network, and what is true of every rule."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from ella_kd.guidance import Answers, Branch, Guidance
from ella_kd.scale import Scale
from tiny import noise

SCALES = st.floats(-3, 20)
SEVERAL = st.lists(SCALES, min_size=3, max_size=3)
FUNCTIONS: list[Callable[[float], float]] = [lambda sigma: 7.0 if sigma > 1 else 1.0, lambda sigma: 1 + sigma / 2]


def make_answers(sigmas: Sequence[float] = (14.0, 2.5, 0.1), channels: int = 4, height: int = 3, width: int = 2,
                 seed: int = 0, branches: Sequence[Branch] = (Branch("cond"), Branch("uncond"), Branch("image")),
                 dtype: torch.dtype = torch.float64) -> Answers:
    """Random answers to random x: one row per sigma."""
    shape = (len(sigmas), channels, height, width)
    sigma = torch.tensor(sigmas, dtype=dtype).view(-1, 1, 1, 1)
    denoised = {branch: noise(*shape, seed=seed + i + 1, dtype=dtype) for i, branch in enumerate(branches)}
    return Answers(noise(*shape, seed=seed, dtype=dtype) * sigma, sigma, denoised, no_more, {})


def no_more(x: Tensor, branch: Branch) -> Tensor:
    raise AssertionError("this rule asks for nothing more")


ANSWERS = st.builds(make_answers, st.lists(st.floats(0.03, 15), min_size=3, max_size=3), st.integers(1, 4),
                    st.integers(1, 4), st.integers(2, 4), st.integers(0, 100))


def with_answer(answers: Answers, branch: Branch, denoised: Tensor) -> Answers:
    return Answers(answers.x, answers.sigma, {**answers.denoised, branch: denoised}, no_more, {})


def in_eps(answers: Answers) -> Answers:
    """The same answers, eps in place of denoised."""
    eps = {branch: (answers.x - d) / answers.sigma for branch, d in answers.denoised.items()}
    return Answers(answers.x, answers.sigma, eps, no_more, {})


def row_of(answers: Answers, i: int) -> Answers:
    only = {branch: d[i:i + 1] for branch, d in answers.denoised.items()}
    return Answers(answers.x[i:i + 1], answers.sigma[i:i + 1], only, no_more, {})


def rows(answers: Answers, *branches: str) -> list[tuple[np.ndarray, ...]]:
    """Per sample: x, sigma and the named answers, as float64 arrays [C, h, w] to compute with by hand."""
    tensors = [answers.x, answers.sigma, *(answers[Branch(name)] for name in branches)]
    return list(zip(*(t.double().numpy() for t in tensors), strict=True))


def close(got: Tensor, wanted: Sequence[np.ndarray]) -> bool:
    return bool(np.allclose(got.numpy(), np.stack(wanted), rtol=1e-9, atol=1e-9))


def check_scales(rule: Callable[[Scale], Guidance], answers: Answers, scales: Sequence[float]) -> None:
    """A batch is a loop of singles; scales may be one per sample or functions of sigma."""
    together = rule(scales).at(())(answers)
    for i, scale in enumerate(scales):
        alone = rule(scale).at(())(row_of(answers, i))
        assert torch.allclose(together[i:i + 1], alone, rtol=1e-9, atol=1e-9)
    levels = tuple(answers.sigma.flatten().tolist())
    for function in FUNCTIONS:
        assert rule(function).varies
        assert torch.equal(rule(function).at(levels)(answers), rule([function(s) for s in levels]).at(())(answers))


def check_value(rule: Guidance, scope: Mapping[str, object]) -> None:
    """A rule of plain numbers is named by its repr, and is equal to it."""
    again = eval(repr(rule), dict(scope))
    assert again == rule
    assert hash(again) == hash(rule)
