"""Whole diffusers pipelines: those that read what is saved here, and those whose networks are shared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from transformers import CLIPTokenizer

from ella_kd import Pipeline, generate
from ella_kd.models import load_checkpoint
from ella_kd.models.files.saving import save
from systems import System, clip_tokenizer, system

CLASSES: dict[str, type[Any]] = {"sd1": StableDiffusionPipeline, "sd2 v": StableDiffusionPipeline,
                                 "sdxl": StableDiffusionXLPipeline, "refiner": StableDiffusionXLImg2ImgPipeline}


def pipe_of(made: System, kind: str) -> Any:
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       prediction_type=made.recipe.prediction)
    tokenizer, parts = clip_tokenizer(), {"unet": made.unet, "vae": made.vae, "scheduler": scheduler}
    if kind.startswith("sd") and not kind.startswith("sdxl"):
        return StableDiffusionPipeline(**parts, text_encoder=made.texts[0], tokenizer=tokenizer, safety_checker=None,
                                       feature_extractor=None, requires_safety_checker=False)
    first = (None, None) if kind == "refiner" else (made.texts[0], tokenizer)
    return CLASSES[kind](**parts, text_encoder=first[0], tokenizer=first[1], text_encoder_2=made.texts[-1],
                         tokenizer_2=tokenizer)


def same(a: Any, b: Any) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_saved_system_is_a_pipeline_of_diffusers(kind: str, tmp_path: Path) -> None:
    made = system(kind)
    tokenizer = clip_tokenizer()
    loaded = replace(load_checkpoint(made.save_file(tmp_path / "x.safetensors"), prediction=
                                     "v" if made.recipe.prediction[0] == "v" else "eps"), clip_tokenizer=tokenizer)
    save(tmp_path / "folder", loaded, {"modelspec.resolution": "256x256"})
    save(tmp_path / "y.safetensors", loaded)
    whole = DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(whole) is CLASSES[kind]
    file = CLASSES[kind].from_single_file(str(tmp_path / "y.safetensors"), config=str(tmp_path / "folder"),
                                          local_files_only=True)
    names = ["unet", "vae", *(["text_encoder_2"] if kind == "refiner" else ["text_encoder", "text_encoder_2"])]
    for pipe in (whole, file):
        for name, theirs in zip(names, (made.unet, made.vae, *made.texts)):
            assert same(getattr(pipe, name), theirs), name
        assert pipe.scheduler.config.prediction_type == made.recipe.prediction
    assert whole.unet.config.sample_size == 32
    reader = whole.tokenizer_2 if kind == "refiner" else whole.tokenizer
    assert reader("a b").input_ids == tokenizer("a b").input_ids
    for name in ("tokenizer", "tokenizer_2"):
        if (reader := getattr(whole, name, None)) is not None:
            pad = 98 if (kind, name) in (("sd1", "tokenizer"), ("sdxl", "tokenizer")) else 0
            ids = reader("a b", padding="max_length", truncation=True).input_ids
            assert ids == tokenizer("a b").input_ids + [pad] * 73, name


@pytest.mark.parametrize("kind", ["sd2 v", "sdxl"])
def test_tokenizers_that_were_read_are_saved_as_they_were(kind: str, tmp_path: Path) -> None:
    folder, pads = system(kind).save_folder(tmp_path / "x"), ["<|endoftext|>", "!"] if kind == "sdxl" else ["!"]
    for name, pad in zip(("tokenizer", "tokenizer_2"), pads):
        clip_tokenizer(pad).save_pretrained(folder / name)
    Pipeline.load(folder, device="cpu").save(tmp_path / "y")
    for name in ("tokenizer", "tokenizer_2")[:len(pads)]:
        readers = [CLIPTokenizer.from_pretrained(each / name) for each in (folder, tmp_path / "y")]
        before, after = (reader("a b", padding="max_length", truncation=True).input_ids for reader in readers)
        assert before == after and len(after) == 77


@pytest.mark.parametrize("kind", CLASSES)
def test_a_pipelines_networks_are_shared_and_draw(kind: str) -> None:
    made = system(kind)
    pipe = pipe_of(made, kind)
    sd = Pipeline.from_diffusers(pipe)
    ours: Any = sd.unet
    assert ours.out[2].weight.data_ptr() == pipe.unet.conv_out.weight.data_ptr()
    assert sd.vae.decoder.conv_out.weight.data_ptr() == pipe.vae.decoder.conv_out.weight.data_ptr()
    theirs = {x.data_ptr() for part in (pipe.unet, pipe.vae) for x in part.parameters()}
    assert {x.data_ptr() for part in (sd.unet, sd.vae) for x in part.parameters()} == theirs
    assert sd.noise_schedule.prediction == ("v" if made.recipe.prediction[0] == "v" else "eps")
    assert sd.size == 64 and sd.clip is not None
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
        assert torch.equal(ours.out[2].bias, pipe.unet.conv_out.bias)
    [picture] = generate(sd, "a b", mode="clip", negative_mode="clip", steps=2, seeds=1)
    assert picture.image.size == (64, 64)


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a diffusers pipeline with a unet, .* got int whose unet is None"):
        Pipeline.from_diffusers(3)
    made = system("sd1")
    pipe = pipe_of(made, "sd1")
    with torch.device("meta"):
        pipe.unet = type(pipe.unet).from_config(pipe.unet.config)
    with pytest.raises(ValueError, match="the pipeline's UNet is offloaded: load it without offloading"):
        Pipeline.from_diffusers(pipe)
