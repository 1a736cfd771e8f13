"""Every rule on a composition is the rule on the weighted sum of what the network says to each prompt alone."""

from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd import ELLA, And, Box, LDMDenoiser, Regions
from ella_kd.guidance import (
    CFG,
    COND,
    SAG,
    UNCOND,
    Answers,
    Branch,
    Guidance,
    GuidedDenoiser,
)
from ella_kd.models.patches import Recorder
from every_rule import INNER, PLACE, RULES
from tiny import answer, features, noise, relative

X, SIGMA = noise(2, 4, 8, 8) * 5, torch.tensor([5.0, 0.6])
LEVELS = tuple(SIGMA.tolist())
IDS = [f"{i} {type(rule).__name__}" for i, rule in enumerate(RULES)]
A, B, EMPTY = (ELLA(INNER.tsc, features(*lengths, seed=seed)) for lengths, seed in (((4,), 5), ((3, 6), 6), ((1,), 9)))
LEFT = Box(0, 0, 0.5, 1).draw(8, 8, 0.0).to(X.dtype)
COMPOSITIONS: dict[str, tuple[Any, Any]] = {
    "and": (And((A, 1.2), (B, -0.4)), lambda a, b, u: 1.2 * a - 0.4 * b + 0.2 * u),
    "regions": (Regions((A, Box(0, 0, 0.5, 1)), (B, Box(0.5, 0, 1, 1))), lambda a, b, u: LEFT * a + (1 - LEFT) * b),
    "nested": (Regions((And((A, 0.5), (B, 0.3)), Box(0, 0, 0.5, 1))),
               lambda a, b, u: LEFT * (0.5 * a + 0.3 * b + 0.2 * u) + (1 - LEFT) * u),
}


@pytest.mark.parametrize(("rule", "name"), [
    *(pytest.param(rule, name, id=f"{own} {name}") for rule, own, name in zip(RULES, IDS, cycle(COMPOSITIONS))),
    (RULES[-1], "regions"), (RULES[-1], "nested")])
def test_a_rule_on_a_composition(rule: Guidance, name: str) -> None:
    composition, combine = COMPOSITIONS[name]
    decided = rule.at(LEVELS)

    def of(branch: Branch, x: Tensor = X) -> Tensor:
        model = branch.model or INNER
        assert isinstance(model, LDMDenoiser)
        a, b, u = (answer(model, x, SIGMA, part, branch.patch) for part in (A, B, EMPTY))
        return u if branch.cond == "uncond" else combine(a, b, u)

    maps = {}
    for branch, place in decided.watched.items():
        assert branch == UNCOND
        recorder = Recorder(place)
        answer(INNER, X, SIGMA, EMPTY, recorder)
        maps[branch] = recorder.received
    answers = Answers(X, SIGMA[:, None, None, None], {b: of(b) for b in {COND, *decided.branches}},
                      lambda x, branch: of(branch, x), maps)
    expected = decided(answers)
    args = {"cond": composition, "uncond": EMPTY}
    together, separate = GuidedDenoiser(INNER, rule), GuidedDenoiser(INNER, rule, together=False)
    assert relative(together(X, SIGMA, **args), expected) < 2e-4
    assert relative(separate(X, SIGMA, **args), expected) < 2e-4


def test_a_map_of_a_composition_is_an_error() -> None:
    """SAG without uncond reads the map of cond, and several prompts have several."""
    for together in (True, False):
        with pytest.raises(ValueError, match=r"one call of the UNet|not that of a composition"):
            GuidedDenoiser(INNER, SAG(CFG(1.0), 0.75, place=PLACE), together)(
                X, SIGMA, cond=And((A, 0.5), (B, 0.5)), uncond=EMPTY)
