"""What the page does, without a page: pictures, stopping, uploads, and what it does not read."""

import random
import re
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.miniature.scenes import random_scene, render
from ella_kd import Pipeline, cli, generate
from ella_kd.app.web import grids
from ella_kd.app.web.form import COMPARE, Form
from ella_kd.app.web.preview import Preview
from ella_kd.app.web.session import THREAD, Saved, Step, Studio, message_of
from ella_kd.app.web.uploads import opened, start_and_mask
from studio import miniature


@pytest.fixture
def studio(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():  # the studio listens to them
        yield Studio(pipeline, "out")


def drawn(studio: Studio, **given: Any) -> list[Saved]:
    return [news for news in studio.draw(Form(**{"prompt": "a red circle", "steps": 2, "seed": 3, **given}))
            if isinstance(news, Saved)]


def test_a_picture_is_the_commands_to_the_byte_and_its_settings_draw_it_again(
        studio: Studio, tiny_files: dict[str, str]) -> None:
    words = [word for name, value in tiny_files.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = CliRunner().invoke(cli.main, ["generate", "a red circle", "--seed", "3", "--steps", "2", "--negative",
                                         "blue", "--tags", "square", *words, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    theirs = Path("out/00001-3-a-red-circle.png")
    form, text, told = studio.settings_of(theirs)
    assert told == [] and text.startswith("a red circle\nNegative prompt: blue\nSteps: 2")
    [saved] = [news for news in studio.draw(form) if isinstance(news, Saved)]
    assert saved.path == Path("out") / date.today().isoformat() / "00001-3-a-red-circle.png"
    assert saved.path.read_bytes() == theirs.read_bytes()


def test_steps_are_told_with_a_preview_of_every_picture(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ella_kd.app.web.session.EVERY", 0)
    news = [*studio.draw(Form("a", steps=4, seed=3, count=2, width=24, height=16))]
    steps = [each for each in news if isinstance(each, Step)]
    assert [each.step for each in steps] == [1, 2, 3, 4] and steps[0].steps == 4
    assert [round(each.share, 2) for each in steps] == [0.25, 0.5, 0.75, 1.0]
    assert steps[0].left is None and all(each.left is not None and each.left >= 0 for each in steps[1:])
    assert [picture.size for picture in steps[0].preview] == [(6, 4), (6, 4)]
    assert [(each.done, each.total) for each in news if isinstance(each, Saved)] == [(1, 2), (2, 2)]


def test_compare_reads_one_seed_in_three_ways(studio: Studio, pipeline: Pipeline) -> None:
    found = drawn(studio, mode=COMPARE)
    assert [each.request.mode for each in found] == ["clip", "fixed", "flexible"]
    for each in found:
        [wanted] = generate(pipeline, "a red circle", seeds=3, steps=2, mode=each.request.mode)
        with Image.open(each.path) as image:
            assert (np.asarray(image) == np.asarray(wanted.image)).all()


def test_closing_stops_at_the_next_step_and_saves_nothing_half(studio: Studio) -> None:
    with closing(studio.draw(Form("a", steps=200, seed=3))) as drawing:
        first = next(filter(None, drawing))
        assert isinstance(first, Step) and first.step < 20
    assert studio.drawing.acquire(timeout=5), "it draws on"
    studio.drawing.release()
    assert not [*Path("out").rglob("*.png")]
    assert len(drawn(studio)) == 1


def test_two_at_once_get_their_own_pictures(studio: Studio) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda seed: drawn(studio, seed=seed, steps=5), (1, 9))]
    assert [[each.request.seed for each in one] for one in found] == [[1], [9]]


@pytest.mark.parametrize(("given", "message"), [
    ({"start": "/etc/passwd"}, "the start picture is a picture that was given to this page, got '/etc/passwd'"),
    ({"start": "out/inputs/../../secret.png"}, "the start picture is a picture that was given"),
    ({"prompt": "a <lora:/etc/passwd:1>"}, "no lora '/etc/passwd' here"),
    ({"lora": "org/repo:file.safetensors:1"}, "no lora 'org/repo:file.safetensors' here"),
    ({"embedding": ("secret.pt",)}, "no embedding 'secret.pt' here"),
    ({"width": 2048, "more": "hires: 4:0.5"}, "the larger side of a picture may be 2048 px here, got 8192"),
])
def test_nothing_is_read_that_was_not_given_and_nothing_too_large_is_drawn(studio: Studio, given: dict[str, Any],
                                                                          message: str) -> None:
    Image.new("RGB", (16, 16)).save("secret.png")
    torch.save({}, "secret.pt")
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        studio.draw(Form(**{"prompt": "a", **given}))


def test_a_picture_that_was_given_is_kept_and_drawn_over(studio: Studio, pipeline: Pipeline) -> None:
    start, mask = Image.new("RGB", (24, 16), "red"), Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 12, 16))
    kept = studio.keep(start)
    assert kept == studio.keep(start.copy()) and Path(kept).parent == Path("out/inputs")
    [saved] = drawn(studio, start=kept, mask=studio.keep(mask))
    [wanted] = generate(pipeline, "a red circle", start=start, mask=mask, steps=2, seeds=3)
    with Image.open(saved.path) as image:
        assert (np.asarray(image) == np.asarray(wanted.image)).all()
    form, _, told = studio.settings_of(saved.path)
    assert form.start == kept and told == []


def test_settings_of_a_hostile_picture_name_no_file_here(studio: Studio) -> None:
    info = PngInfo()
    info.add_text("parameters", "a <lora:secret:1>\nSteps: 2, Sampler: Euler a, CFG scale: 5, Seed: 4, ELLA: fixed, "
                  "Start: /etc/passwd, Model: other, Version: ella_kd 0")
    Image.new("RGB", (8, 8)).save("theirs.png", pnginfo=info)
    form, _, told = studio.settings_of("theirs.png")
    assert form.start is None and (form.sampler, form.scale, form.seed) == ("euler_ancestral", 5.0, 4)
    notes = "\n".join(told)
    for each in ("the start picture /etc/passwd, to be given again", "no lora 'secret' here", "drawn by other"):
        assert each in notes
    Image.new("RGB", (8, 8)).save("plain.png")
    Path("none.png").write_text("no picture")
    for name, message in (("plain.png", "the picture: it carries no settings"), ("none.png", "is no picture")):
        with pytest.raises(ValueError, match=message):
            studio.settings_of(name)


def test_a_small_file_that_holds_ever_so_many_pixels_is_refused(studio: Studio) -> None:
    Image.new("1", (9000, 9000)).save("bomb.png")
    with pytest.raises(ValueError, match="40 million pixels, got 9000x9000"):
        studio.settings_of("bomb.png")


def test_an_upload_is_measured_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("RGB", (4096, 8)).save(tmp_path / "wide.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])  # its header alone
    for source in (str(tmp_path / "cut.png"), (tmp_path / "cut.png").read_bytes()):
        with pytest.raises(ValueError, match="the larger side of a picture may be 2048 px here, got 4096x8"):
            opened(source, 2048)
        with pytest.raises(ValueError, match="this picture is damaged"):
            opened(source, 4096)
        for layers in ([], [source]):
            with pytest.raises(ValueError, match="4096x8"):
                start_and_mask({"background": source, "layers": layers}, 2048)


def test_what_was_painted_is_the_mask() -> None:
    below, layer = (painted_png(colour, at) for colour, at in (("red", (0, 0, 24, 16)), ("white", (0, 0, 12, 16))))
    found = start_and_mask({"background": below, "layers": [layer]}, 48)
    assert found["start"].size == (24, 16) and found["mask"].getbbox() == (0, 0, 12, 16)
    assert list(start_and_mask({"background": below, "layers": []}, 48)) == ["start"]
    assert start_and_mask({"background": None, "layers": [layer]}, 48) == {}


def painted_png(colour: str, at: tuple[int, int, int, int]) -> bytes:
    picture, file = Image.new("RGBA", (24, 16)), BytesIO()
    picture.paste(colour, at)
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("refused", "message"), [
    ({"steps": 10**9}, "steps must be"), ({"guidance": "Nothing(7)"}, "unknown guidance rule"),
    ({"prompt": "a <lora:x:1>"}, "no lora 'x' here")])
def test_what_is_given_to_a_refused_draw_is_not_kept(studio: Studio, refused: dict[str, Any], message: str) -> None:
    given = {"start": Image.new("RGB", (24, 16), "red"), "mask": Image.new("L", (24, 16), 255)}
    with pytest.raises(ValueError, match=message):
        studio.with_pictures(Form(**{"prompt": "a", **refused}), given)
    assert not [*Path("out").rglob("*.png")]
    form = studio.with_pictures(Form("a", steps=2), given)
    assert studio.asked(form) and len([*Path("out/inputs").iterdir()]) == 2


def test_warnings_of_a_draw_are_told_with_its_picture(studio: Studio) -> None:
    [saved] = drawn(studio, more="hidiffusion: on")
    assert "hidiffusion is for pictures larger than the model's own" in saved.told[0]


def test_tokens_are_counted_while_a_picture_is_drawn(studio: Studio) -> None:
    assert studio.tokens("a red circle") == "4 T5 tokens, 4 of 12 for CLIP"
    assert studio.tokens("a " * 200) == "201 T5 tokens (fixed reads 128), 201 of 12 for CLIP"


GRID = "prompt: a red circle\nsteps: 2\naxes:\n  scale: 1-3\n  seed: 1-2\n"


def test_a_grid_takes_what_looks_like_base_60(studio: Studio) -> None:
    [requests] = grids.read(studio, GRID + "reuse: 3:2\n").requests.values()
    assert {each.reuse for each in requests} == {"3:2"}


def test_a_grid_stops_after_its_batch_and_goes_on(studio: Studio) -> None:
    with closing(grids.run(studio, GRID)) as drawing:
        assert next(each.done for each in drawing if each and each.done) == 2
    while any(each.name == THREAD for each in threading.enumerate()):
        time.sleep(0.01)
    before = {path: path.stat().st_mtime_ns for path in Path("out/grids").glob("*/0*/*.png")}
    assert 2 <= len(before) < 6
    *_, last = filter(None, grids.run(studio, GRID))
    assert (last.done, last.total, last.failed) == (6, 6, 0) and grids.known(studio) == [last.page]
    after = {path: path.stat().st_mtime_ns for path in Path("out/grids").glob("*/0*/*.png")}
    assert before.items() <= after.items() and len(after) == 6


def test_a_grid_that_is_run_again_while_its_last_batch_is_at_work_waits_for_it(studio: Studio) -> None:
    text = GRID.replace("steps: 2", "steps: 12")
    with closing(grids.run(studio, text)) as drawing:
        assert next(each.done for each in drawing if each and each.done) == 2
    *_, last = filter(None, grids.run(studio, text))
    assert (last.done, last.total, last.failed) == (6, 6, 0)


@pytest.mark.parametrize(("text", "message"), [
    ("/etc/passwd", "a grid says keys such as prompt and axes"),
    (f"{GRID}checkpoint: /etc/passwd", "checkpoint names another model"),
    (f"{GRID}start: /etc/passwd", "start names a file"),
    (f"{GRID}  latents: /etc/passwd", "latents names a file"),
    (f"{GRID}  lora: /etc/passwd", "no lora /etc/passwd: the page was started without --models-dir"),
    (f"{GRID}  prompt: <lora:/etc/passwd:1>", "no lora /etc/passwd"),
    (f"{GRID}hires: '2:0.5'\nhires_upscaler: /etc/passwd", "upscaler /etc/passwd"),
    (f"{GRID}width: 4096", "the larger side of a picture may be 2048 px here, got 4096"),
    (f"{GRID}  steps: 1-900", "a grid of the page may have 2000 cells, got 5400"),
    (f"{GRID}steps: 201", "steps may be 200 here, got 201"),
    ("a: &a [1, 2]\nprompt: *a", "a grid repeats nothing by"),
    ("prompt: [", "the grid is not YAML"),
])
def test_a_grid_of_the_page_names_no_file_and_is_not_too_large(studio: Studio, text: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        grids.read(studio, text)


@pytest.mark.parametrize(("error", "message"), [
    (ValueError("a\n b"), "a b"), (torch.OutOfMemoryError("..."), "try a smaller count or size"),
    (RuntimeError("broken"), "something went wrong inside (RuntimeError); the server's console tells more")])
def test_errors_are_one_line(error: Exception, message: str) -> None:
    assert message in message_of(error)


def test_a_preview_shows_the_colours_that_the_autoencoder_makes() -> None:
    sd, scenes = miniature(), random.Random(0)
    show, errors = Preview.fit(sd.vae, side=6), []
    for _ in range(24):
        picture = Image.fromarray(render(random_scene(scenes, 2)))
        [seen] = show(sd.vae.encode(picture))
        assert seen.size == (6, 6)
        errors.append(np.abs(np.asarray(seen, float) - np.asarray(picture.reduce(8), float)).mean())
    assert np.mean(errors) < 34  # of 255; their mean colour errs by 69
