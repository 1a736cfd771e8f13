"""A batch on a Ray cluster of two nodes on this machine: one worker or three, killed or not, the files are the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ella_kd import cli
from test_batch import lines, marker, names, pictures, write
from test_batch_kills import drawn
from test_cli import model

pytestmark = pytest.mark.slow

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
               "RAY_worker_niceness": "0"}  # Ray's 15 starves workers on a machine that does anything else
SHARD = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes: one with room for one worker of one CPU, the other for two more."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def command(files: dict[str, str], folder: Path, out: str, *words: str, steps: int = 15) -> list[str]:
    return ["batch", str(folder / "jobs.jsonl"), "--out", str(folder / out), "--shard", str(SHARD), "--batch", "4",
            "--steps", str(steps), *words, *model(files)]


def run(words: list[str]) -> None:
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 0, done.output


def test_one_worker_three_and_no_ray_draw_the_same_bytes(cluster: Any, tiny_files: dict[str, str],
                                                         tmp_path: Path) -> None:
    write(tmp_path / "jobs.jsonl", lines(64))
    run(command(tiny_files, tmp_path, "plain"))
    run(command(tiny_files, tmp_path, "three", "--ray", cluster.address, "--ray-cpus", "1"))
    run(command(tiny_files, tmp_path, "one", "--ray", cluster.address, "--ray-cpus", "1.5"))  # room for one at a time
    assert pictures(tmp_path / "plain").keys() == names(lines(64), SHARD)
    assert pictures(tmp_path / "plain") == pictures(tmp_path / "three") == pictures(tmp_path / "one")
    for number in range(8):
        found = [{**marker(tmp_path / out, number), "seconds": 0} for out in ("plain", "three", "one")]
        assert found[0] == found[1] == found[2]
    assert json.loads((tmp_path / "three" / "job.json").read_text())["threads"] == 1 == torch.get_num_threads()


def test_what_a_request_or_a_folder_causes_is_said_in_its_own_words(cluster: Any, tiny_files: dict[str, str],
                                                                     tmp_path: Path) -> None:
    write(tmp_path / "jobs.jsonl", [*lines(3), {"prompt": "a", "refiner": "none.safetensors"}])
    done = CliRunner().invoke(cli.main, command(tiny_files, tmp_path, "out", "--ray", cluster.address, steps=1))
    assert done.exit_code == 1 and "3 pictures, 1 failed" in done.output, done.output
    assert "none.safetensors" in marker(tmp_path / "out")["failed"]["3"]
    write(tmp_path / "jobs.jsonl", lines(20, width=18))
    refused = CliRunner().invoke(cli.main, command(tiny_files, tmp_path, "sizes", "--ray", cluster.address, steps=1))
    assert refused.exit_code == 2 and "line 1: width and height must be multiples of 4" in refused.output


def test_killed_twenty_times_at_random_driver_and_workers(cluster: Any, tiny_files: dict[str, str],
                                                          tmp_path: Path) -> None:
    count, chance, kills = 1600, random.Random(1), {"driver": 0, "worker": 0}
    write(tmp_path / "jobs.jsonl", lines(count))
    words = command(tiny_files, tmp_path, "killed", "--ray", cluster.address)
    driver = start(words)
    while sum(kills.values()) < 20:
        wait_for_more(driver, tmp_path / "killed")
        time.sleep(chance.random())
        seen = drawn(tmp_path / "killed")
        assert driver.poll() is None, f"the job is too small for twenty kills: {kills}"
        if sum(kills.values()) % 4 == 3:
            driver.kill()
            driver.wait()
            kills["driver"] += 1
            driver = start(words)
        elif found := workers():
            os.kill(chance.choice(found), signal.SIGKILL)
            kills["worker"] += 1
        assert seen.items() <= drawn(tmp_path / "killed").items(), "a finished picture was written again or lost"
    driver.kill()
    driver.wait()
    run(words)
    run(command(tiny_files, tmp_path, "whole"))
    assert kills == {"driver": 5, "worker": 15}
    assert pictures(tmp_path / "killed").keys() == names(lines(count), SHARD)
    assert pictures(tmp_path / "killed") == pictures(tmp_path / "whole")


def start(words: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "ella_kd", *words], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def wait_for_more(driver: "subprocess.Popen[bytes]", folder: Path) -> None:
    before, since = len(drawn(folder)), time.monotonic()
    while len(drawn(folder)) == before:
        assert driver.poll() is None and time.monotonic() - since < 300, "nothing is drawn any more"
        time.sleep(0.05)


def workers() -> list[int]:
    """The processes that draw for a driver of this test."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::_draw"):
            found.append(int(path.name))
    return found
