"""`ella-kd batch`: a file of requests, drawn once however often it is tried."""

import errno
import hashlib
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from addon_files import write_lora
from ella_kd import Pipeline, cli, generate
from ella_kd.app import shards
from ella_kd.app.batch import Batch
from ella_kd.app.remembered import Remembered
from ella_kd.app.shard_files import sha256, unpack
from ella_kd.app.shards import Shard, draw_shard
from ella_kd.images import Picture
from ella_kd.jobs import Job
from ella_kd.request import Request
from test_cli import model

Run = Callable[..., Result]
PROMPTS = ["a red circle", "a blue square", "a red circle on the left", "the right of a blue circle"]


def lines(count: int, **more: Any) -> list[dict[str, Any]]:
    """Requests of four prompts, every fifth of another size."""
    return [{"prompt": PROMPTS[i % 4], "seed": 7 * i, **({"width": 32} if i % 5 == 3 else {}), **more}
            for i in range(count)]


def write(path: Path, requests: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, requests)) + "\n")
    return path


def names(requests: list[dict[str, Any]], shard: int) -> set[str]:
    return {f"{i // shard:05d}/{i:08d}-{request['seed']}.png" for i, request in enumerate(requests)}


def pictures(folder: Path) -> dict[str, str]:
    """Every file of the batch's shards with its sha256, hidden ones too."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in found
            if path.name not in (".lock", "job.json", "manifest.jsonl") and path.parent.name != "done"}


def marker(folder: Path, number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "done" / f"{number:05d}.json").read_text())
    return found


@pytest.fixture
def run(tiny_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "jobs.jsonl", lines(10))

    def run(*words: str, jobs: str = "jobs.jsonl", out: str = "out") -> Result:
        cut = ["--shard", "4", "--batch", "3", "--steps", "1"]
        return CliRunner().invoke(cli.main, ["batch", jobs, "--out", out, *cut, *words, *model(tiny_files)])

    return run


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[Request]], None]], list[list[int]]]:
    """Puts a function before every drawing of a batch; gives the seeds of all that were drawn."""
    real, drawn = shards.jobs, list[list[int]]()

    def put(before: Callable[[list[Request]], None]) -> list[list[int]]:
        def jobs(*args: Any, **options: Any) -> Iterator[Job]:
            for job in real(*args, **options):
                def draw(job: Job = job) -> list[Image.Image]:
                    before(job.requests)
                    drawn.append([request.seed for request in job.requests])
                    return job.draw()

                yield Job(job.requests, draw)

        monkeypatch.setattr(shards, "jobs", jobs)
        return drawn

    return put


def test_a_job_is_drawn_whole_and_only_once(run: Run, pipeline: Pipeline, drawing: Any, tmp_path: Path) -> None:
    drawn = drawing(lambda requests: None)
    done = run()
    assert done.exit_code == 0, done.output
    assert "10 of 10 requests in 3 of 3 shards: 10 pictures" in done.output
    files = pictures(tmp_path / "out")
    assert files.keys() == names(lines(10), 4)
    # Four to a shard, three at once; the wide ones, 3 and 8, stand apart.
    assert drawn == [[0, 7, 14], [21], [28, 35, 42], [49], [56], [63]]

    manifest = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [(each["index"], each["request"]["prompt"], files[each["file"]]) for each in manifest] == [
        (i, PROMPTS[i % 4], each["sha256"]) for i, each in enumerate(manifest)]
    assert manifest[3]["request"] | {"width": 32, "height": 16, "steps": 1} == manifest[3]["request"]
    expected = generate(pipeline, PROMPTS[3], seeds=21, steps=1, width=32)[0].image
    with Image.open(tmp_path / "out" / manifest[3]["file"]) as image:
        assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1

    before = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.png")}
    assert run().exit_code == 0 and len(drawn) == 6
    assert before == {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.png")}
    assert "10 of 10 requests" in run("--status").output
    checked = run("--verify", "99")
    assert checked.exit_code == 0 and checked.output.count("  the same\n") == 10, checked.output
    broken = tmp_path / "out" / manifest[2]["file"]
    broken.write_bytes(broken.read_bytes()[:-20] + bytes(20))
    assert run("--verify", "99").exit_code == 1


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 3: this is not JSON"),
    ('["a red circle"]', "line 3: expected a JSON object"),
    ('{"seed": 1}', "line 3: the key prompt must be a text, got None"),
    ('{"prompt": "a", "stepz": 3}', "line 3: unknown key 'stepz': did you mean steps?"),
    ('{"prompt": "a", "cfg_scale": 3}', "line 3: unknown key 'cfg_scale': did you mean scale?"),
    ('{"prompt": "a", "steps": 0}', "line 3: steps must be a whole number of at least 1, got 0"),
    ('{"prompt": "a", "sampler": "eular"}', "line 3: unknown sampler 'eular'"),
    ('{"prompt": "a", "guidance": "CFG("}', "line 3: "),
    ('{"prompt": "a", "lora": "none.safetensors"}', "line 3: no lora at none.safetensors"),
    ('{"prompt": "a", "start": "none.png"}', "line 3: no picture at none.png"),
    ('{"prompt": "a", "width": 18}', "line 3: width and height must be multiples of 4"),
])
def test_a_line_that_cannot_be_drawn_is_named_before_anything_is_drawn(
        run: Run, drawing: Any, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n\n' + line + "\n")
    drawn = drawing(lambda requests: None)
    refused = run(jobs="bad.jsonl")
    assert refused.exit_code == 2 and f"bad.jsonl, {message}" in refused.output, refused.output
    assert not drawn and "Traceback" not in refused.output


def test_a_folder_of_another_batch_is_refused(run: Run, tmp_path: Path) -> None:
    assert run().exit_code == 0
    write(tmp_path / "others.jsonl", lines(9))
    refused = run(jobs="others.jsonl")
    assert refused.exit_code == 2 and "out holds another batch, whose requests is 10, not 9" in refused.output
    write(tmp_path / "others.jsonl", [*lines(9), {"prompt": "a red circle", "seed": 64}])
    assert "whose sha256 of the requests is" in run(jobs="others.jsonl").output
    assert "whose batch is 3, not 2" in run("--batch", "2").output
    assert "whose model is" in run("--dtype", "bfloat16").output


def test_a_start_picture_or_a_lora_that_was_replaced_is_another_batch(run: Run, tmp_path: Path) -> None:
    write_lora(tmp_path / "style.safetensors")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "s.png")
    for file, words in (("s.png", {"start": "s.png", "strength": 0.5}),
                        ("style.safetensors", {"lora": "style.safetensors"})):
        write(tmp_path / "jobs.jsonl", lines(1, **words))
        assert run(out=file[:2]).exit_code == 0 and run(out=file[:2]).exit_code == 0
        if file == "s.png":
            Image.new("RGB", (16, 16), "blue").save(tmp_path / file)
        else:
            write_lora(tmp_path / file, seed=1)
        refused = run(out=file[:2])
        assert refused.exit_code == 2 and "another batch, whose sha256 of the requests is" in refused.output


def test_a_second_runner_is_refused_and_the_first_goes_on(run: Run, drawing: Any) -> None:
    answers = list[Result]()

    def meanwhile(requests: list[Request]) -> None:
        if not answers:
            answers.append(run())

    drawing(meanwhile)
    assert run().exit_code == 0
    assert answers[0].exit_code == 2 and "another run is drawing into out" in answers[0].output


def test_a_shard_that_is_taken_up_again_ends_in_the_same_bytes(pipeline: Pipeline, tmp_path: Path) -> None:
    """Stopped after each batch, and with a picture missing or cut short."""
    requests = tuple(Request(**each, steps=1) for each in lines(8))
    whole = Shard(tmp_path / "whole", 0, 0, requests, batch_size=3)
    draw_shard(whole, pipeline)
    parts, kept = replace(whole, folder=tmp_path / "parts"), dict[Path, int]()
    for _ in range(3):
        once = iter([False, True])
        with pytest.raises(shards.Interrupted):
            draw_shard(parts, pipeline, stop=once.__next__)
        first, *others = sorted({*parts.pictures.glob("*.png")} - kept.keys())
        first.unlink()
        if len(others) > 1:
            others[0].write_bytes(others[0].read_bytes()[:100])
        kept |= {path: path.stat().st_ino for path in others[1:]}
        (parts.pictures / ".00000000-0.png.0123456789abcdef").write_bytes(b"of a killed writer")
    assert not parts.marker.exists()
    draw_shard(parts, pipeline)
    assert pictures(parts.folder) == pictures(whole.folder) and len(pictures(parts.folder)) == 8
    assert len(kept) == 1 and kept == {path: path.stat().st_ino for path in kept}, "a finished one was written again"
    assert {**marker(parts.folder), "seconds": 0} == {**marker(whole.folder), "seconds": 0}


def test_what_fails_is_kept_with_its_reason_and_tried_again(run: Run, drawing: Any, tmp_path: Path) -> None:
    ill = {14, 42}

    def fail(requests: list[Request]) -> None:
        if sick := ill.intersection(request.seed for request in requests):
            raise ValueError(f"the network returned NaN for {min(sick)}")

    drawn = drawing(fail)
    done = run()
    assert done.exit_code == 1 and "8 pictures, 2 failed" in done.output
    assert "request 2 failed: ValueError: the network returned NaN for 14" in done.output
    assert marker(tmp_path / "out")["failed"] == {"2": "ValueError: the network returned NaN for 14"}
    assert marker(tmp_path / "out")["batches"] == [[0, 1], [2], [3]] and marker(tmp_path / "out")["cut_changed"]
    assert pictures(tmp_path / "out").keys() == names(lines(10), 4) - {"00000/00000002-14.png", "00001/00000006-42.png"}
    before = pictures(tmp_path / "out")
    ill.clear()
    drawn.clear()
    assert run().exit_code == 1 and not drawn
    again = run("--retry")
    assert again.exit_code == 0 and drawn == [[14], [42]], again.output
    assert pictures(tmp_path / "out").items() > before.items()
    assert pictures(tmp_path / "out").keys() == names(lines(10), 4)


def test_out_of_memory_halves_the_batches_and_the_cut_is_kept(run: Run, pipeline: Pipeline, drawing: Any,
                                                              tmp_path: Path) -> None:
    def room_for(most: int) -> Callable[[list[Request]], None]:
        def before(requests: list[Request]) -> None:
            if len(requests) > most:
                raise torch.OutOfMemoryError("no memory")

        return before

    requests = tuple(Request(**each, steps=1) for each in lines(16))
    shard = Shard(tmp_path / "small", 0, 0, requests, batch_size=8)
    stops = iter([False, False, False, True])
    drawn = drawing(room_for(3))
    with pytest.raises(shards.Interrupted):
        draw_shard(shard, pipeline, stop=lambda: next(stops))
    halved = [[0, 1], [2, 4], [5, 6], [7, 9], [10, 11], [12, 14], [15], [3, 8, 13]]
    assert json.loads(shard.unfinished.read_text())["batches"] == halved
    assert drawn == [[0, 7]]
    drawing(room_for(99))  # later there is room: the cut stays
    draw_shard(shard, pipeline)
    done = marker(shard.folder)
    assert done["batches"] == halved and done["cut_changed"] and not done["failed"] and not shard.unfinished.exists()
    small = Shard(tmp_path / "alone", 0, 0, requests[:1], batch_size=8)
    drawing(room_for(0))
    draw_shard(small, pipeline)
    assert "OutOfMemoryError" in marker(small.folder)["failed"]["0"]


def test_a_tar_in_webdatasets_order(run: Run, drawing: Any, tmp_path: Path) -> None:
    write(tmp_path / "jobs.jsonl", [{**each, **({"width": 32} if i == 0 else {})} for i, each in enumerate(lines(10))])
    assert run().exit_code == 0 and run("--tar", out="tars").exit_code == 0
    files, tars = pictures(tmp_path / "out"), tmp_path / "tars"
    assert pictures(tars).keys() == {"00000.tar", "00001.tar", "00002.tar"}
    found = {}
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            order = tar.getnames()
            assert [Path(name).suffix for name in order] == [".png", ".json"] * (len(order) // 2)
            assert order == sorted(order, key=lambda name: (Path(name).stem, Path(name).suffix == ".json"))
            for name in order[::2]:
                file = tar.extractfile(name)
                assert file is not None
                found[f"{path.stem}/{name}"] = hashlib.sha256(file.read()).hexdigest()
    assert found == files
    assert run("--tar", "--verify", "3", out="tars").output.count("  the same\n") == 3
    before = pictures(tars)
    whole = (tars / "00000.tar").read_bytes()
    at = whole.index(b"IHDR")
    for damaged in (whole[: at + 12] + bytes([9]) + whole[at + 13 :], b"x" * 2000):  # a byte of a picture, no tar
        (tars / "00000.tar").write_bytes(damaged)
        checked = run("--tar", "--verify", "99", out="tars")
        assert checked.exit_code == 1 and "missing or damaged" in checked.output, checked.output
    with pytest.raises(ValueError, match=r"00000\.tar is damaged .* remove it and its marker"):
        unpack(tars / "00000.tar", tmp_path)
    (tars / "00000.tar").write_bytes(whole)
    shutil.rmtree(tars / "done")  # killed after the tars: they are read, nothing is drawn
    drawn = drawing(lambda requests: None)
    assert run("--tar", out="tars").exit_code == 0 and not drawn and pictures(tars) == before


@pytest.mark.parametrize(("said", "lost"), [
    ("CUDA error: out of memory", False),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", False),
    ("CUDA error: an illegal memory access was encountered", True),
])
def test_lack_of_memory_is_no_lost_device(said: str, lost: bool) -> None:
    assert shards.device_is_lost(RuntimeError(said)) is lost


def test_a_full_disk_stops_and_costs_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = Picture.save, [5]

    def save(self: Picture, path: Path, **how: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, f"cannot write {path}: No space left on device; free some space")
        real(self, path, **how)

    monkeypatch.setattr(Picture, "save", save)
    stopped = run()
    assert stopped.exit_code == 2 and "No space left on device; free some space" in stopped.output
    assert len(pictures(tmp_path / "out")) == 5 and not any(marker(tmp_path / "out")["failed"])
    monkeypatch.setattr(Picture, "save", real)
    assert run().exit_code == 0 and pictures(tmp_path / "out").keys() == names(lines(10), 4)


def test_sigterm_ends_after_the_batch(run: Run, drawing: Any, tmp_path: Path) -> None:
    def terminate(requests: list[Request]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    drawn = drawing(terminate)
    assert run().exit_code == 143
    assert drawn == [[0, 7, 14]] and len(pictures(tmp_path / "out")) == 3
    drawing(lambda requests: None)
    assert run().exit_code == 0 and len(pictures(tmp_path / "out")) == 10


def test_t5_reads_each_text_once(pipeline: Pipeline, tmp_path: Path) -> None:
    texts: list[str] = []
    real: Any = pipeline.t5

    class Counting:
        def __call__(self, prompts: list[str], length: int | None = None) -> Any:
            texts.extend(prompts)
            return real(prompts, length)

        def release(self, rest: Any = None) -> None:
            pass

    requests = tuple(Request(**each, steps=1) for each in lines(12))
    draw_shard(Shard(tmp_path, 0, 0, requests, batch_size=2), replace(pipeline, t5=Counting()))  # type: ignore[arg-type]
    assert sorted(texts) == sorted(["", *PROMPTS])
    remembered = Remembered(real, requests)
    for length in (None, 12):
        found, expected = remembered(PROMPTS[:3], length), real(PROMPTS[:3], length)
        torch.testing.assert_close(found.tokens[0, :4], expected.tokens[0, :4])
        assert found.tokens.shape == expected.tokens.shape
        assert found.mask is None if expected.mask is None else torch.equal(found.mask, expected.mask)  # type: ignore[arg-type]


def test_a_dry_run_tells_what_it_will_take_and_draws_nothing_into_the_folder(run: Run, tmp_path: Path) -> None:
    told = run("--dry-run")
    assert told.exit_code == 0, told.output
    assert "10 of 10 requests are to be drawn" in told.output
    assert "pictures a second, 3 at once, 16x16 px, 1 steps of dpmpp_2m" in told.output
    assert not (tmp_path / "out").exists()


def test_a_batch_of_two_models_keeps_them_apart(pipeline: Pipeline, tmp_path: Path) -> None:
    requests = [Request(**each, steps=1) for each in lines(5)]
    batch = Batch(tmp_path, {"one": requests[:3], "two": requests[3:]}, {}, shard=2)
    asked: list[str] = []
    batch.run(lambda name: (asked.append(name), pipeline)[1])  # type: ignore[func-returns-value]
    assert asked == ["one", "one", "two"]
    assert pictures(tmp_path).keys() == {"00000/00000000-0.png", "00000/00000001-7.png", "00001/00000002-14.png",
                                         "00002/00000003-21.png", "00002/00000004-28.png"}
