"""Add-ons as they are asked for: doors, prompts, folders of models, settings that draw a picture again."""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import ella_kd
from ella_kd import Pipeline, addons, cli, generate, read_settings
from ella_kd.addon_words import AddOn, in_prompt, read
from ella_kd.generation import jobs
from ella_kd.images import Picture
from ella_kd.models import UNet
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.addons.ip_adapter import IPAdapter
from ella_kd.models.addons.lora import LoRA
from ella_kd.models.files.folders import look_up
from ella_kd.pictures.canvas import Canvas
from ella_kd.pictures.options import FromPicture
from ella_kd.request import Request
from ella_kd.texts import texts_of
from test_addons_ip_adapter import made, vision
from tiny import randomised

PROMPT = "a red circle"
LORA = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_lora(path: Path, sides: dict[str, int] | None = None, seed: int = 0, **metadata: Any) -> Path:
    """Of the tiny system's UNet and text encoder, or of the modules that are given, square ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sides = sides or {LORA: 32, TEXT: 64}
    tensors = {f"{name}.{end}.weight": noise(*((2, n) if end == "lora_down" else (n, 2)), seed=seed + i)
               for i, (name, n) in enumerate(sides.items()) for end in ("lora_down", "lora_up")}
    save_file(tensors, path, metadata or None)
    return path


@pytest.fixture
def files(tmp_path: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA, an embedding, a ControlNet and a picture of edges, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_lora(tmp_path / "style.safetensors")
    save_file({"emb_params": noise(2, 64)}, tmp_path / "zz.safetensors")
    assert isinstance(pipeline.unet, UNet)
    net = ControlNet.of(pipeline.unet)
    randomised(net.zero_convs, 0, 0.5)
    randomised(net.middle_block_out, 1, 0.5)
    randomised(net.input_hint_block, 2, 0.2)
    net.save(tmp_path / "edges.safetensors")
    Image.fromarray((np.arange(24 * 24 * 3) % 256).reshape(24, 24, 3).astype(np.uint8)).save("room.png")
    return tmp_path


def draw(pipeline: Pipeline, prompts: Any = PROMPT, **options: Any) -> list[bytes]:
    options = {"seeds": 1, "steps": 2, "mode": "clip", "progress": False, **options}
    return [picture.image.tobytes() for picture in generate(pipeline, prompts, **options)]


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


def test_a_control_is_followed_where_it_is_asked_for(pipeline: Pipeline, files: Path) -> None:
    plain = draw(pipeline)
    assert draw(pipeline, control="edges.safetensors:room.png:0") == plain
    assert draw(pipeline, control="edges.safetensors:room.png:1:0.001-0") == plain
    drawn = draw(pipeline, control="edges.safetensors:room.png:0.8", mode="flexible")
    assert drawn != draw(pipeline, mode="flexible")
    net = ControlNet.load("edges.safetensors")
    cond, uncond = (pipeline.encode(text).with_control(net, "room.png", 0.8) for text in (PROMPT, ""))
    [wanted] = ella_kd.draw(pipeline, cond, uncond=uncond, seeds=1, steps=2, progress=False)
    assert drawn == [wanted.tobytes()]
    assert draw(pipeline, control="edges.safetensors:room.png:0.8:preprocess=canny", mode="flexible") != drawn


def test_a_control_is_of_the_whole_picture_where_a_part_is_drawn(pipeline: Pipeline, files: Path) -> None:
    mask = Image.new("L", (24, 24))
    mask.paste(255, (4, 8, 16, 20))
    options: dict[str, Any] = {"start": "room.png", "mask": mask, "crop_to_mask": True, "padding": 0, "width": 16,
                               "height": 16, "mask_blur": 0.0}
    with Image.open("room.png") as room:
        room.crop((4, 8, 16, 20)).save("part.png")
    seen: list[Any] = []
    steer = addons.as_conditioning

    def spy(cond: Any) -> Any:
        class Seen:
            def with_control(self, net: Any, picture: Image.Image, *more: Any, **how: Any) -> Any:
                seen.append(picture.tobytes())
                return steer(cond).with_control(net, picture, *more, **how)
        return Seen()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(addons, "as_conditioning", spy)
        draw(pipeline, control="edges.safetensors:room.png", **options)
    with Image.open("part.png") as part:
        assert seen == [part.tobytes()] * 2


@pytest.mark.parametrize(("asked", "size", "hint", "at"), [  # at: the left edge and the width of the square
    ({}, (48, 48), (96, 48), (12, 24)),
    ({}, (48, 48), (192, 96), (12, 24)),
    ({}, (96, 48), (192, 96), (72, 48)),  # nothing is cut: as it came
    ({"extend": "left=96"}, (96, 48), (96, 48), (132, 24)),
    ({"extend": "left=96"}, (96, 48), (192, 48), (36, 24)),  # of the canvas
    ({"extend": "left=96"}, (48, 48), (96, 48), (108, 24)),
])
def test_a_control_is_cut_and_extended_as_the_start_is(asked: dict[str, Any], size: tuple[int, int],
                                                       hint: tuple[int, int], at: tuple[int, int]) -> None:
    start = Image.new("RGB", (96, 48))
    start.paste((255, 255, 255), (36, 12, 60, 36))
    canvas = Canvas.of(FromPicture(start=start, **asked), size, (48, 48), 8)
    picture = start if hint == start.size else Image.new("RGB", hint)
    if picture is not start:
        picture.paste(start.resize((hint[1] * 2, hint[1])), (0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = canvas.part(picture)
    box = part.point(lambda value: 255 * (value > 127)).getbbox()
    assert box is not None and (box[0], box[2] - box[0]) == at
    if hint != (192, 48):
        theirs = canvas.image.resize(part.size).point(lambda value: 255 * (value > 127)).getbbox()
        assert theirs is not None and max(abs(a - b) for a, b in zip(theirs, box)) <= 1
    with pytest.warns(UserWarning, match="the control's picture is 40x90 and what is drawn .*: it is stretched"):
        canvas.part(Image.new("RGB", (40, 90)))


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


def test_a_picture_prompts(pipeline: Pipeline, files: Path) -> None:
    assert isinstance(pipeline.unet, UNet)
    adapter = made("base", pipeline.unet.config)
    save_file({name: x.clone() for name, x in adapter.state_dict().items()}, "ip.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no image encoder for ip.safetensors: expected image_encoder; name"):
        draw(pipeline, image_prompt="ip.safetensors:room.png")
    vision().save_pretrained(files / "comfy" / "clip_vision" / "vit")
    asked = "ip.safetensors:room.png:0.6"
    drawn = draw(pipeline, image_prompt=f"{asked}:encoder=vit", models_dir="comfy", mode="flexible")
    vision().save_pretrained(files / "image_encoder")
    assert drawn == draw(pipeline, image_prompt=[asked], mode="flexible") != draw(pipeline, mode="flexible")
    net = IPAdapter.load("ip.safetensors")
    cond, uncond = (pipeline.encode(text) for text in (PROMPT, ""))
    [wanted] = ella_kd.draw(pipeline, cond.with_image(net, "room.png", 0.6), uncond=uncond.with_image(net, None, 0.6),
                            seeds=1, steps=2, progress=False)
    assert drawn == [wanted.tobytes()]
    assert draw(pipeline, image_prompt=f"{asked}:0.001-0") == draw(pipeline)


def test_words_and_loras_in_either_order(pipeline: Pipeline, files: Path) -> None:
    one = pipeline.with_lora([("style.safetensors", 0.5)]).with_embeddings(["zz.safetensors"])
    other = pipeline.with_embeddings(["zz.safetensors"]).with_lora([("style.safetensors", 0.5)])
    halves = other.to(dtype=torch.float64), one.to(dtype=torch.float64).with_lora([("style.safetensors", 0.0)])
    said = [each.encode(f"{PROMPT} zz", "clip")(torch.zeros(1)).tokens for each in (one, other, *halves, pipeline)]
    assert torch.equal(said[0], said[1]) and not torch.equal(said[0], said[-1])
    assert all(float((said[0] - half).abs().max()) < 1e-5 for half in said[2:4])


def test_presets_bring_their_settings(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few-step LoRA by its name draws as it was distilled for, but for what the user says."""
    seen: list[dict[str, Any]] = []

    def stop(options: dict[str, Any], modes: Any) -> None:
        seen.append(options)
        raise ValueError("enough")

    monkeypatch.setattr(addons.AddOns, "check", lambda *args: None)
    monkeypatch.setattr(cli, "load", stop)
    for words, steps in (([], 4), (["--steps", "6"], 6)):
        assert CliRunner().invoke(cli.main, ["generate", "a", "--lora", "lcm-sd15:0.9", *words]).exit_code == 2
        assert {name: seen[-1][name] for name in ("sampler", "schedule", "steps", "scale")} == {
            "sampler": "lcm", "schedule": "trailing", "steps": steps, "scale": 1.0}


def test_inspect_tells_what_they_are(files: Path, pipeline: Pipeline) -> None:
    said_of_itself: dict[str, Any] = {"modelspec.trigger_phrase": "in mystyle", "ss_base_model_version": "sd_v1"}
    write_lora(files / "style.safetensors", **said_of_itself)
    save_file({"emb_params": noise(3, 1024)}, "old.safetensors")
    save_file({"clip_l": noise(2, 768), "clip_g": noise(2, 1280)}, "pair.safetensors")
    done = CliRunner().invoke(cli.main, ["inspect", "style.safetensors", "old.safetensors", "pair.safetensors",
                                         "edges.safetensors"])
    said = " ".join(done.output.split())
    for text in ("its place is lora, --lora", "kind: LoRA", "rank: 2", "base: Stable Diffusion 1.x", "trigger words: "
                 "in mystyle", "modules: 1 of the UNet, 1 of the text encoder",
                 "its place is embedding, --embedding", "made for: Stable Diffusion 2.x's, 1024 wide", "vectors: 3",
                 "made for: SDXL's, a pair 768 and 1280 wide", "A ControlNet; its place is control, --control"):
        assert text in said, text


OPTIONS: dict[str, dict[str, Any]] = {
    "door": {"lora": ["style.safetensors:0.8"]},
    "prompt": {"prompts": f"{PROMPT}, zz <lora:style:0.5:0.8>", "embedding": "zz.safetensors"},
    "all": {"prompts": f"{PROMPT} zz <lora:style:0.8>", "lora": "style.safetensors:0.1", "embedding": "zz.safetensors",
            "control": "edges.safetensors:room.png:0.8:5-0.1", "negative": "embedding:zz"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_settings_draw_it_again(pipeline: Pipeline, files: Path, name: str) -> None:
    options = {"prompts": PROMPT, "seeds": 1, "steps": 2, "mode": "clip", "progress": False, **OPTIONS[name]}
    [picture] = generate(pipeline, models_dir=files, **options)
    picture.save("drawn.png")
    kept = read_settings("drawn.png")
    [again] = generate(pipeline, models_dir=files, progress=False, **kept)
    assert again.settings == picture.settings and again.image.tobytes() == picture.image.tobytes()
    assert Request.from_text(picture.settings.parameters()).arguments() == picture.settings.arguments()
    write_lora(files / "style.safetensors", seed=9)
    with pytest.warns(UserWarning, match="style.safetensors is not the file that drew the picture: its sha256 begins"):
        generate(pipeline, models_dir=files, progress=False, **kept)


def test_what_a_pipeline_wears_is_in_its_name_and_not_twice(pipeline: Pipeline, files: Path) -> None:
    worn = pipeline.with_lora([("style.safetensors", 0.8), ("style.safetensors", 0.0)]).with_embeddings(
        ["zz.safetensors"])
    assert worn.name == f"{pipeline.name} + style:0.8 + zz" and pipeline.name
    assert replace(pipeline, name="").with_lora(("style.safetensors", {"unet": 1, "text": 0.5})).name == "style:0.5:1"
    made = Request("a", model=worn.name)
    assert Request.from_text(made.parameters()).model == worn.name
    asked = Request("a", mode="clip", lora=("style.safetensors:0.8",), embedding=("zz.safetensors",))
    assert addons.AddOns().dressed(pipeline, asked.add_ons, asked).name == pipeline.name


@pytest.mark.parametrize(("letters", "kept"), [(1000, ["ella_kd", "parameters"]), (30000, ["ella_kd"]), (70000, [])])
def test_a_picture_is_saved_however_long_its_prompt_is(tmp_path: Path, letters: int, kept: list[str]) -> None:
    picture = Picture(Image.new("RGB", (8, 8)), Request(letters * "a"))
    for name, wanted in (("a.jpg", kept), ("a.webp", ["ella_kd", "parameters"]), ("a.png", ["ella_kd", "parameters"])):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            picture.save(tmp_path / name)
        assert len(told) == (len(wanted) < 2) and all("save a PNG to keep it" in str(each.message) for each in told)
        with Image.open(tmp_path / name) as image:
            assert sorted(name for name in texts_of(image) if name in ("ella_kd", "parameters")) == wanted
    if kept:
        assert read_settings(tmp_path / "a.jpg") == read_settings(tmp_path / "a.png")


def test_a1111_reads_them_and_its_pictures_are_read(pipeline: Pipeline, files: Path) -> None:
    [picture] = generate(pipeline, "a zz", lora="style.safetensors:0.8", embedding="zz.safetensors", mode="clip",
                         control="edges.safetensors:room.png:0.8", steps=2, seeds=1, progress=False)
    text = picture.settings.parameters()
    content = Path("style.safetensors").read_bytes()
    payload = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little"):]).hexdigest()
    whole, net = (hashlib.sha256(Path(f"{name}.safetensors").read_bytes()).hexdigest() for name in ("zz", "edges"))
    assert text.startswith("a zz <lora:style:0.8>\n")
    assert f'Lora hashes: "style: {payload[:12]}"' in text and f'TI hashes: "zz: {whole[:12]}"' in text
    assert (f'ControlNet 0: "Module: none, Model: edges [{net[:8]}], Weight: 0.8, Resize Mode: Just Resize, '
            'Control Mode: Balanced"') in text
    theirs = ("a zz <lora:style:0.8> <hypernet:h:1>\nNegative prompt: b <lora:q:1>\nSteps: 2, Sampler: Euler, "
              f'CFG scale: 7, Seed: 1, Size: 16x16, Lora hashes: "style: {payload[:12]}", '
              'TI hashes: "zz: 000000000000", ControlNet 0: "Module: canny, Model: control_v11p_sd15_canny [d14c016b], '
              'Weight: 1", Version: v1.10.1')
    with pytest.warns(UserWarning, match=r"left out: ControlNet 0: .*, <hypernet:h:1>, <lora:q:1>$"):
        read_ = Request.from_text(theirs)
    assert (read_.prompt, read_.negative, read_.embedding) == ("a zz <lora:style:0.8>", "b", ("zz",))
    with pytest.warns(UserWarning, match="the embedding .*zz.safetensors is not the file") as told:
        generate(pipeline, models_dir=files, progress=False, **read_.arguments())
    assert len(told) == 1


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


@pytest.fixture
def run(tiny_files: dict[str, str], files: Path) -> Callable[..., Result]:
    model = [word for name, value in tiny_files.items() for word in (f"--{name.replace('_', '-')}", value)]
    model += ["--device", "cpu", "--steps", "2", "--seed", "1"]
    return lambda *words: CliRunner().invoke(cli.main, [*words, *model])


def test_the_command_draws_with_everything(run: Callable[..., Result], files: Path, pipeline: Pipeline) -> None:
    done = run("generate", f"{PROMPT} zz <lora:style:0.3>", "--lora", "style.safetensors:0.5", "--embedding",
               "zz.safetensors", "--control", "edges.safetensors:room.png:0.8", "--models-dir", ".", "--mode", "clip")
    assert done.exit_code == 0, done.output
    [path] = (files / "out").iterdir()
    [wanted] = draw(pipeline, f"{PROMPT} zz <lora:style:0.3>", lora="style.safetensors:0.5", embedding="zz.safetensors",
                    control="edges.safetensors:room.png:0.8", models_dir=files)
    with Image.open(path) as image:
        assert image.tobytes() == wanted


def test_the_command_compares_fast_and_offloaded_with_them(run: Callable[..., Result], files: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """All three columns, each file read once; fast and offloaded networks wear them as others do."""
    read_, load = list[Any](), LoRA.load

    def spy(*args: Any) -> LoRA:
        read_.append(args)
        return load(*args)

    monkeypatch.setattr(addons.LoRA, "load", spy)
    Path("list.txt").write_text(f"{PROMPT} zz <lora:style:0.3>")
    words = ["--embedding", "zz.safetensors", "--control", "edges.safetensors:room.png:0.8", "--models-dir", "."]
    sheets = []
    for more in ([], ["--fast"], ["--offload"]):
        done = run("compare", "list.txt", *words, *more)
        assert done.exit_code == 0, done.output
        assert len(read_) == 1
        read_.clear()
        with Image.open("compare.png") as sheet:
            sheets.append(np.asarray(sheet, int))
    assert all(np.abs(sheet - sheets[0]).max() <= 1 for sheet in sheets)


@pytest.mark.parametrize(("words", "message"), [
    (["--lora", "gone"], "no lora at gone: lora takes a file, org/repo:file on the hub, or a name"),
    (["--lora", "stile", "--models-dir", "."], "no lora stile in .: there is style"),
    (["--lora", "zz.safetensors"], "lora takes a LoRA, and zz.safetensors looks like a textual-inversion embedding: "
                                   "its place is embedding, --embedding for the command"),
    (["--embedding", "edges.safetensors"], "looks like a ControlNet: its place is control, --control for the command"),
    (["--control", "style.safetensors:room.png"], "control takes a ControlNet or a T2I-Adapter, and style.safetensors "
                                                  "looks like a LoRA"),
    (["--control", "edges.safetensors:gone.png"], "no picture at gone.png"),
    (["--control", "edges.safetensors:room.png:preprocess=pose"], "pose"),
    (["--lora", "CHECKPOINT"], "looks like a Stable Diffusion 1.x checkpoint: its place is checkpoint, --checkpoint"),
    (["--checkpoint", "style.safetensors"], "looks like a LoRA, which changes a checkpoint and is none itself: its "
                                            "place is lora, --lora for the command"),
])
def test_the_command_refuses_before_anything_is_loaded(run: Callable[..., Result], tiny_files: dict[str, str],
                                                       monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
                                                       ) -> None:
    monkeypatch.setattr(Pipeline, "load", lambda *args, **options: pytest.fail("weights were read"))
    words = [tiny_files["checkpoint"] if word == "CHECKPOINT" else word for word in words]
    if words[0] == "--checkpoint":
        done = CliRunner().invoke(cli.main, ["generate", "a", *words, "--mode", "clip", "--clip-tokenizer",
                                             tiny_files["clip_tokenizer"]])
    else:
        done = run("generate", "a", *words)
    assert done.exit_code == 2 and message in done.stderr, done.output


def test_the_miniature_wears_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user runs it: small files of another's making, and the picture says how it was drawn."""
    monkeypatch.chdir(tmp_path)
    mini = Pipeline.miniature(device="cpu")
    write_lora(tmp_path / "models" / "Lora" / "night.safetensors", {LORA.replace("blocks_1", "blocks_3", 1): 192})
    (tmp_path / "models" / "embeddings").mkdir()
    clip: Any = mini.clip
    save_file({"emb_params": noise(3, clip.model.config.hidden_size)}, tmp_path / "models/embeddings/glow.safetensors")
    words = ["generate", "A red heart sits in the center. <lora:night:0.5>", "--tags", "embedding:glow", "--models-dir",
             "models", "--steps", "2", "--seed", "1", "--device", "cpu"]
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 0 and "Warning" not in done.stderr, done.output
    [path] = (tmp_path / "out").iterdir()
    kept = read_settings(path)
    assert kept["hashes"] and kept["prompts"].endswith("<lora:night:0.5>")
    [again] = generate(mini, models_dir="models", progress=False, **kept)
    with Image.open(path) as image:
        assert image.tobytes() == again.image.tobytes()
    assert again.image.tobytes() != generate(mini, "A red heart sits in the center.", steps=2, seeds=1,
                                             progress=False)[0].image.tobytes()
