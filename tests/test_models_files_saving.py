"""Writing systems: whole files or none."""

from pathlib import Path

import pytest

from ella_kd.models import load_checkpoint, save_checkpoint
from filing import Networks, Tensors, same


def test_a_failed_write_leaves_the_old_file(networks: Networks, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_is_full(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    path = tmp_path / "sd.safetensors"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr("ella_kd.files.save_file", disk_is_full)
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(path, *networks)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["sd.safetensors"]
    save_checkpoint(path, *networks)
    assert same(load_checkpoint(path).unet, networks[0])
    with pytest.raises(ValueError, match=r"written as \.safetensors"):
        save_checkpoint(tmp_path / "sd.ckpt", *networks)
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_checkpoint(tmp_path / "nowhere" / "sd.safetensors", *networks)
