"""`ella-kd inspect` and `ella-kd convert`."""

import json
from io import BytesIO
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ella_kd import Pipeline
from ella_kd.cli import main
from ella_kd.models import load_checkpoint
from ella_kd.models.files import presets
from ella_kd.models.files.hashes import sha256
from ella_kd.models.files.presets import HubFile, Preset
from ella_kd.pipeline import MINIATURE
from filing import UNET, Edit, same
from systems import clip_tokenizer, system


def run(*args: object) -> tuple[str, int]:
    done = CliRunner().invoke(main, [str(arg) for arg in args])
    return done.output, done.exit_code


def test_inspect_says_what_files_are(tmp_path: Path, edited: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 3)}, tmp_path / "lora.safetensors",
              {"ss_tag_frequency": json.dumps({"1_a": {"cat": 3, "dog": 9}, "2_b": {"cat": 8}})})
    broken = edited(lambda t: {**{name: x for name, x in t.items() if name != UNET + "out.2.bias"},
                               UNET + "odd": torch.zeros(2)}, **{"modelspec.prediction_type": "",
                                                                 "modelspec.predict_key": ""})
    known = HubFile("org/repo", "lora.safetensors", bytes=(tmp_path / "lora.safetensors").stat().st_size,
                    sha256=sha256(tmp_path / "lora.safetensors"))
    monkeypatch.setattr(presets, "PRESETS", {"cats": Preset("cats", {"checkpoint": known})})
    monkeypatch.setattr("ella_kd.models.files.report.PRESETS", presets.PRESETS)
    said, code = run("inspect", *(MINIATURE / f"{name}.safetensors" for name in ("sd", "tsc")),
                     tmp_path / "lora.safetensors", broken, tmp_path / "gone", "--json")
    found = {Path(each["path"]).name: each for each in json.loads(said)}
    assert code == 2 and found["gone"]["error"].startswith("no checkpoint at ")
    sd = found["sd.safetensors"]
    assert sd["kind"] == "a Stable Diffusion 1.x checkpoint" and sd["networks"]["UNet"]["tensors"] == 208
    assert sd["networks"]["UNet"]["dtypes"] == {"float16": sd["networks"]["UNet"]["parameters"]}
    assert (sd["prediction"], sd["guess"], sd["resolution"]) == ("eps", False, "48x48")
    assert not sd["missing"] and not sd["extra"]
    assert found["lora.safetensors"]["trigger_words"] == ["cat", "dog"]
    assert found["lora.safetensors"]["known"] == "cats (org/repo:lora.safetensors)"
    assert found["tsc.safetensors"]["place"] == "tsc, --tsc for the command"
    assert found["edited.safetensors"]["missing"] == [f"missing: {UNET}out.2.bias [4]"]
    assert found["edited.safetensors"]["extra"] == [f"{UNET}odd [2]"]
    assert found["edited.safetensors"]["guess"] and "a guess" in found["edited.safetensors"]["prediction_known_by"]
    said, code = run("inspect", MINIATURE / "sd.safetensors", broken)
    assert code == 0 and "UNet: 8.0 M parameters in 208 tensors, float16" in said
    assert f"missing: {UNET}out.2.bias [4]" in said and f"extra: {UNET}odd [2]" in said


def test_convert_goes_there_and_back(tmp_path: Path) -> None:
    made = system("sdxl")
    source = made.save_file(tmp_path / "in.safetensors", {"modelspec.title": "a title", "modelspec.predict_key": "v"})
    clip_tokenizer().save_pretrained(tmp_path / "clip")
    said, code = run("convert", source, tmp_path / "folder", "--clip-tokenizer", tmp_path / "clip")
    assert code == 0 and said.strip().endswith("folder"), said
    said, code = run("convert", tmp_path / "folder", tmp_path / "back.safetensors", "--dtype", "fp16")
    assert code == 0, said
    before, after = load_file(source), load_file(tmp_path / "back.safetensors")
    assert {name for name in after if name not in before} == {"alphas_cumprod", "v_pred"}
    assert all(torch.equal(after[name], before[name].half()) for name in before)
    with safe_open(tmp_path / "back.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.predict_key"] == metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    said, code = run("convert", source, tmp_path / "titled.safetensors")
    with safe_open(tmp_path / "titled.safetensors", "pt") as file:
        assert file.metadata()["modelspec.title"] == "a title"
    assert same(load_checkpoint(tmp_path / "titled.safetensors").unet, load_checkpoint(source).unet)


def test_convert_keeps_the_unets_dtype_and_names_what_has_none(tmp_path: Path) -> None:
    whole = load_file(system("sd1").save_file(tmp_path / "sd.safetensors"))
    save_file({name: x.half() if name.startswith("cond_stage_model.") or name == UNET + "out.2.bias" else x
               for name, x in whole.items()}, tmp_path / "mixed.safetensors")
    said, code = run("convert", tmp_path / "mixed.safetensors", tmp_path / "out.safetensors")
    assert code == 0 and load_file(tmp_path / "out.safetensors")[UNET + "out.2.weight"].dtype == torch.float32, said
    for prefix, kind in (("first_stage_model.", "an autoencoder (VAE) alone"),
                         ("cond_stage_model.transformer.", "a text encoder alone")):
        save_file({name.removeprefix(prefix): x for name, x in whole.items() if name.startswith(prefix)},
                  tmp_path / "part.safetensors")
        said, code = run("convert", tmp_path / "part.safetensors", tmp_path / "x.safetensors")
        assert code == 2 and kind in said and "expected a UNet" in said, said
    assert not (tmp_path / "x.safetensors").exists()


def test_convert_finds_its_parts(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ella_kd.commands.convert.find", lambda spec, part="checkpoint": saved if part == "checkpoint"
                        else (_ for _ in ()).throw(FileNotFoundError(f"{part} is {spec}")))
    for part in ("text_encoder", "clip_tokenizer"):
        said, code = run("convert", saved, tmp_path / "x", "--" + part.replace("_", "-"), "org/repo")
        assert code == 2 and f"{part} is org/repo" in said


def test_a_folder_with_another_autoencoder_draws_as_told(tmp_path: Path, tiny_files: dict[str, str],
                                                         pipeline: Pipeline) -> None:
    pipeline.save(tmp_path / "folder")
    pipeline.save(tmp_path / "sd.safetensors")
    args = ["generate", "a red circle", "--mode", "clip", "--negative-mode", "clip", "--steps", "2", "--seed", "1",
            "--device", "cpu", "--vae", tmp_path / "folder" / "vae"]
    for name, more in (("folder", []), ("sd.safetensors", ["--clip-tokenizer", tiny_files["clip_tokenizer"]]),
                       ("folder", ["--prediction", "v"])):
        said, code = run(*args, "--checkpoint", tmp_path / name, "--out", tmp_path / "out", *more)
        assert code == 0, said
    folder, file, v = (path.read_bytes() for path in sorted((tmp_path / "out").glob("*.png")))
    assert pixels(folder) == pixels(file) != pixels(v)


def pixels(png: bytes) -> bytes:
    with Image.open(BytesIO(png)) as image:
        return image.tobytes()


def test_convert_writes_nothing_over_what_is_there(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("kept")
    said, code = run("convert", saved, tmp_path / "folder")
    assert code == 2 and "something is there; choose another name" in said
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "mine"]
    for name in ("typo.safetensor", "x.sft", "x.ckpt", "x.SAFETENSORS"):
        said, code = run("convert", saved, tmp_path / name)
        assert code == 2 and f"written as .safetensors, got {tmp_path / name}" in said
    assert len(list(tmp_path.rglob("*"))) == 2
    said, code = run("convert", tmp_path / "gone.safetensors", tmp_path / "x")
    assert code == 2 and "no checkpoint at" in said
