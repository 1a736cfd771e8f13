import errno
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from ella_kd import CFG, Interval, Pipeline, cli, draw, generate, jobs, read_settings
from ella_kd.cli import last_number
from ella_kd.guidance.text import known
from ella_kd.pipeline import MINIATURE
from ella_kd.samplers import SAMPLERS, SCHEDULES

Run = Callable[..., Result]


def model(files: dict[str, str]) -> list[str]:
    named = [word for name, value in files.items() for word in (f"--{name.replace('_', '-')}", value)]
    return [*named, "--device", "cpu"]


@pytest.fixture
def run(tiny_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `ella-kd ...` in an empty folder; drawing commands get the tiny model and two steps."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, with_model: bool = True) -> Result:
        extra = [*model(tiny_files), *([] if "--steps" in words else ["--steps", "2"])] if with_model else []
        return CliRunner().invoke(cli.main, [*words, *extra])

    return run


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_as_a_user_types_it(tiny_files: dict[str, str], pipeline: Pipeline, tmp_path: Path) -> None:
    words = ["generate", "a red circle", "--seed", "3", "--count", "2", "--steps", "2", "--out", "pictures"]
    done = subprocess.run([sys.executable, "-m", "ella_kd", *words, "--enlarge", "4", *model(tiny_files)],
                          cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    names = ["00001-3-a-red-circle.png", "00002-4-a-red-circle.png"]
    assert done.stdout.split() == [f"pictures/{name}" for name in names]
    assert files(tmp_path / "pictures") == names
    expected = generate(pipeline, "a red circle", seeds=3, count=2, steps=2)
    for name, picture in zip(names, expected, strict=True):
        with Image.open(tmp_path / "pictures" / name) as image:
            assert image.size == (64, 64)
            assert np.abs(np.asarray(image, int)[::4, ::4] - np.asarray(picture.image, int)).max() <= 1
            assert f"Seed: {picture.settings.seed}, Size: 16x16" in image.text["parameters"]  # type: ignore[attr-defined]


def test_fast_draws_the_same_and_is_for_a_cpu(run: Run, tmp_path: Path) -> None:
    for words in (["--out", "plain"], ["--out", "fast", "--fast"]):
        assert run("generate", "a red circle", "--seed", "3", *words).exit_code == 0
    [plain], [fast] = (list((tmp_path / folder).iterdir()) for folder in ("plain", "fast"))
    with Image.open(plain) as one, Image.open(fast) as other:
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    refused = run("generate", "a red circle", "--fast", "--dtype", "float16")
    assert refused.exit_code == 2 and "float32 or bfloat16 on the CPU, got float16 on cpu" in refused.output


def test_the_command_is_installed() -> None:
    [command] = entry_points(group="console_scripts", name="ella-kd")
    assert command.load() is cli.main


def test_prompts_come_from_the_line_and_from_a_file_and_numbers_go_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a blue square\n\n  the left of a circle: (really)  \n")
    for _ in range(2):
        done = run("generate", "a red circle", "--prompts", "list.txt", "--seed", "5")
        assert done.exit_code == 0, done.output
    assert files(tmp_path / "out") == [
        "00001-5-a-red-circle.png", "00002-5-a-blue-square.png", "00003-5-the-left-of-a-circle-really.png",
        "00004-5-a-red-circle.png", "00005-5-a-blue-square.png", "00006-5-the-left-of-a-circle-really.png"]


def test_pictures_of_other_formats_are_numbered_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out" / "77777").mkdir(parents=True)
    for ending in ("jpeg", "webp", "png"):
        done = run("generate", "a", "--seed", "5", "--format", ending, "--quality", "60")
        assert done.exit_code == 0, done.output
    assert files(tmp_path / "out") == ["00001-5-a.jpeg", "00002-5-a.webp", "00003-5-a.png", "77777"]
    assert read_settings(tmp_path / "out/00001-5-a.jpeg") == read_settings(tmp_path / "out/00002-5-a.webp")


def test_ctrl_c_keeps_every_finished_batch(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []

    def third_is_stopped(*args: Any, seeds: list[int], **options: Any) -> list[Any]:
        batches.append(seeds)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return draw(*args, seeds=seeds, **options)

    monkeypatch.setattr(jobs, "draw", third_is_stopped)
    done = run("generate", "a", "--batch", "2", "--count", "300000000", "--seed", "5")
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "stopped: 4 of 300000000 pictures are saved in out"
    assert batches == [[5, 6], [7, 8], [9, 10]]
    assert files(tmp_path / "out") == [f"0000{i + 1}-{5 + i}-a.png" for i in range(4)]
    Path("list.txt").write_text("a")
    batches[:] = [[], []]
    stopped = run("compare", "list.txt")
    assert (stopped.exit_code, stopped.stderr.splitlines()[-1]) == (130, "stopped: nothing was saved")


def test_what_a_run_says_again_is_encoded_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    encode = Pipeline.encode

    def spy(self: Pipeline, texts: Any, *args: Any, **options: Any) -> Any:
        asked.append(texts)
        return encode(self, texts, *args, **options)

    monkeypatch.setattr(Pipeline, "encode", spy)
    assert run("generate", "a", "b", "--count", "3", "--batch", "1", "--seed", "5").exit_code == 0
    assert asked == [("a",), ("",), ("b",)]


def test_a_name_that_another_command_took_meanwhile_is_left_to_it(run: Run, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("generate", "a", "--seed", "5").exit_code == 0
    before = (tmp_path / "out" / "00001-5-a.png").read_bytes()
    numbers = [0]  # as seen before the other wrote
    monkeypatch.setattr(cli, "last_number", lambda folder: numbers.pop() if numbers else last_number(folder))
    assert run("generate", "a", "--seed", "5", "--scale", "3").exit_code == 0
    assert files(tmp_path / "out") == ["00001-5-a.png", "00002-5-a.png"]
    assert (tmp_path / "out" / "00001-5-a.png").read_bytes() == before


def test_options_reach_the_picture(run: Run, tmp_path: Path) -> None:
    done = run("generate", "a circle", "--negative", "blue", "--mode", "fixed", "--sampler", "euler_ancestral",
               "--schedule", "ays", "--steps", "3", "--scale", "2.5", "--seed", "8", "--width", "24", "--height", "8")
    assert done.exit_code == 0, done.output
    with Image.open(next((tmp_path / "out").iterdir())) as image:
        text = image.text["parameters"]  # type: ignore[attr-defined]
    assert text.startswith("a circle\nNegative prompt: blue\nSteps: 3, Sampler: Euler a, "
                           "Schedule type: Align Your Steps, CFG scale: 2.5, Seed: 8, Size: 24x8, Model: sd, "
                           "ELLA: fixed, ")


def test_compare_draws_three_ways_from_the_same_seed(run: Run, tmp_path: Path, pipeline: Pipeline,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    sheets: list[tuple[Any, Any]] = []
    make = cli.contact_sheet

    def spy(rows: Any, columns: Any) -> Image.Image:
        sheets.append((rows, columns))
        return make(rows, columns)

    monkeypatch.setattr(cli, "contact_sheet", spy)
    prompts = ["a red circle", "a blue square"]
    (tmp_path / "list.txt").write_text("\n".join(prompts))
    done = run("compare", "list.txt", "--seed", "4", "--out", "new/sheet.png")
    assert done.exit_code == 0, done.output
    [(rows, columns)] = sheets
    assert columns == ["plain SD", "ELLA fixed", "ELLA flexible"]
    for column, mode in enumerate(("clip", "fixed", "flexible")):
        for row, picture in enumerate(generate(pipeline, prompts, mode=mode, seeds=4, steps=2)):  # type: ignore[arg-type]
            assert rows[row][0] == prompts[row]
            assert (np.asarray(rows[row][1][column]) == np.asarray(picture.image)).all()
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.width > 3 * 256


def test_samplers_lists_everything_that_can_be_named(run: Run) -> None:
    done = run("samplers", with_model=False)
    assert done.exit_code == 0
    listed = [line.split()[0] for line in done.output.splitlines() if line]
    assert listed == ["SAMPLER", *SAMPLERS, "SCHEDULE", *SCHEDULES]


def test_rules_lists_everything_that_guidance_takes(run: Run) -> None:
    done = run("rules", with_model=False)
    assert done.exit_code == 0, done.output
    assert "CFG(scale)\n    Classifier-free guidance" in done.output
    assert "Interval(base, sigma_lo=0.0, sigma_hi=inf)" in done.output
    assert all(f"{name}(" in done.output for name in known())


def test_syntax_tags_and_rules_reach_the_picture(run: Run, tmp_path: Path, pipeline: Pipeline) -> None:
    words = ["a (red:1.4) __shape__ AND a circle :0.5", "--syntax", "--wildcards", str(tmp_path), "--seed", "2",
             "--guidance", "Interval(CFG(4), 0.5)", "--tags", "blue", "--negative-mode", "plain"]  # its older word
    (tmp_path / "shape.txt").write_text("square\n")
    done = run("generate", *words)
    assert done.exit_code == 0, done.output
    [expected] = generate(pipeline, "a (red:1.4) square AND a circle :0.5", syntax=True, seeds=2, steps=2, tags="blue",
                          guidance=Interval(CFG(4), 0.5), negative_mode="clip")
    [path] = (tmp_path / "out").iterdir()
    with Image.open(path) as image:
        assert np.abs(np.asarray(image, int) - np.asarray(expected.image, int)).max() <= 1


@pytest.mark.parametrize("command", [[], ["generate"], ["compare"], ["samplers"], ["rules"]])
def test_help_explains_with_an_example(run: Run, command: list[str]) -> None:
    done = run(*command, "--help", with_model=False)
    assert done.exit_code == 0
    assert "ella-kd" in done.output.split("Options:")[0] or command == ["samplers"]


TSC = str(MINIATURE / "tsc.safetensors")


@pytest.mark.parametrize(("words", "message"), [
    (["generate"], "no prompt: give one in quotes, or a file of prompts with --prompts"),
    (["generate", "--prompts", "missing.txt"], "no file of prompts at missing.txt"),
    (["generate", "--prompts", "empty.txt"], "empty.txt holds no prompt: expected one per line"),
    (["generate", "--prompts", "binary.txt"], "binary.txt is not a text file in UTF-8"),
    (["generate", "a", "--sampler", "dpmpp_2n"], "unknown sampler 'dpmpp_2n': did you mean dpmpp_2m"),
    (["generate", "a", "--schedule", "caras"], "unknown schedule 'caras': did you mean karras"),
    (["generate", "a", "--mode", "loose"], "'loose' is not one of 'flexible', 'fixed', 'clip'."),
    (["generate", "a", "--steps", "0"], "Invalid value for '--steps': 0 is not in the range x>=1."),
    (["generate", "a", "--scale", "nan"], "scale must be finite, got nan"),
    (["generate", "a", "--width", "21"], "multiples of 4 for this model, got 21x16: try 20x16"),
    (["generate", "a", "--out", "file/pictures"], "cannot write to the folder file/pictures: "),
    (["generate", "a", "--tsc", "missing.safetensors"], "no connector at missing.safetensors: --tsc takes a file"),
    (["generate", "a", "--t5", "nowhere"], "--t5 takes a folder that holds config.json, and nowhere does not"),
    (["generate", "a", "--clip-tokenizer", "nowhere"], "--clip-tokenizer takes a folder that holds a tokenizer, and"),
    (["generate", "a", "--checkpoint", "bad.safetensors"], "bad.safetensors is not a whole safetensors file"),
    (["generate", "a", "--checkpoint", TSC], "--checkpoint takes a Stable Diffusion checkpoint, and"),
    (["generate", "a", "--vae", TSC], "looks like ELLA's connector (TSC): its place is tsc, --tsc for the command"),
    (["generate", "a", "--vae", "nowhere"], "no autoencoder at nowhere: --vae takes a file or a folder"),
    (["generate", "a", "--prediction", "x0"], "'x0' is not one of 'eps', 'v'."),
    (["generate", "a", "--device", "abacus"], "has no device 'abacus'"),
    (["generate", "a", "--device", "cuda:99"], "has no device 'cuda:99'"),
    (["generate", "a", "--device", "meta"], "device 'meta' holds no numbers"),
    (["generate", "a", "--colour", "red"], "No such option"),
    (["generate", "a", "--guidance", "-" * 20000 + "1"], "not a guidance rule: '-----"),
    (["generate", "a", "--guidance", "CFG(scale=2, scale=3)"], "takes each argument once"),
    (["generate", "good", "a \udcff"], "the prompt is not valid UTF-8 text, at character 2: 'a \\udcff'"),
    (["generate", "a", "--negative", "<lora:add_detail:0.8> grey"], "asks for the add-on <lora:add_detail:0.8>"),
    (["generate", "a", "b AND", "--syntax"], "an AND has nothing on one side in 'b AND'"),
    (["generate", "a __colour__", "--wildcards", "nowhere"], "no folder of wildcards at nowhere"),
    (["generate", "a", "--sampler", "DPM++ 2M Karras", "--schedule", "exponential"], "says schedule 'karras'"),
    (["paint"], "No such command 'paint'"),
    (["compare", "empty.txt"], "empty.txt holds no prompt"),
    (["compare", "good.txt", "--out", "file/sheet.png"], "cannot write to the folder file: "),
    (["compare", "good.txt", "--out", "."], "--out takes the file of the sheet, and . is a folder: try compare.png"),
])
def test_mistakes_are_one_line_and_exit_code_2_before_any_work(run: Run, tiny_files: dict[str, str], tmp_path: Path,
                                                               words: list[str], message: str,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "good.txt").write_text("a")
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\xff\x00\x01")
    (tmp_path / "binary.txt").write_bytes(b"\x80\xff\x00\x01")
    monkeypatch.setattr(Pipeline, "load", None)  # nothing is read
    given = {f"--{name.replace('_', '-')}": value for name, value in tiny_files.items()}
    extra = [word for name, value in given.items() if name not in words for word in (name, value)]
    done = run(*words, *extra, *([] if "--device" in words else ["--device", "cpu"]), with_model=False)
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(("words", "parts", "message"), [
    (["generate", "a"], [], "--mode flexible needs ELLA: name its files with --tsc and --t5, or draw without"),
    (["generate", "a"], ["tsc"], "ELLA takes both --tsc, the connector, and --t5"),
    (["generate", "a", "--mode", "plain"], [], "--mode clip needs CLIP's tokenizer, which no checkpoint holds: no"),
    (["generate", "a", "--tags", "red"], ["tsc", "t5"], "--tags needs CLIP's tokenizer"),
    (["generate", "a", "--mode", "clip", "--negative-mode", "fixed"], ["clip_tokenizer"], "--negative-mode fixed"),
    (["compare", "good.txt"], ["clip_tokenizer"], "the column ELLA fixed needs ELLA"),
])
def test_what_a_mode_needs_is_said_in_the_commands_words(run: Run, tiny_files: dict[str, str], tmp_path: Path,
                                                         words: list[str], parts: list[str], message: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.txt").write_text("a")
    monkeypatch.setattr(Pipeline, "load", None)
    named = [word for name in ("checkpoint", *parts) for word in (f"--{name.replace('_', '-')}", tiny_files[name])]
    done = run(*words, *named, with_model=False)
    assert (done.exit_code, done.stderr.startswith(f"Error: {message}")) == (2, True), done.stderr


def test_a_full_disk_while_saving_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    done = run("generate", "a", "--seed", "1")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == (
        "Error: cannot write out/00001-1-a.png: No space left on device; free some space or choose another folder")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmany bytes"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    MemoryError(),
])
def test_a_device_out_of_memory_is_one_line(run: Run, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(jobs, "draw", exhausted)
    done = run("generate", "a")
    assert done.exit_code == 2
    assert done.stderr == "Error: the device is out of memory: try a smaller --batch, --width or --height\n"


def test_a_reader_who_has_seen_enough_ends_a_list_without_a_word(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli.click, "echo", closed)
    done = run("samplers", with_model=False)
    assert (done.exit_code, done.output) == (1, "")


def test_parts_without_a_checkpoint_are_refused(run: Run) -> None:
    done = run("generate", "a", "--t5", "folder", with_model=False)
    assert done.exit_code == 2
    assert done.stderr == "Error: --t5 belongs to a checkpoint: name it with --checkpoint\n"


@pytest.mark.parametrize(("words", "warning"), [
    (["--sampler", "euler_cfg_pp", "--scale", "7"], "with CFG++ cond_scale is lambda"),
    (["--sampler", "euler_cfg_pp", "--guidance", "CFG(7)"], "with CFG++ cond_scale is lambda"),
    (["--sampler", "euler_cfg_pp", "--guidance", "Rescale(CFG(7), 0.7)"], "with CFG++ the rule's scale is lambda"),
    (["--dtype", "float16"], "float16 on a CPU takes about 100 times as long"),
])
def test_warnings_are_one_line(run: Run, words: list[str], warning: str) -> None:
    done = run("generate", "a", *words)
    assert done.exit_code == 0, done.output
    assert f"Warning: {warning}" in done.stderr
