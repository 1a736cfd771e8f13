"""Settings of pictures drawn with add-ons: they draw them again, and other programs read them."""

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from addon_files import PROMPT, write_lora
from ella_kd import Pipeline, addons, generate, read_settings
from ella_kd.images import Picture
from ella_kd.request import Request
from ella_kd.texts import texts_of

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
