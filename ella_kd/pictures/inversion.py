"""From a picture to the noise that would have drawn it: inversion, so that another prompt redraws it."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from ella_kd.conditioning import above
from ella_kd.denoiser import Condition, Denoiser
from ella_kd.files import write_safetensors
from ella_kd.guidance import Guidance
from ella_kd.pictures.reading import Source, read_picture
from ella_kd.pipeline import Pipeline
from ella_kd.request import Mode, method_named, whole
from ella_kd.samplers import get_sampler, get_schedule
from ella_kd.samplers.model import bind

FORMAT = "ella_kd latents 1"


@torch.no_grad()
def invert(
    pipeline: Pipeline,
    picture: Source,
    prompt: str | Condition,
    *,
    negative: str | Condition = "",
    mode: Mode = "flexible",
    guidance: Guidance | float = 1.0,
    sampler: str = "euler",
    schedule: str = "karras",
    steps: int = 50,
    refine: int = 3,
    progress: bool = True,
) -> Tensor:
    """The latents [1, C, h, w] at the schedule's first sigma from which the prompt draws the picture:
    `draw(sd, another, latents=invert(sd, "cat.png", "a cat"), sampler="euler", schedule="karras", steps=50)`.

    sampler "euler": DDIM's inversion (arXiv 2010.02502), and "euler_cfg_pp", CFG++'s (arXiv 2406.08070), whose guidance
    is lambda: each of their steps is undone, the model asked again at its answer `refine` times (a fixed point; 0: at
    the step's lower end, as published). Any other deterministic sampler walks the schedule upwards, to its order.
    The redraw takes the same sampler, schedule and steps; without guidance (1) it comes closest.
    Raises ValueError for a picture of another size than whole latents, and for a sampler that adds noise.
    """
    name, schedule = method_named(sampler, schedule)
    row = get_sampler(name)
    if row.stochastic or (row.cfg_pp and name != "euler_cfg_pp"):
        raise ValueError(f"{name} cannot be undone: choose euler, euler_cfg_pp, or one without noise, heun")
    model = pipeline.denoiser(guidance if isinstance(guidance, Guidance) else None)
    cond, uncond = (pipeline.encode(said, mode) if isinstance(said, str) else said for said in (prompt, negative))
    extra_args: dict[str, Any] = {"cond": cond, "uncond": uncond}
    if not isinstance(guidance, Guidance):
        extra_args["cond_scale"] = guidance
    sigmas = get_schedule(schedule).sigmas(whole("steps", steps), model)
    up = sigmas[sigmas > 0].flip(0).to(pipeline.device)
    with pipeline.at_work("vae"):
        x = pipeline.vae.encode(read_picture(picture)[0]).float().contiguous()
    with pipeline.at_work("unet", "tsc"):
        if name in ("euler", "euler_cfg_pp"):
            return undone(model, x, up, extra_args, row.cfg_pp, refine, disable=not progress)
        return row.function(model, x, up, extra_args=extra_args, disable=not progress)


@torch.no_grad()
def undone(model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Mapping[str, Any], cfg_pp: bool, refine: int,
           disable: bool | None = None) -> Tensor:
    """x at the first of these ascending sigmas, taken to the last by undoing Euler's steps, or those of its CFG++ form.

    A step down is x' = D + t/s (x - V), V the denoised, or U with CFG++; up it is x = V + s/t (x' - D), with the
    model's answers to x itself, found from those to the last guess.
    """
    levels = [float(level) for level in sigmas]
    bound = bind(model, x, tuple(levels), cfg_pp, extra_args)
    for t, s in tqdm(list(pairwise(levels)), disable=disable):
        below, at = x, t
        for _ in range(refine + 1):
            found = bound(x, at)
            v = found.uncond if cfg_pp else found.denoised
            assert v is not None
            x, at = v + (below - found.denoised) * (s / t), s
    return x


def save_latents(path: str | Path, latents: Tensor, sigma: float, **said: object) -> None:
    """Write latents at this sigma, and what is said of them, as a safetensors file. Raises OSError that names it."""
    write_safetensors(path, {"latents": latents}, {"format": FORMAT, "sigma": repr(float(sigma)),
                                                   **{name: str(value) for name, value in said.items()}})


def load_latents(path: str | Path, sigma: float | None = None) -> Tensor:
    """The latents of a file of `save_latents`. Raises FileNotFoundError, or ValueError for another file and for latents
    at another noise level than sigma."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no latents at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            if said.get("format") != FORMAT:
                raise ValueError(f"{path} holds no latents of ours: make them with ella-kd invert")
            latents: Tensor = file.get_tensor("latents")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    own = float(said["sigma"])
    if sigma is not None and (above(own, sigma * 1.001) or above(sigma, own * 1.001)):
        raise ValueError(f"{path} holds latents at sigma {own:g}, and the run begins at {sigma:g}: draw with the "
                         "schedule they were made with")
    return latents
