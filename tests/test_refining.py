"""A refiner takes over: SDXL's as in diffusers, and every door to it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from ella_kd import Pipeline, Refiner, cli, draw, generate, read_settings
from ella_kd.encoding import reader
from ella_kd.models import AutoencoderKL, UNet
from ella_kd.models.freeu import FreeU
from ella_kd.models.inside import Inside
from ella_kd.models.tiled import Tiled
from ella_kd.pictures.hires import Hires
from ella_kd.request import Request
from families import family
from test_pictures_pixels import speckled
from test_pipeline_families import NEGATIVE, PROMPT, theirs
from test_request import read_a1111
from tiny import randomised, relative

DRAWN: dict[str, Any] = {"steps": 5, "scale": 3.0, "seeds": [1, 2], "count": 2, "progress": False}


@pytest.fixture
def other(pipeline: Pipeline) -> Pipeline:
    """Another UNet of the same family, without ELLA."""
    assert isinstance(pipeline.unet, UNet)
    return replace(pipeline, unet=randomised(UNet(pipeline.unet.config), 9, 0.12), tsc=None, t5=None, name="other")


@torch.no_grad()
def test_sdxl_and_its_refiner_are_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their base to denoising_end = .8 and their refiner from denoising_start = .8: the timesteps below 200."""
    base, refiner = family("sdxl").ours, family("refiner").ours
    start = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(7))
    args: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 5.0,
                            "num_inference_steps": 5, "output_type": "latent"}
    first, second = theirs("sdxl"), theirs("refiner")
    half = first(latents=start, height=48, width=64, denoising_end=0.8, **args).images
    want = second(image=half, denoising_start=0.8, **args).images
    assert isinstance(second, diffusers.StableDiffusionXLImg2ImgPipeline)
    seen: list[Tensor] = []
    whole = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z: whole(self, seen.append(z) or z))  # type: ignore[func-returns-value]
    cond, uncond = refiner.encode(PROMPT, "clip"), refiner.encode(NEGATIVE, "clip", score=2.5)
    for at in (0.8, 0.81):
        sigmas = first.scheduler.sigmas
        draw(base, base.encode(PROMPT, "clip"), uncond=base.encode(NEGATIVE, "clip"), guidance=5.0, sampler="euler",
             sigmas=sigmas, latents=start * sigmas[0], refiner=Refiner(refiner, cond, uncond, at), progress=False)
    assert relative(seen[0], want) < 1e-4
    assert relative(seen[1], want) > 1e-3, "the step at timestep 199 is then the base's"


@pytest.mark.parametrize("more", [
    {}, {"sampler": "dpmpp_2m_cfg_pp", "scale": 0.6}, {"sampler": "dpm_adaptive"}, {"sampler": "euler_ancestral"},
    {"start": speckled(16, 16), "strength": 0.9}, {"mask": Image.new("L", (16, 16), 255), "start": speckled(16, 16)},
    {"guidance": "Rescale(CFG(3), 0.7)", "scale": 7.0}],
    ids=["plain", "cfg_pp", "adaptive", "ancestral", "start", "mask", "rule"])
def test_a_model_that_refines_itself_draws_what_it_draws_alone(pipeline: Pipeline, other: Pipeline,
                                                               more: dict[str, Any]) -> None:
    """But for what a method remembers over the hand-over, dpmpp_2m's; another draws another picture, in its steps."""
    options = {**DRAWN, "sampler": "euler", **more}
    alone = generate(pipeline, "a red circle", **options)
    same = generate(pipeline, "a red circle", refiner=pipeline, **options)
    changed = generate(pipeline, "a red circle", refiner=other, **options)
    if options["sampler"] != "dpmpp_2m_cfg_pp":
        assert [a.image.tobytes() for a in alone] == [b.image.tobytes() for b in same]
    assert all(a.image.tobytes() != b.image.tobytes() for a, b in zip(alone, changed, strict=True))
    late = generate(pipeline, "a red circle", refiner=other, refiner_at=0.9999, **options)
    if options["sampler"] == "euler":
        assert [a.image.tobytes() for a in alone] == [b.image.tobytes() for b in late], "below the last timestep of all"


@pytest.mark.parametrize("name", ["tile", "tiling", "freeu"])
def test_it_is_dressed_as_the_model_is(pipeline: Pipeline, other: Pipeline, name: str) -> None:
    def dressed(system: Pipeline) -> Pipeline:
        unet: Any = system.unet
        return {"tile": lambda: replace(system, unet=Tiled(unet, 4, 2)), "tiling": system.seamless,
                "freeu": lambda: replace(system, unet=Inside(unet, FreeU.of(unet)))}[name]()

    how: dict[str, Any] = {"steps": 2, "width": 24, "height": 8, "seeds": 3, "progress": False}
    asked: dict[str, Any] = {name: "16:8" if name == "tile" else True}
    [drawn] = generate(pipeline, "a red circle", refiner=other, refiner_at=0.1, scale=3.0, mode="clip", **asked, **how)
    refiner = dressed(other)
    texts = [(system.encode("a red circle", "clip"), system.encode("", "clip")) for system in (pipeline, refiner)]
    for second, same in ((refiner, True), (other, False)):
        [want] = draw(dressed(pipeline), texts[0][0], uncond=texts[0][1], guidance=3.0,
                      refiner=Refiner(second, *texts[1], 0.1), **how)
        assert (drawn.image.tobytes() == want.tobytes()) == same


def test_the_second_pass_of_hires_has_one_of_its_own(pipeline: Pipeline, other: Pipeline) -> None:
    """It reads the second pass's prompt, for the second pass's noise levels."""
    says = "a [red|blue] circle"
    how: dict[str, Any] = {"steps": 2, "width": 8, "height": 8, "seeds": 3, "progress": False}
    [drawn] = generate(pipeline, "a circle", refiner=other, refiner_at=0.2, mode="clip", syntax=True, scale=3.0,
                       hires="2:0.6", hires_prompt=says, hires_steps=4, **how)
    first, second = Hires((16, 16), 0.6), Request(says, mode="clip", syntax=True)
    levels = replace(first, steps=4).sigmas(pipeline, "karras", 2).tolist()
    ring, theirs = (reader(system, second, levels)([second]) for system in (pipeline, other))
    cond, uncond = other.encode("a circle", "clip"), other.encode("", "clip")
    for refiner, same in ((Refiner(other, *theirs, at=0.2), True), (None, False)):
        hires = replace(first, steps=4, cond=ring[0], uncond=ring[1], refiner=refiner)
        [want] = draw(pipeline, pipeline.encode("a circle", "clip"), uncond=pipeline.encode("", "clip"), guidance=3.0,
                      hires=hires, refiner=Refiner(other, cond, uncond, at=0.2), **how)
        assert (drawn.image.tobytes() == want.tobytes()) == same


def test_the_command_and_the_settings(tiny_files: dict[str, str], other: Pipeline, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other.save("other.safetensors")
    words = [word for name, value in tiny_files.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--device", "cpu", "--steps", "4", "--seed", "3"]
    done = CliRunner().invoke(cli.main, ["generate", "a red circle", *words, "--refiner", "other.safetensors",
                                         "--refiner-at", "0.5"])
    assert done.exit_code == 0, done.output
    path = next(Path("out").iterdir())
    with Image.open(path) as image:
        drawn = np.asarray(image)
        said = read_a1111(image.text["parameters"])  # type: ignore[attr-defined]
    assert (said["Refiner"], said["Refiner switch at"]) == ("other.safetensors", "0.5")
    assert Request.from_text(Request.from_png(path).parameters()).arguments() == read_settings(path)
    pipeline = Pipeline.load(**tiny_files, device="cpu")  # type: ignore[arg-type]
    [again] = generate(pipeline, progress=False, **read_settings(path))
    assert (np.asarray(again.image) == drawn).all()
    [given] = generate(pipeline, progress=False, **{**read_settings(path), "refiner": other})
    assert (np.asarray(given.image) == drawn).all() and given.settings.refiner == "other"
    for more, what in ((["--refiner", "none.safetensors"], "no checkpoint at none.safetensors: --refiner takes"),
                       (["--refiner", tiny_files["tsc"]], "--refiner takes a Stable Diffusion checkpoint"),
                       (["--refiner", "other.safetensors", "--refiner-at", "1.5"], "between 0 and 1, got 1.5")):
        done = CliRunner().invoke(cli.main, ["generate", "a", *words, *more])
        assert done.exit_code == 2 and what in done.output


def test_other_latents_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="other latents than the model: 4 channels of 8 px"):
        generate(pipeline, "a", refiner=family("refiner").ours, steps=2, progress=False)
