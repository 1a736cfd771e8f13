"""Add-ons as they are asked for: doors, prompts, folders of models."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from addon_files import LORA, PROMPT, draw, noise, write_lora
from ella_kd import Pipeline, addons, generate
from ella_kd.addon_words import AddOn, in_prompt, read
from ella_kd.jobs import jobs
from ella_kd.models.addons.lora import LoRA
from ella_kd.models.files.folders import look_up
from ella_kd.request import Request


@pytest.mark.parametrize(("place", "text", "meant"), [
    ("lora", "a.safetensors", AddOn("lora", "a.safetensors")),
    ("lora", "a.safetensors:.8", AddOn("lora", "a.safetensors", weight=0.8)),
    ("lora", r"C:\loras\a.safetensors:-1", AddOn("lora", r"C:\loras\a.safetensors", weight=-1)),
    ("lora", "org/repo:a.safetensors:0.5", AddOn("lora", "org/repo:a.safetensors", weight=0.5)),
    ("lora", "org/repo", AddOn("lora", "org/repo")),
    ("lora", "a:text=0:unet=.5", AddOn("lora", "a", options=(("unet", ".5"), ("text", "0")))),
    ("embedding", "org/repo:a.pt", AddOn("embedding", "org/repo:a.pt")),
    ("control", "n.pth:p.png", AddOn("control", "n.pth", "p.png")),
    ("control", r"org/repo:n.safetensors:D:\p.png:0.8:14.6-2.5:preprocess=canny",
     AddOn("control", "org/repo:n.safetensors", r"D:\p.png", 0.8, (14.6, 2.5), (("preprocess", "canny"),))),
    ("control", r"C:\n.pth:C:/p.png:1", AddOn("control", r"C:\n.pth", "C:/p.png")),
    ("image_prompt", "ip:cat.jpg:0.6:inf-1", AddOn("image_prompt", "ip", "cat.jpg", 0.6, (float("inf"), 1))),
])
def test_doors_are_read(place: Any, text: str, meant: AddOn) -> None:
    assert read(place, text) == meant
    assert read(place, str(meant)) == meant


@pytest.mark.parametrize(("place", "text", "message"), [
    ("control", "n.pth", r"control takes NET:PICTURE:0.8: expected a file and a picture, got 'n.pth'"),
    ("lora", ":0.8", "lora takes FILE:0.8: expected a file or a name, got ':0.8'"),
    ("lora", "a:0.8:0.5", "says weight twice"),
    ("lora", "a:2-14", "are HIGH-LOW, 14.6-2.5, got 2-14"),
    ("lora", "a:preprocess=canny", "says preprocess, and lora has unet, text, blocks"),
    ("lora", "a:unet=much", "unet is a number in 'a:unet=much', got 'much'"),
    ("lora", "a:blocks=1,2,3", "blocks|25"),
])
def test_what_no_door_takes_is_refused(place: Any, text: str, message: str) -> None:
    asked: dict[str, Any] = {place: text}
    with pytest.raises(ValueError, match=message):
        Request("a", **asked)


@pytest.mark.parametrize(("prompt", "text", "asked"), [
    ("a cat <lora:x:0.8>", "a cat", [AddOn("lora", "x", weight=0.8)]),
    ("<lora:x> a <lyco:y z:.5> cat", "a cat", [AddOn("lora", "x"), AddOn("lora", "y z", weight=0.5)]),
    ("a AND b <LORA:x:0:1> :0.7", "a AND b :0.7", [AddOn("lora", "x", options=(("unet", "1"), ("text", "0")))]),
    ("[a <lora:x:te=.5:unet=.5>:b:0.5]", "[a:b:0.5]", [AddOn("lora", "x", weight=0.5)]),
    ("a <lora:x:te=.2:unet=.7>", "a", [AddOn("lora", "x", options=(("unet", ".7"), ("text", ".2")))]),
    (r"a \<lora:x:1> b", "a <lora:x:1> b", []),
    ("a <b:c> <lora> d", "a <b:c> <lora> d", []),
])
def test_prompts_ask_as_in_the_web_ui(prompt: str, text: str, asked: list[AddOn]) -> None:
    assert in_prompt(prompt) == (text, tuple(asked))


@pytest.mark.parametrize(("options", "message"), [
    ({"prompt": "a <lora:x:much>"}, "<lora:x:much> in the prompt is not understood"),
    ({"prompt": "a <lora:x:1:1:8>"}, "is not understood"),
    ({"prompt": "a <hypernet:x:1>"}, "hypernetworks are not read"),
    ({"prompt": "a", "negative": "<lora:x:1>"}, "the negative asks for the add-on <lora:x:1>: give it in the prompt"),
    ({"prompt": "a", "tags": "<lora:x:1>"}, "the tags asks for the add-on"),
])
def test_prompts_that_cannot_be_met_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**options)


def test_a_lora_is_the_same_through_every_door(pipeline: Pipeline, files: Path) -> None:
    plain, off = draw(pipeline), draw(pipeline, lora="style.safetensors:0")
    assert plain == off
    wanted = draw(pipeline.with_lora([(LoRA.load("style.safetensors"), 0.8)]))
    assert wanted != plain
    assert draw(pipeline, lora="style.safetensors:0.8") == wanted
    assert draw(pipeline, f"{PROMPT} <lora:style:0.8>", models_dir=files) == wanted
    assert draw(pipeline, f"<lora:style:0.8>{PROMPT}", models_dir=files, syntax=True) == draw(
        pipeline, lora=["style:0.3", "style:0.5"], models_dir=files, syntax=True) != plain
    parts = [draw(pipeline, f"{PROMPT} <lora:style:{said}>", models_dir=files) for said in ("1:0", "0:1", "1:unet=0")]
    assert parts[0] == parts[2] != parts[1] != plain
    edited = draw(pipeline, f"[{PROMPT} <lora:style:0.8>:blue:0.5] AND square", models_dir=files, syntax=True)
    assert edited == draw(pipeline, f"[{PROMPT}:blue:0.5] AND square", lora="style.safetensors:0.8", syntax=True)


def test_equal_add_ons_are_drawn_together_and_read_once(pipeline: Pipeline, files: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    read_: list[Any] = []
    load = LoRA.load

    def spy(*args: Any) -> LoRA:
        read_.append(args)
        return load(*args)

    monkeypatch.setattr(addons.LoRA, "load", spy)
    asked = [Request(f"{text} <lora:style:{weight}>", steps=2, seed=i, mode="clip", scale=2.0)
             for i, (text, weight) in enumerate([("a", 1), ("a red", 1), ("a", 0.5), ("a", 1)])]
    found = [(len(job.requests), job.draw()) for job in jobs(pipeline, asked, models_dir=files, progress=False)]
    assert [count for count, _ in found] == [2, 1, 1] and len(read_) == 1
    alone = generate(pipeline, "a <lora:style:1>", seeds=3, steps=2, mode="clip", scale=2.0, models_dir=files)
    assert np.abs(np.asarray(found[2][1][0], int) - np.asarray(alone[0].image, int)).max() <= 1


def test_words_reach_clips_half_and_a_message_says_if_there_is_none(pipeline: Pipeline, files: Path) -> None:
    said = f"{PROMPT} zz"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw(pipeline, said, embedding="zz.safetensors")
        assert drawn == draw(pipeline, f"{PROMPT} embedding:zz", models_dir=files) != draw(pipeline, said)
        assert draw(pipeline, negative="zz", embedding="zz.safetensors") != draw(pipeline, negative="zz")
        tagged = draw(pipeline, mode="flexible", tags="zz", embedding="zz.safetensors")
        assert tagged != draw(pipeline, mode="flexible", tags="zz")
    with pytest.warns(UserWarning, match="the word zz, the text part of style reaches CLIP, which reads nothing"):
        draw(pipeline, said, mode="flexible", embedding="zz.safetensors", lora="style.safetensors")


def test_a_lora_for_a_window_of_noise_levels(pipeline: Pipeline, files: Path) -> None:
    style, write = LoRA.load("style.safetensors"), write_lora(files / "text.safetensors", {LORA: 32}, 3)
    always, plain = draw(pipeline, lora="style.safetensors"), draw(pipeline)
    assert draw(pipeline, lora="style.safetensors:inf-0") == always
    assert draw(pipeline, lora="text.safetensors:0.001-0") == plain  # below the run's last noise level
    some = draw(pipeline, lora=["style.safetensors:0.8:inf-5", "text.safetensors:10-1"])
    parts: dict[float, list[Any]] = {10.1: [style], 10.0: [style, write], 5.1: [style, write], 5.0: [write], 1.0: []}
    shelf, asked = addons.AddOns(), Request("a", lora=("style.safetensors:0.8:inf-5", "text.safetensors:10-1"))
    unet: Any = shelf.dressed(pipeline, asked.add_ons, replace(asked, mode="clip")).unet
    x, t, tokens = noise(1, 4, 4, 4), torch.tensor([500.0]), noise(1, 3, 64)
    for sigma, loras in parts.items():
        wanted = pipeline.with_lora([(lora, 0.8 if lora is style else 1.0) for lora in loras]).unet
        assert torch.equal(unet.at((sigma,))(x, t, tokens), wanted(x, t, tokens)), sigma
    assert some not in (always, plain)


def test_words_and_loras_in_either_order(pipeline: Pipeline, files: Path) -> None:
    one = pipeline.with_lora([("style.safetensors", 0.5)]).with_embeddings(["zz.safetensors"])
    other = pipeline.with_embeddings(["zz.safetensors"]).with_lora([("style.safetensors", 0.5)])
    halves = other.to(dtype=torch.float64), one.to(dtype=torch.float64).with_lora([("style.safetensors", 0.0)])
    said = [each.encode(f"{PROMPT} zz", "clip")(torch.zeros(1)).tokens for each in (one, other, *halves, pipeline)]
    assert torch.equal(said[0], said[1]) and not torch.equal(said[0], said[-1])
    assert all(float((said[0] - half).abs().max()) < 1e-5 for half in said[2:4])


def test_names_are_looked_up_in_a_folder(tmp_path: Path) -> None:
    flat = write_lora(tmp_path / "flat" / "style.safetensors")
    a1111 = write_lora(tmp_path / "a1111/models/Lora/people/style.v2.safetensors", ss_output_name="mine")
    comfy = write_lora(tmp_path / "comfy" / "loras" / "style.safetensors")
    for root, name, path in (("flat", "style", flat), ("flat", "style.safetensors", flat), ("comfy", "style", comfy),
                             ("a1111", "style.v2", a1111), ("a1111", "people/style.v2", a1111),
                             ("a1111", "mine", a1111)):
        assert look_up(name, "lora", tmp_path / root) == path
    with pytest.raises(FileNotFoundError, match=r"no lora stile in .*flat: there is style"):
        look_up("stile", "lora", tmp_path / "flat")
    with pytest.raises(FileNotFoundError, match=r"no control style in .*comfy: nothing lies there"):
        look_up("style", "control", tmp_path / "comfy")
    with pytest.raises(FileNotFoundError, match=r"no folder of models at .*gone"):
        look_up("style", "lora", tmp_path / "gone")
    write_lora(tmp_path / "comfy" / "loras" / "old" / "style.safetensors")
    with pytest.raises(ValueError, match="has 2 files of the name style"):
        look_up("style", "lora", tmp_path / "comfy")
    assert look_up("old/style", "lora", tmp_path / "comfy").parent.name == "old"
