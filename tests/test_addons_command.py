"""Add-ons through the command: drawn with, compared, inspected, refused before anything is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

from addon_files import LORA, PROMPT, draw, noise, write_lora
from ella_kd import Pipeline, addons, cli, generate, read_settings
from ella_kd.models.addons.lora import LoRA


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
