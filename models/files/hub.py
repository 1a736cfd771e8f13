"""Where a part of a system lies: a path, a file or folder on the Hugging Face hub, or a preset's part.

The fetching is huggingface_hub's: its cache (HF_HOME), progress bars, tokens and proxies. What the cache holds is used
without a question to the hub.
"""

import difflib
import errno
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

from ella_kd.models.files import presets
from ella_kd.models.files.choose import choose
from ella_kd.models.files.hashes import sha256
from ella_kd.models.files.presets import HubFile, Part

_SPEC = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([^:]+))?(?::(.+))?", re.ASCII)
_FILE = re.compile(r".*\.(safetensors|sft|ckpt|pth?|bin|gguf|json|zip)", re.IGNORECASE)
OURS = (FileNotFoundError, ValueError)  # what `choose` says of a repository
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORDS: dict[Part, str] = {"checkpoint": "checkpoint", "tsc": "connector", "t5": "T5", "vae": "VAE",
                           "text_encoder": "text encoder", "clip_tokenizer": "CLIP tokenizer", "lora": "LoRA",
                           "embedding": "embedding", "control": "control", "image_prompt": "image prompt",
                           "upscaler": "upscaler"}


def find(spec: str | Path, part: Part = "checkpoint") -> Path:
    """The local path of a part, fetched first if need be.

    spec: a path; `org/repo`, `org/repo:file` or `org/repo:folder` on the hub, `org/repo@revision:file` too; or the
    name of a preset that has the part. What exists as a path is a path. Of a repository or folder, the files that make
    the part are fetched (`choose`). A path that does not exist and cannot mean anything else is returned as it is.
    Files with a known sha256 are compared with it, others with the hub's, once (`sha256`).
    Raises FileNotFoundError for what is not there and cannot be fetched (no such repository, revision or file, a gate,
    no connection, HF_HUB_OFFLINE), ValueError for a wrong sha256 or a spec that does not say enough, OSError (ENOSPC)
    for a full disk.
    """
    meant = read(spec, part)
    return meant if isinstance(meant, Path) else _fetch(meant, part, spec)


def with_preset(specs: Mapping[Part, str | Path | None], name: str | None = None) -> dict[Part, str | Path | None]:
    """The specs, and for parts that are None those of the preset `name`, or of the one that the checkpoint names."""
    named = Name(name) if name else specs.get("checkpoint")
    parts = presets.PRESETS[named].parts if is_preset(named) else {}
    return {**dict.fromkeys(parts, named), **{part: named if spec is None and part in parts else spec
                                             for part, spec in specs.items()}}


class Name(str):
    """The name of a preset that was asked for as such, whatever the current folder holds."""


def is_preset(spec: object) -> TypeGuard[str]:
    """Whether this is the name of a preset, and of nothing in the current folder unless it is a `Name`."""
    return isinstance(spec, str) and spec in presets.PRESETS and (isinstance(spec, Name) or not os.path.lexists(spec))


def find_all(specs: Mapping[Part, str | Path | None]) -> dict[Part, Path | None]:
    """`find` for each part; None stays None. With HF_HUB_OFFLINE the error lists every file that is missing."""
    meant = {part: None if spec is None else read(spec, part) for part, spec in specs.items()}
    if _offline():
        missing = [(part, file, specs[part]) for part, file in meant.items()
                   if isinstance(file, HubFile) and cached(file, part) is None]
        if missing:
            raise _missing(missing)
    return {part: file if file is None or isinstance(file, Path) else _fetch(file, part, specs[part])
            for part, file in meant.items()}


def read(spec: str | Path, part: Part = "checkpoint") -> Path | HubFile:
    """What a spec means: a path, or a place on the hub. Nothing is fetched. Raises as `find` for what means nothing."""
    text = str(spec)
    if is_preset(spec):
        parts = presets.PRESETS[text].parts
        if part not in parts:
            raise ValueError(f"the preset {text} has no {_WORDS[part]}, it has {' and '.join(map(_flag, parts))}")
        return parts[part]
    if isinstance(spec, Path) or os.path.lexists(text):
        return Path(spec)
    if text.startswith(("https://", "http://")):
        raise ValueError(f"{text} is an address: of a file on the hub give org/repo:file")
    found = _SPEC.fullmatch(text)
    if found and (found[3] or not _FILE.fullmatch(text)):
        return HubFile(found[1], found[3] or "", revision=found[2])
    near = difflib.get_close_matches(text, [name for name in presets.PRESETS if part in presets.PRESETS[name].parts])
    if near:
        raise FileNotFoundError(f"no {_WORDS[part]} at {text}, and no preset of that name: did you mean {near[0]}?")
    return Path(text)


def cached(file: HubFile, part: Part = "checkpoint") -> Path | None:
    """Where the file or folder lies in the cache, or None if it is not there whole. Nothing is asked of the hub."""
    held = _held(file, part)
    return held and held[0]


def _held(file: HubFile, part: Part) -> tuple[Path, list[Path]] | None:
    """A file or folder of the cache, and the files that make it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        root = Path(snapshot_download(file.repo, revision=file.revision, local_files_only=True, allow_patterns=[]))
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        chosen = choose(names, file.path, part)
    except (LocalEntryNotFoundError, *OURS):  # no such repository in the cache, or not all of it
        return None
    return root / chosen.path, [root / name for name in chosen.names]


def _fetch(file: HubFile, part: Part, spec: object) -> Path:
    held = _held(file, part)
    if held is None or (not file.path and held[0].is_file()):  # the cache may hold one of a repository's many files
        try:
            held = _download(file, part)
        except Exception as error:  # of huggingface_hub, its HTTP client or its downloader: each has its own
            if held is None or type(error) in OURS:
                raise _why(error, file, part, spec) from error
    found, files = held
    for path in files:
        _check(path, file.sha256 if path == found else None, file)
    return found


def _download(file: HubFile, part: Part) -> tuple[Path, list[Path]]:
    from huggingface_hub import HfApi, constants, hf_hub_download

    info = HfApi().model_info(file.repo, revision=file.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    chosen = choose([each.rfilename for each in info.siblings or []], file.path, part)
    files = [Path(hf_hub_download(file.repo, name, revision=file.revision)) for name in chosen.names]
    return files[-1].parents[chosen.names[-1].count("/")] / chosen.path, files


def _check(path: Path, known: str | None, file: HubFile) -> None:
    """Compare a file with the sha256 that the table names, or else the hub, which names large files in the cache so."""
    blob = path.resolve()
    expected = known or (blob.name if re.fullmatch("[0-9a-f]{64}", blob.name) else None)
    if expected is not None and (found := sha256(blob)) != expected:
        said = "expected" if known else "the hub says"
        raise ValueError(f"{file.repo}:{path.name} is not the file it should be and is not used: its sha256 is "
                         f"{found}, {said} {expected}. The download broke, or the repository has changed: remove "
                         f"{blob} and try again")


def _why(error: Exception, file: HubFile, part: Part, spec: object) -> Exception:
    """One line for whatever kept a file from being fetched."""
    from huggingface_hub import constants, errors

    here = "it is no path here, and " if str(spec) == str(file) else ""  # both ways in which it can be read
    told = f"no {_WORDS[part]} at {spec}: {here}"
    if _offline():
        return _missing([(part, file, spec)], told)
    page = f"{constants.ENDPOINT}/{file.repo}"
    if type(error) in OURS:
        return type(error)(f"{told}the repository {page} {error}")
    if isinstance(error, errors.GatedRepoError):
        why = f"{page} is gated: accept its terms there, then `hf auth login`, or set HF_TOKEN"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = f"there is no repository {page}, or it is private: `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"{page} has no revision {file.revision}"
    elif isinstance(error, OSError) and error.errno in _FULL:
        return OSError(error.errno, f"{told}{os.strerror(error.errno or 0)} in {constants.HF_HUB_CACHE}: free some, or "
                       "set HF_HOME to a folder elsewhere")
    elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        why = f"{constants.HF_HUB_CACHE} cannot be written: set HF_HOME to a folder of yours"
    else:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        reason = " ".join(str(cause).split())[:300]
        why = (f"{file} could not be fetched from {constants.ENDPOINT} ({type(cause).__name__}: {reason}): try again, "
               f"or give a file of yours with {_flag(part)}")
    return FileNotFoundError(told + why)


def _missing(files: Sequence[tuple[Part, HubFile, object]], told: str = "") -> FileNotFoundError:
    """What to do about files that may not be fetched."""
    from huggingface_hub import constants

    listed = ", ".join(f"{file}{size(file)} for {_flag(part)}" for part, file, _ in files)
    folders = ", ".join(dict.fromkeys("models--" + file.repo.replace("/", "--") for _, file, _ in files))
    names = " ".join(dict.fromkeys(str(spec) for *_, spec in files))
    return FileNotFoundError(
        f"{told}HF_HUB_OFFLINE is set and the cache lacks {listed}. Fetch them once without it, `ella-kd download "
        f"{names}`; or copy {folders} from another machine's cache into {constants.HF_HUB_CACHE}; or give files of "
        f"yours with {', '.join(_flag(part) for part, *_ in files)}")


def size(file: HubFile) -> str:
    """" (4.27 GB)", or "" for what nobody says."""
    if file.bytes is None:
        return ""
    return f" ({file.bytes / 1e9:.3g} GB)" if file.bytes >= 1e9 else f" ({file.bytes / 1e6:.3g} MB)"


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _flag(part: str) -> str:
    return f"--{part.replace('_', '-')}"
