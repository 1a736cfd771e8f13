"""kill -9 in the middle of a batch: nothing is lost, nothing is drawn twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from ella_kd import cli
from test_batch import lines, names, pictures, write
from test_cli import model


def command(files: dict[str, str], folder: Path, out: str, steps: int = 15) -> list[str]:
    return ["batch", str(folder / "jobs.jsonl"), "--out", str(folder / out), "--shard", "8", "--batch", "4", "--steps",
            str(steps), *model(files)]


def start(words: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "ella_kd", *words], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def drawn(folder: Path) -> dict[str, int]:
    """The finished pictures, each with its file's number."""
    return {path.name: path.stat().st_ino for path in folder.glob("0*/*.png")}


def check_whole(folder: Path, reference: Path, count: int) -> None:
    assert pictures(folder).keys() == names(lines(count), 8)  # no temporary file either
    assert pictures(folder) == pictures(reference)
    manifest = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [each["index"] for each in manifest] == list(range(count))


def test_killed_once_and_taken_up_again(tiny_files: dict[str, str], tmp_path: Path) -> None:
    count = 24
    write(tmp_path / "jobs.jsonl", lines(count))
    runner = start(command(tiny_files, tmp_path, "killed", steps=6))
    try:
        while len(before := drawn(tmp_path / "killed")) < 5:
            assert runner.poll() is None, "it ended before it was killed"
            time.sleep(0.002)
        runner.send_signal(signal.SIGSTOP)  # it holds the lock all the same
        second = CliRunner().invoke(cli.main, command(tiny_files, tmp_path, "killed", steps=6))
        assert second.exit_code == 2 and "another run is drawing into" in second.output
    finally:
        runner.kill()
        runner.wait()
    before = drawn(tmp_path / "killed")
    assert len(before) < count, "it was done before it was killed"
    for out in ("killed", "whole"):
        assert CliRunner().invoke(cli.main, command(tiny_files, tmp_path, out, steps=6)).exit_code == 0
    check_whole(tmp_path / "killed", tmp_path / "whole", count)
    assert before.items() <= drawn(tmp_path / "killed").items(), "a finished picture was written again"


@pytest.mark.slow
def test_killed_twenty_times_at_random(tiny_files: dict[str, str], tmp_path: Path) -> None:
    count, kills, chance = 800, 0, random.Random(0)
    write(tmp_path / "jobs.jsonl", lines(count))
    while kills < 20:
        runner, seen = start(command(tiny_files, tmp_path, "killed")), drawn(tmp_path / "killed")
        while len(drawn(tmp_path / "killed")) == len(seen):  # it is at work
            assert runner.poll() is None
            time.sleep(0.02)
        time.sleep(chance.random())
        assert runner.poll() is None, "the job is too small for twenty kills"
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        kills += 1
        assert seen.items() <= drawn(tmp_path / "killed").items(), "a finished picture was written again or lost"
    for out in ("killed", "whole"):
        assert CliRunner().invoke(cli.main, command(tiny_files, tmp_path, out)).exit_code == 0
    check_whole(tmp_path / "killed", tmp_path / "whole", count)
