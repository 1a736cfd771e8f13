"""Files that appear whole or not at all: the one writer of everything that is kept.

It imports nothing of ours, so that samplers, models and the rest can all use it.
"""

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_ADVICE = {
    errno.EEXIST: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that you may write to"),
}


@contextmanager
def writing(path: str | Path, *, exclusive: bool = False) -> Iterator[Path]:
    """A temporary file beside `path`, to be written in the block; it becomes `path` at the block's end.

        with writing("out/a.png") as temporary:
            temporary.write_bytes(data)

    Its name is its own, so that any number of threads and processes may write one path: the last one stays, or with
    exclusive the first, and the others get FileExistsError. If anything fails, what was at `path` stays and the
    temporary file goes. Permissions are those of any new file (the umask's).
    Raises OSError of the same errno that names `path` and says what to do: no such folder, a full disk, no permission.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file of its own there, with 0600
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if exclusive:
            _claim(temporary, path)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def writing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, to be filled in the block; it becomes `path` at the block's end, or goes.

    A folder that is there must be empty. Raises OSError that names `path` and says what to do, FileExistsError first.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, f"cannot write {path}: something is there; choose another name")
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; no two tensors may share memory. Raises OSError as `writing`."""
    with writing(path) as temporary:
        try:
            save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary, dict(metadata))
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # all it tells of a full disk
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code)) from error


def _claim(temporary: Path, path: Path) -> None:
    """Give the file its name if no other has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(temporary, path)


def _named(error: OSError, path: Path) -> OSError:
    reason, advice = error.strerror or str(error), "free some space or choose another folder"
    if not path.parent.is_dir():
        reason, advice = f"there is no folder {path.parent}", "make it first or choose another"
    return OSError(error.errno, f"cannot write {path}: {reason}; {_ADVICE.get(error.errno or 0, advice)}")
