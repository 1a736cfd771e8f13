import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ella_kd import (
    CFG,
    And,
    CFGDenoiser,
    Concat,
    ELLADenoiser,
    Interval,
    LDMDenoiser,
    Pipeline,
    draw,
    generate,
)
from ella_kd.guidance.text import parse
from ella_kd.images import Picture, to_images
from ella_kd.models import TextFeatures, load_checkpoint, save_checkpoint
from ella_kd.request import Mode, Request
from ella_kd.samplers import SAMPLERS, SCHEDULES, get_sigmas_karras, randn, sample_dpmpp_2m

PROMPTS = ["a red circle", "a blue square on the left of a red circle"]


def pixels(picture: Picture) -> np.ndarray[Any, Any]:
    return np.asarray(picture.image).astype(int)


def equal(a: Sequence[Picture], b: Sequence[Picture], levels: int = 0) -> bool:
    return len(a) == len(b) and all(np.abs(pixels(x) - pixels(y)).max() <= levels for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", ["flexible", "fixed", "clip"])
@torch.no_grad()
def test_a_picture_is_what_the_script_of_the_parts_draws(pipeline: Pipeline, mode: Mode) -> None:
    assert pipeline.tsc and pipeline.t5 and pipeline.clip
    inner: LDMDenoiser
    if mode == "clip":
        inner, cond, uncond = LDMDenoiser(pipeline.unet), pipeline.clip(PROMPTS[1]), pipeline.clip("the right")
    else:
        inner, length = ELLADenoiser(pipeline.unet, pipeline.tsc), {"fixed": 128, "flexible": None}[mode]
        cond, uncond = pipeline.t5(PROMPTS[1], max_length=length), pipeline.t5("the right", max_length=length)
    denoiser = CFGDenoiser(inner)
    sigmas = get_sigmas_karras(3, denoiser.sigma_min, denoiser.sigma_max)
    latents = sample_dpmpp_2m(denoiser, randn((1, 4, 4, 6), [7]) * sigmas[0], sigmas, disable=True,
                              extra_args={"cond": cond, "uncond": uncond, "cond_scale": 5.0})
    [expected] = to_images(pipeline.vae.decode(latents))

    [got] = generate(pipeline, PROMPTS[1], negative="the right", mode=mode, steps=3, scale=5.0, width=24, height=16,
                     seeds=7)
    assert np.asarray(expected).std() > 5
    assert (np.asarray(expected) == np.asarray(got.image)).all()


def test_modes_negatives_prompts_and_scales_all_count(pipeline: Pipeline) -> None:
    base: dict[str, Any] = {"prompts": PROMPTS[0], "steps": 3, "seeds": 1}
    variants: list[dict[str, Any]] = [
        {}, {"mode": "fixed"}, {"mode": "clip"}, {"negative": "blue"}, {"prompts": PROMPTS[1]}, {"scale": 1.0},
        {"seeds": 2}, {"sampler": "heun"}, {"schedule": "normal"}, {"steps": 4}]
    drawn = [pixels(generate(pipeline, **{**base, **variant})[0]).tobytes() for variant in variants]
    assert len(set(drawn)) == len(variants)


def test_pictures_come_prompt_by_prompt_with_their_settings(pipeline: Pipeline) -> None:
    pictures = generate(pipeline, PROMPTS, negative="a", steps=2, seeds=5, count=2, batch_size=3, scale=3)
    assert [(p.settings.prompt, p.settings.seed) for p in pictures] == [
        (PROMPTS[0], 5), (PROMPTS[0], 6), (PROMPTS[1], 5), (PROMPTS[1], 6)]
    assert {p.image.size for p in pictures} == {(16, 16)}
    first = pictures[0].settings
    assert first == Request(PROMPTS[0], "a", steps=2, scale=3.0, seed=5, width=16, height=16, model="sd",
                            dtype="float32")


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "euler_ancestral"])
def test_a_picture_does_not_depend_on_those_it_is_drawn_with(pipeline: Pipeline, sampler: str) -> None:
    options: dict[str, Any] = {"sampler": sampler, "steps": 3, "progress": False}
    together = generate(pipeline, PROMPTS, count=2, seeds=[1, 2, 3, 4], batch_size=4, **options)
    alone = [generate(pipeline, PROMPTS[i // 2], seeds=i + 1, **options)[0] for i in range(4)]
    assert equal(together, alone, levels=1)
    assert equal(together, generate(pipeline, PROMPTS, count=2, seeds=[1, 2, 3, 4], batch_size=3, **options), levels=1)
    assert not equal(together[:1], together[1:2], levels=1)


def test_a_guidance_rule_takes_the_place_of_the_scale(pipeline: Pipeline) -> None:
    base: dict[str, Any] = {"prompts": PROMPTS[0], "steps": 3, "seeds": 1}
    [plain] = generate(pipeline, **base, scale=7)
    [ruled] = generate(pipeline, **base, guidance=CFG(7))
    [other] = generate(pipeline, **base, guidance=Interval(CFG(7), 0.5, 5))
    assert equal([plain], [ruled])
    assert not equal([plain], [other])
    assert (ruled.settings.scale, ruled.settings.guidance) == (7.0, "CFG(scale=7.0)")
    assert parse(other.settings.guidance) == Interval(CFG(7), 0.5, 5)
    assert "CFG scale: 7, " in other.settings.parameters() and 'Guidance: "Interval(' in other.settings.parameters()
    assert generate(pipeline, **base, guidance=CFG(lambda sigma: 2.0))[0].settings.scale is None


@torch.no_grad()
def test_tags_follow_ellas_tokens_on_both_sides(pipeline: Pipeline) -> None:
    [got] = generate(pipeline, PROMPTS[0], tags="blue circle", steps=3, scale=3, seeds=1)
    cond = Concat(pipeline.encode(PROMPTS[0]), pipeline.encode("blue circle", "clip"))
    uncond = Concat(pipeline.encode(""), pipeline.encode("", "clip"))
    [expected] = draw(pipeline, cond, uncond=uncond, guidance=3.0, steps=3, seeds=1)
    assert (pixels(got) == np.asarray(expected)).all()
    assert "CLIP prompt: blue circle" in got.settings.parameters()
    assert not equal([got], generate(pipeline, PROMPTS[0], steps=3, scale=3, seeds=1))


@torch.no_grad()
def test_ella_for_the_prompt_alone(pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"negative": "blue", "steps": 3, "scale": 3.0, "seeds": 1}
    [got] = generate(pipeline, PROMPTS[0], negative_mode="clip", **options)
    [expected] = draw(pipeline, pipeline.encode(PROMPTS[0]), uncond=pipeline.encode("blue", "clip"), guidance=3.0,
                      steps=3, seeds=1)
    assert (pixels(got) == np.asarray(expected)).all()
    assert "ELLA: flexible, ELLA negative: clip" in got.settings.parameters()
    assert not equal([got], generate(pipeline, PROMPTS[0], **options))


@torch.no_grad()
def test_prompt_syntax_when_asked_for(pipeline: Pipeline) -> None:
    text, options = "a (red:1.5) circle AND a blue square :0.5", {"steps": 3, "scale": 3.0, "seeds": 1}
    [got] = generate(pipeline, text, syntax=True, **options)  # type: ignore[arg-type]
    cond = And((pipeline.encode("a (red:1.5) circle", weighted=True), 1.0), (pipeline.encode("a blue square"), 0.5))
    [expected] = draw(pipeline, cond, uncond=pipeline.encode(""), guidance=3.0, steps=3, seeds=1)
    assert np.abs(pixels(got) - np.asarray(expected, int)).max() <= 1
    assert not equal([got], generate(pipeline, text, **options))  # type: ignore[arg-type]
    mixed = [text, PROMPTS[0], "a circle AND a square :0.5"]  # of two shapes of AND, in one call
    pictures = generate(pipeline, mixed, syntax=True, **options)  # type: ignore[arg-type]
    assert [p.settings.prompt for p in pictures] == mixed
    assert equal(pictures[:1], [got], levels=1)
    assert equal(pictures[1:2], generate(pipeline, PROMPTS[0], **options), levels=1)  # type: ignore[arg-type]


def test_wildcards_are_chosen_by_the_seed(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "colour.txt").write_text("red\nblue\n")
    pictures = generate(pipeline, "a __colour__ circle", wildcards=tmp_path, count=8, seeds=1, steps=1)
    prompts = [picture.settings.prompt for picture in pictures]
    assert set(prompts) == {"a red circle", "a blue circle"}
    [alone] = generate(pipeline, "a __colour__ circle", wildcards=tmp_path, seeds=3, steps=1)
    assert alone.settings.prompt == prompts[2]
    assert equal([alone], pictures[2:3], levels=1)


def test_unnamed_seeds_come_from_torch_and_reproduce(pipeline: Pipeline) -> None:
    torch.manual_seed(3)
    first = generate(pipeline, PROMPTS, steps=1, count=2)
    torch.manual_seed(3)
    again = generate(pipeline, PROMPTS, steps=1, count=2)
    assert equal(first, again)
    seeds = [p.settings.seed for p in first]
    assert len(set(seeds)) == 4
    assert equal(first, generate(pipeline, PROMPTS, steps=1, count=2, seeds=seeds))


def test_numpy_seeds_can_be_written_as_json(pipeline: Pipeline) -> None:
    [picture] = generate(pipeline, "a", steps=1, seeds=list(np.arange(9, 10)))
    assert json.dumps(picture.settings.seed) == "9"


def test_a_repeated_prompt_is_encoded_once(pipeline: Pipeline) -> None:
    seen: list[str] = []
    t5 = pipeline.t5
    assert t5

    def spy(prompts: list[str], max_length: int | None = None) -> TextFeatures:
        seen.extend(prompts)
        return t5(prompts, max_length)

    generate(replace(pipeline, t5=spy), ["a", "red", "a"], negative="blue", steps=1, count=3, batch_size=9)  # type: ignore[arg-type]
    assert sorted(seen) == ["a", "blue", "red"]


def test_the_callback_sees_every_step(pipeline: Pipeline) -> None:
    steps: list[int] = []
    generate(pipeline, "a", steps=4, callback=lambda info: steps.append(info["i"]))
    assert steps == [0, 1, 2, 3]


def test_every_sampler_and_every_schedule_draw(pipeline: Pipeline) -> None:
    """In rotation: that each method walks any schedule is a property of the samplers' own tests."""
    for sampler, schedule in zip(SAMPLERS, cycle(SCHEDULES)):
        scale = 0.5 if sampler.endswith("_cfg_pp") else 3.0
        [picture] = generate(pipeline, "a circle", sampler=sampler, schedule=schedule, steps=3, scale=scale, seeds=1)
        assert pixels(picture).std() > 1


@pytest.mark.parametrize(("arguments", "message"), [
    ({"prompts": []}, "at least one"),
    ({"prompts": ["a", 3]}, "strings"),
    ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
    ({"steps": 2.5}, "steps must be a whole number"),
    ({"count": 0}, "count must be"),
    ({"width": 21}, "multiples of 4 for this model, got 21x16: try 20x16"),
    ({"height": 19}, "multiples of 4 for this model, got 16x19: try 16x20"),
    ({"height": 0}, "height must be a whole number of at least 1, got 0"),
    ({"width": 16.0}, "width must be a whole number"),
    ({"sampler": "dpmpp_2n"}, "unknown sampler 'dpmpp_2n': did you mean dpmpp_2m"),
    ({"schedule": "karas"}, "unknown schedule 'karas': did you mean karras"),
    ({"mode": "loose"}, "unknown mode 'loose': choose flexible, fixed, clip"),
    ({"seeds": [1, 2, 3]}, "expected 1, got 3"),
    ({"seeds": []}, "seeds is empty"),
    ({"seeds": -1}, "seeds must lie in"),
    ({"negative": ["a", "b"]}, "one per prompt: expected 1, got 2"),
    ({"prompts": "a \udcff"}, "prompt is not valid UTF-8 text, at character 2"),
    ({"scale": float("nan")}, "scale must be finite"),
])
def test_bad_arguments_are_refused(pipeline: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(pipeline, **{"prompts": "a", "steps": 1, **arguments})


@pytest.mark.parametrize(("arguments", "message"), [
    ({"seed": 3}, "unknown argument seed: did you mean seeds"),
    ({"cfg_scale": 3}, "unknown argument cfg_scale: did you mean scale"),
    ({"colour": 3}, "unknown argument colour: generate takes pipeline, prompts, negative"),
    ({"seeds": 1.5}, "a seed must be a whole number, got 1.5"),
    ({"seeds": "12"}, "a seed must be a whole number, got '12'"),
    ({"scale": "7"}, "scale must be a number, got '7'"),
    ({"negative": 3}, "negative must be a string, or one per prompt, got 3"),
    ({"tags": ["a"]}, "tags must be a string, got list"),
])
def test_arguments_of_the_wrong_kind_are_refused(pipeline: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        generate(pipeline, **{"prompts": "a", "steps": 1, **arguments})


def test_each_prompt_may_have_a_negative_of_its_own(pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"steps": 2, "scale": 3.0, "count": 2, "seeds": 1}
    together = generate(pipeline, PROMPTS, negative=["blue", "the left of a circle"], **options)
    alone = [*generate(pipeline, PROMPTS[0], negative="blue", **options),
             *generate(pipeline, PROMPTS[1], negative="the left of a circle", **options)]
    assert equal(together, alone, levels=1)
    assert [picture.settings.negative for picture in together] == 2 * ["blue"] + 2 * ["the left of a circle"]
    assert not equal(together[2:], generate(pipeline, PROMPTS[1], negative="blue", **options), levels=1)


def test_a_missing_part_is_named(tiny_files: dict[str, str]) -> None:
    bare = Pipeline.load(tiny_files["checkpoint"], device="cpu")
    with pytest.raises(ValueError, match="tsc=<file> and t5=<folder>"):
        generate(bare, "a", mode="fixed", steps=1)
    with pytest.raises(ValueError, match="clip_tokenizer=<folder>"):
        generate(bare, "a", mode="clip", steps=1)
    with pytest.raises(ValueError, match="both the connector"):
        Pipeline.load(tiny_files["checkpoint"], tsc=tiny_files["tsc"])


def test_nan_from_the_unet_is_reported_with_step_and_sigma(pipeline: Pipeline) -> None:
    def poison(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where(inputs[1][0] < 500, torch.nan, output)

    pipeline.unet.register_forward_hook(poison)
    with pytest.raises(ValueError, match=r"NaN or Inf values at step [1-9] of 10 \(sigma [01]\.\d+\)"):
        generate(pipeline, "a", steps=10)


def test_nan_from_the_decoder_is_reported(pipeline: Pipeline) -> None:
    pipeline.vae.decoder.conv_out.weight.data[1] = torch.inf
    with pytest.raises(ValueError, match="autoencoder returned NaN or infinity"):
        generate(pipeline, "a", steps=1)


def test_decoded_values_become_bytes() -> None:
    decoded = torch.tensor([[-3.0, -1.0, 0.0], [0.5, 1.0, 3.0], [-0.5, 0.1, 1.0]])[None, :, None]  # RGB x one row
    [image] = to_images(decoded)
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 191, 64), (0, 255, 140), (128, 255, 255)]
    assert isinstance(image, Image.Image)


def test_the_default_size_is_the_checkpoints(tiny_files: dict[str, str], tmp_path: Any) -> None:
    assert Pipeline.load(tiny_files["checkpoint"]).size == 16
    parts = load_checkpoint(tiny_files["checkpoint"])
    save_checkpoint(tmp_path / "unsaid.safetensors", parts.unet, parts.vae, parts.text_model)
    unsaid = Pipeline.load(tmp_path / "unsaid.safetensors")
    assert unsaid.size == 64 * 4  # 64 latents, each 4 px here; 8 px and so 512 in Stable Diffusion
