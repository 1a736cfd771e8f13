"""Rules that change what is answered, whatever the prompt says, and the average of the last steps."""

from typing import Any

import numpy as np
import pytest
import torch

import studio
from ella_kd.guidance import CFG, COND, Contrast, Guidance, GuidedDenoiser, Mirrored, Shifted
from ella_kd.guidance.tones import Average, towards
from ella_kd.images import to_images
from ella_kd.samplers import get_sigmas_karras, randn, sample_euler
from rules import check_value, make_answers, row_of

SCOPE = {"CFG": CFG, "Contrast": Contrast, "Mirrored": Mirrored, "Shifted": Shifted, "inf": float("inf")}


@pytest.mark.parametrize("rule", [Contrast(CFG(3), 1.3), Mirrored(CFG(3), "y"), Shifted(CFG(3), (0.1, 0.0, -0.2, 1.0)),
                                  Contrast(CFG(3), 2.0, 0.5, 5.0), Mirrored(CFG(3), "x", sigma_lo=1.0)], ids=str)
def test_what_each_does(rule: Guidance) -> None:
    """In its interval and nowhere else; a batch is its rows; a value that its text names."""
    answers = make_answers(height=4)
    plain, got = CFG(3)(answers), rule(answers)
    for i, sigma in enumerate(answers.sigma.flatten().tolist()):
        inside = rule.sigma_lo < sigma <= rule.sigma_hi  # type: ignore[attr-defined]
        assert torch.equal(got[i], plain[i]) == (not inside)
        assert torch.allclose(rule(row_of(answers, i)), got[i : i + 1])
        if inside and isinstance(rule, Contrast):
            assert torch.allclose(got[i].mean((1, 2)), plain[i].mean((1, 2)))
            assert torch.allclose(got[i].std((1, 2)), rule.factor * plain[i].std((1, 2)))
        elif inside and isinstance(rule, Mirrored):
            assert torch.equal(got[i], got[i].flip(2 if rule.axis == "x" else 1))
        elif inside and isinstance(rule, Shifted):
            assert torch.allclose((got - plain)[i].mean((1, 2)), torch.tensor(rule.channels).double())
    check_value(rule, SCOPE)


def test_refusals() -> None:
    axis: Any = "z"
    for make, what in ((lambda: Contrast(CFG(3), -1.0), "0 or more"), (lambda: Mirrored(CFG(3), axis), "choose x, y"),
                       (lambda: Mirrored(CFG(3), "x", 2.0, 1.0), "sigma_lo"),
                       (lambda: Shifted(CFG(3), (1.0,))(make_answers()), "each of 4 channels"),
                       (lambda: towards(studio.miniature().vae, red=3.0), "-1 to 1"), (lambda: Average(0), "1 or more"),
                       (lambda: Average(3).mean, "no step")):
        with pytest.raises(ValueError, match=what):
            make()
    assert COND in Mirrored(CFG(1)).branches


@torch.no_grad()
def test_colour_and_mirror_on_the_miniature() -> None:
    """The shift of a colour makes the picture redder or darker; a mirrored one is symmetric; the average of the last
    denoised is one, between them."""
    sd = studio.miniature()
    cond, uncond = studio.t5("The scene is set in a dark night. A blue ring sits at the middle left."), studio.t5("")
    side = sd.size // sd.vae.factor

    def pixels(rule: Guidance, callback: Average | None = None) -> np.ndarray:
        model = GuidedDenoiser(studio.denoiser(), rule)
        sigmas = get_sigmas_karras(8, model.sigma_min, model.sigma_max)
        x = randn((2, 4, side, side), [1, 2]) * sigmas[0]
        z = sample_euler(model, x, sigmas, extra_args={"cond": cond, "uncond": uncond}, callback=callback, disable=True)
        return np.stack([np.asarray(image).astype(float) for image in to_images(sd.vae.decode(z))])

    average = Average(3)
    plain = pixels(CFG(3), average)
    redder = pixels(Shifted(CFG(3), towards(sd.vae, red=0.3)))
    change = (redder - plain).mean((0, 1, 2))
    assert change[0] > 1.2 * max(abs(change[1]), abs(change[2]))
    mirrored = pixels(Mirrored(CFG(3)))
    assert np.abs(mirrored - mirrored[:, :, ::-1]).mean() < 0.5 * np.abs(plain - plain[:, :, ::-1]).mean()
    assert len(average.denoised) == 3 and average.mean.shape == (2, 4, side, side)
    assert torch.allclose(average.mean * 3, sum(average.denoised[1:], average.denoised[0]), atol=1e-5)
