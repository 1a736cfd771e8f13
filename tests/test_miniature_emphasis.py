"""Weights on words change the pictures of the miniature: the more a colour weighs, the more often it is drawn."""

from functools import cache

import pytest
import torch

from benchmarks.miniature.scenes import COLOUR_NAMES, PLACES, parse, to_pictures
from ella_kd import CFGDenoiser, ELLADenoiser, Pipeline
from ella_kd.samplers import get_sigmas_karras, randn, sample_dpmpp_2m

PAIRS = [(a, b) for a in COLOUR_NAMES for b in COLOUR_NAMES if a != b][:20]


@cache
def miniature() -> Pipeline:
    return Pipeline.miniature(device="cpu")


@torch.no_grad()
def drawn(weight: float, max_length: int | None) -> tuple[int, int]:
    """How many of 20 "red blue" hearts, "red" of this weight, come out in the first colour, and in the second."""
    sd, n = miniature(), len(PAIRS)
    assert sd.t5 is not None and sd.tsc is not None
    cond = sd.t5.weighted([f"The picture shows snow. A ({a}:{weight}) {b} heart sits in the center." for a, b in PAIRS],
                          max_length)
    denoiser = CFGDenoiser(ELLADenoiser(sd.unet, sd.tsc, sd.noise_schedule))
    sigmas = get_sigmas_karras(10, denoiser.sigma_min, denoiser.sigma_max)
    extra_args = {"cond": cond, "uncond": sd.t5(""), "cond_scale": 3.0}
    latents = sample_dpmpp_2m(denoiser, randn((n, 4, 8, 8), list(range(n))) * sigmas[0], sigmas,
                              extra_args=extra_args, disable=True)
    scenes = [parse(picture) for picture in to_pictures(sd.vae.decode(latents))]
    centers = [next((thing.colour for thing in scene.things if PLACES[thing.place] == "center"), None)
               for scene in scenes]
    first, second = (sum(got == pair[i] for got, pair in zip(centers, PAIRS, strict=True)) for i in (0, 1))
    return first, second


@pytest.mark.parametrize(("max_length", "weights"), [(None, (0.3, 1, 4, 10)), (128, (0.3, 10))])
def test_a_colour_is_drawn_more_often_the_more_it_weighs(max_length: int | None, weights: tuple[float, ...]) -> None:
    """Of 30 pairs the first colour won 7, 9, 16, 23 times at weights 0.3, 1, 4, 10, and the second 17, 10, 8, 5."""
    first, second = zip(*(drawn(weight, max_length) for weight in weights))
    assert list(first) == sorted(set(first)), first
    assert list(second) == sorted(second, reverse=True), second
    assert first[-1] >= 2 * first[0] and second[0] >= 2 * second[-1]
