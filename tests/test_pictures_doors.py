"""`draw` and `generate` from a picture: every option draws, is kept in the PNG, and means what it says."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ella_kd import Pipeline, draw, generate, read_settings
from ella_kd.pictures.inversion import invert, load_latents, save_latents
from ella_kd.pictures.options import FromPicture
from ella_kd.pictures.start import slerp
from ella_kd.request import Request
from ella_kd.samplers import randn
from ella_kd.starting import over
from test_pictures_pixels import speckled, white

PICTURE, MASK = speckled(24, 16), white((24, 16), (12, 4, 20, 12))
OPTIONS: dict[str, dict[str, Any]] = {
    "strength": {"strength": 0.3}, "convention": {"strength": 0.7, "convention": "comfyui"},
    "mask": {"mask": "mask.png", "mask_blur": 0.0},
    "inverted": {"mask": "mask.png", "invert_mask": True, "mask_grow": 2},
    "fill": {"mask": "mask.png", "fill": "noise", "strength": 0.8}, "blur": {"mask": "mask.png", "fill": "blur"},
    "nothing": {"mask": "mask.png", "fill": "nothing", "strength": 0.5, "match_colours": True},
    "crop": {"mask": "mask.png", "crop_to_mask": True, "padding": 2}, "repeats": {"mask": "mask.png", "repeats": 2},
    "map": {"strength_map": "mask.png", "strength": 0.9}, "extend": {"extend": "left=8,top=4"},
    "extend and mask": {"extend": "bottom=4", "mask": "mask.png"}, "size": {"width": 16, "height": 12},
    "noise": {"sampler": "euler_ancestral", "eta": 0.5, "s_noise": 0.9, "strength": 0.5},
    "churn": {"sampler": "heun", "s_churn": 4.0}, "sigmas": {"sigmas": (5.0, 1.0, 0.0)},
    "variation": {"variation": 0.3, "variation_seed": 9}, "sampler": {"mask": "mask.png", "sampler": "dpm_fast"},
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tiny_files: dict[str, str]) -> Pipeline:
    return Pipeline.load(**tiny_files, device="cpu")  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    PICTURE.save("start.png")
    MASK.save("mask.png")
    return tmp_path


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_draws_and_is_drawn_again(pipeline: Pipeline, files: Path, name: str) -> None:
    options: dict[str, Any] = {"start": "start.png", "steps": 2, "seeds": 3, "scale": 2.0, **OPTIONS[name]}
    [picture] = generate(pipeline, "a red circle", progress=False, **options)
    assert np.asarray(picture.image).std() > 0
    picture.save("drawn.png")
    [again] = generate(pipeline, progress=False, **read_settings("drawn.png"))
    assert again.settings == picture.settings
    assert again.image.tobytes() == picture.image.tobytes()
    assert Request.from_text(picture.settings.parameters()).arguments() == picture.settings.arguments()


def test_sizes(pipeline: Pipeline) -> None:
    sizes = [generate(pipeline, "a", start=PICTURE, mask=MASK, steps=1, seeds=0, progress=False, **more)[0].image.size
             for more in ({}, {"extend": "left=8"}, {"width": 16, "height": 16}, {"crop_to_mask": True})]
    assert sizes == [(24, 16), (32, 16), (16, 16), (24, 16)]


def test_strength_1_is_text_to_image(pipeline: Pipeline) -> None:
    """Bit for bit, with a picture of the same size, and with a mask that is white."""
    options: dict[str, Any] = {"seeds": [1, 2], "prompts": ["a red circle"], "count": 2, "steps": 3, "progress": False}
    plain = generate(pipeline, width=24, height=16, **options)
    for more in ({"strength": 1.0}, {"mask": Image.new("L", (24, 16), 255)}, {"extend": "left=8"}):
        drawn = generate(pipeline, start=PICTURE, **more, **options)
        same = [a.image.tobytes() == b.image.tobytes() for a, b in zip(plain, drawn, strict=True)]
        assert same == [("extend" not in more)] * 2


def test_a_level_map_is_image_to_image_and_a_black_and_white_one_a_mask(pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"prompts": "a red circle", "seeds": 1, "steps": 3, "progress": False, "start": PICTURE}
    [level] = generate(pipeline, strength_map=Image.new("L", (24, 16), 51), **options)
    [plain] = generate(pipeline, strength=0.2, **options)
    assert level.image.tobytes() == plain.image.tobytes()
    [mapped] = generate(pipeline, strength_map=MASK, **options)
    [masked] = generate(pipeline, mask=MASK, mask_blur=0, **options)
    assert mapped.image.tobytes() == masked.image.tobytes()


def test_rows_are_their_own(pipeline: Pipeline) -> None:
    """A picture depends on its own seed, and on nothing that is drawn with it, wherever it starts."""
    text, nothing = pipeline.encode("a red circle"), pipeline.encode("")
    for more in ({"mask": MASK, "fill": "noise", "strength": 0.6}, {"strength_map": speckled(24, 16), "repeats": 2},
                 {"variation": 0.5, "variation_seed": 4}):
        options: dict[str, Any] = {"uncond": nothing, "sampler": "dpmpp_2m_sde", "steps": 2, "progress": False,
                                   "start": PICTURE, **more}
        pair, alone = draw(pipeline, text, seeds=[1, 2], **options), draw(pipeline, text, seeds=2, **options)
        assert np.abs(np.asarray(pair[1]).astype(int) - np.asarray(alone[0])).max() <= 1


def test_an_own_beginning(pipeline: Pipeline) -> None:
    """What was read and encoded once begins many runs; own noise and own levels too."""
    begun = over(pipeline, FromPicture(start=PICTURE, strength=0.5), "karras", 2)
    text, nothing = pipeline.encode("a red circle"), pipeline.encode("")
    options: dict[str, Any] = {"uncond": nothing, "progress": False, "seeds": 1}
    [one] = draw(pipeline, text, start=begun, **options)
    [two] = draw(pipeline, text, start=PICTURE, strength=0.5, steps=2, **options)
    [three] = draw(pipeline, text, start=PICTURE, sigmas=begun.sigmas, noise=randn((1, 4, 4, 6), [1]), **options)
    assert one.tobytes() == two.tobytes() == three.tobytes()
    with pytest.raises(ValueError, match="strength was said"):
        draw(pipeline, text, start=begun, strength=0.3, **options)
    with pytest.raises(ValueError, match="not both"):
        draw(pipeline, text, start=begun, latents=begun.picture, **options)


def test_slerp() -> None:
    a, b = randn((2, 4, 64, 64), [1, 2]), randn((2, 4, 64, 64), [3, 4])
    assert torch.allclose(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    assert torch.equal(slerp(a, a, 0.4), a)
    assert torch.allclose(slerp(a, b, 0.5).std((1, 2, 3)), torch.ones(2), atol=0.02)


def test_inverted_latents(pipeline: Pipeline, files: Path) -> None:
    """Of every form; a file of them is checked, and begins a run."""
    text, nothing = pipeline.encode("a red circle"), pipeline.encode("")
    for sampler in ("euler_cfg_pp", "dpmpp_2m", "heun"):
        x = invert(pipeline, "start.png", text, negative=nothing, guidance=0.3, sampler=sampler, steps=2,
                   progress=False)
        assert x.shape == (1, 4, 4, 6) and bool(x.isfinite().all())
    with pytest.raises(ValueError, match="cannot be undone"):
        invert(pipeline, PICTURE, text, sampler="euler_ancestral")
    first = pipeline.denoiser().sigma_max
    save_latents("x.safetensors", x, first, prompt="a red circle")
    assert torch.equal(load_latents("x.safetensors", first), x)
    [picture] = generate(pipeline, "a red circle", latents="x.safetensors", sampler="heun", steps=2, seeds=0,
                         progress=False)
    assert picture.image.size == (24, 16)
    with pytest.raises(ValueError, match="the run begins at 5"):
        load_latents("x.safetensors", 5.0)
    with pytest.raises(FileNotFoundError, match="no latents"):
        load_latents("y.safetensors")


@pytest.mark.parametrize(("options", "what"), [
    ({"sampler": "euler", "eta": 0.5}, "euler has no eta"), ({"variation": 2.0}, "0 to 1"),
    ({"sigmas": [1.0, 2.0]}, "fall from"), ({"sigmas": "1,b"}, "are numbers"), ({"mask": "a.png"}, "start picture"),
    ({"start": "a.png", "latents": "b"}, "not both"), ({"s_churn": -1.0, "sampler": "euler"}, "0 or more"),
])
def test_refusals(pipeline: Pipeline, options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        generate(pipeline, "a", **options)


def test_a_picture_that_is_no_file_is_named(pipeline: Pipeline, tmp_path: Path) -> None:
    [picture] = generate(pipeline, "a", start=PICTURE, steps=1, seeds=0, progress=False)
    picture.save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = read_settings(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="a picture of 24x16 that is no file"):
        generate(pipeline, **again)
