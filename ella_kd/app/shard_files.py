"""The files of a shard: hashes, tars, JSON, and what makes them last."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ella_kd.files import writing


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pack(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """A tar, the same bytes for the same files."""
    with writing(path) as temporary, tarfile.open(temporary, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def unpack(packed: Path, folder: Path) -> None:
    """The pictures of a tar of ours that are not in the folder. ValueError for one that is damaged."""
    try:
        with tarfile.open(packed) as tar:
            for member in tar:
                path = folder / Path(member.name).name
                if path.suffix == ".png" and not path.exists() and (file := tar.extractfile(member)):
                    with writing(path) as temporary:
                        temporary.write_bytes(file.read())
    except tarfile.TarError as error:
        raise ValueError(f"{packed} is damaged ({str(error).splitlines()[0]}): remove it and its marker, and its "
                         "requests are drawn anew") from error


def member(packed: Path, name: str) -> bytes:
    """A file of a tar. KeyError if it is not there, tarfile.TarError for what is no tar."""
    with tarfile.open(packed) as tar:
        file = tar.extractfile(name)
        assert file is not None
        return file.read()


def sweep(folder: Path) -> None:
    """Take away what a killed writer left: the temporary files of `writing`."""
    for stray in folder.glob(".*.????????????????"):
        with suppress(FileNotFoundError):
            stray.unlink()


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return None


def write_json(path: Path, values: dict[str, Any]) -> None:
    with writing(path) as temporary:
        temporary.write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(folder: Path) -> None:
    """The names in a folder are on the disk before the marker is."""
    with suppress(OSError, AttributeError):  # file systems and Windows, where folders cannot be opened
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
