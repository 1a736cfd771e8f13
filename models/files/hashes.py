"""The sha256 of large files, computed once for each."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from tqdm.auto import tqdm

from ella_kd.files import writing

CHUNK = 1 << 22


def sha256(path: str | Path) -> str:
    """The sha256 of a file, in hex; remembered until the file's size or time of change is another.

    It is kept in the assets folder that huggingface_hub gives to libraries (HF_ASSETS_CACHE); where that cannot be
    written the file is read again next time. 4 GB take 2 to 10 s. Raises OSError for a file that cannot be read.
    """
    from huggingface_hub import cached_assets_path

    path = Path(path).resolve()
    facts = path.stat()
    known = {"path": str(path), "size": facts.st_size, "changed": facts.st_mtime_ns}
    note: Path | None = None
    with suppress(OSError, ValueError):  # no such note, or one that was cut
        name = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        note = cached_assets_path("ella_kd", "files", "sha256") / f"{name}.json"
        said = json.loads(note.read_text(encoding="utf-8"))
        if isinstance(said, dict) and {key: said.get(key) for key in known} == known:
            return str(said["sha256"])
    found = _read(path, facts.st_size)
    with suppress(OSError):
        if note is not None:
            with writing(note) as temporary:
                temporary.write_text(json.dumps({**known, "sha256": found}), encoding="utf-8")
    return found


def payload_sha256(path: str | Path) -> str:
    """The sha256 of a safetensors file without its header, which may be rewritten: A1111's and Civitai's of LoRAs.

    Not remembered: a LoRA's 150 MB take 0.1 s.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(int.from_bytes(file.read(8), "little") + 8)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file, tqdm(total=size, desc=f"checking {path.name[:40]}", unit="B", unit_scale=True,
                                        disable=size < 1 << 28, leave=False) as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
