"""Every guidance rule with every kind of mask, on methods drawn from all families: one property."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd.guidance import CFG, Guidance, GuidedDenoiser
from ella_kd.pictures.keep import Keep, Repaint, Unlock
from ella_kd.samplers import SAMPLERS, get_sigmas_karras, randn
from every_rule import INNER, RULES
from tiny import features, noise

SEEDS, SHAPE = [7, 8], (2, 4, 4, 6)
SIGMAS = get_sigmas_karras(4, 0.05, 10.0)
PICTURE = noise(*SHAPE, seed=3)
NOISE = randn(SHAPE, SEEDS)
HALF = torch.zeros(4, 6)
HALF[:, 3:] = 1
OWN = torch.stack([HALF, 1 - HALF])[:, None]  # of each row another half
MASKS: list[Repaint | Unlock] = [
    Repaint(HALF), Repaint(OWN), Repaint(0.5 * HALF), Unlock(3 * HALF),
    Unlock(OWN * torch.tensor([1.0, 8.0]).view(2, 1, 1, 1)),
]
CONDITIONS = {"cond": features(2, 5, seed=1), "uncond": features(3, seed=2)}


class Unplanned:
    """A model whose every call stands alone: nobody tells it the levels of the run."""

    def __init__(self, model: Keep) -> None:
        self.model = model

    def __call__(self, x: Tensor, sigma: Tensor, **args: Any) -> Tensor:
        return self.model(x, sigma, **args)

    def predict(self, x: Tensor, sigma: Tensor, need_uncond: bool = False, **args: Any) -> Any:
        return self.model.predict(x, sigma, need_uncond, **args)


@pytest.mark.parametrize(("name", "rule", "mask"), [
    (list(SAMPLERS)[11 * i % len(SAMPLERS)], rule, MASKS[i % len(MASKS)]) for i, rule in enumerate(RULES)])
@torch.no_grad()
def test_every_rule_keeps_what_is_masked(name: str, rule: Guidance, mask: Repaint | Unlock) -> None:
    """What is kept is the picture, nothing is NaN; the same seeds without a plan are the same picture."""
    def drawn(model: Any) -> Tensor:
        x = PICTURE + SIGMAS[0] * NOISE
        return SAMPLERS[name].function(model, x, SIGMAS, extra_args=CONDITIONS, disable=True, seeds=SEEDS)

    model = Keep(GuidedDenoiser(INNER, rule), PICTURE, mask)
    x = drawn(model)
    assert bool(x.isfinite().all())
    kept = (mask.values == 0).expand(SHAPE)
    assert float((x - PICTURE)[kept].abs().max()) < 1e-5
    assert torch.allclose(drawn(Unplanned(model)), x, rtol=1e-4, atol=1e-3 * float(x.abs().max()))


def test_the_property_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Repaint, "at", lambda self, level: torch.ones_like(self.values))
    with pytest.raises(AssertionError):
        test_every_rule_keeps_what_is_masked("euler", CFG(3.0), Repaint(HALF))
