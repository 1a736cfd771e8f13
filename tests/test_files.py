"""The one writer: whole files or none, own temporary names, the umask's permissions, errors that say what to do."""

import errno
import os
import resource
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ella_kd.files import write_safetensors, writing


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file can grow beyond size bytes: a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    def fail() -> None:
        with writing(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        fail()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with writing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_permissions_are_the_umasks(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_safetensors(tmp_path / "tensors", {"a": torch.zeros(1)}, {})
        for exclusive in (False, True):
            with writing(tmp_path / f"text {exclusive}", exclusive=exclusive) as temporary:
                temporary.write_text("x")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("links", [True, False])
def test_one_of_many_writers_claims_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", none)

    def write(text: str) -> str:
        try:
            with writing(tmp_path / "a", exclusive=True) as temporary:
                temporary.write_text(text)
        except FileExistsError as error:
            return str(error)
        return text

    with ThreadPoolExecutor(8) as pool:
        [*lost, won] = sorted(pool.map(write, map(str, range(100, 200))), key=len, reverse=True)
    assert (tmp_path / "a").read_text() == won
    assert set(lost) == {f"[Errno 17] cannot write {tmp_path / 'a'}: File exists; choose another name"}
    assert len(list(tmp_path.iterdir())) == 1


def test_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    def write(i: int) -> None:
        write_safetensors(tmp_path / "a", {"a": torch.full((500,), i)}, {})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(60)))
    assert len(load_file(tmp_path / "a")["a"].unique()) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_errors_name_the_file_and_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*x; make it first"), writing(tmp_path / "x" / "a"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"no folder .*file; make it first"), writing(tmp_path / "file" / "a"):
        pass
    with pytest.raises(OSError, match="choose a shorter name"), writing(tmp_path / ("a" * 300)):
        pass
    with small_files(1000), pytest.raises(OSError, match=r"cannot write .*full: File too large; free some") as caught:
        write_safetensors(tmp_path / "full", {"a": torch.zeros(1000)}, {})
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
