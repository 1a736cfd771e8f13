"""Writing systems: whole files or none."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ella_kd.files import writing_folder
from ella_kd.models import NoiseSchedule, UNet, UNetConfig, load_checkpoint, save_checkpoint
from ella_kd.models.files.configs import scheduler_config
from ella_kd.models.files.saving import save, save_folder
from filing import Networks, Tensors, same
from test_files import small_files


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


def test_a_folder_appears_whole_or_not_at_all(saved: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved)
    for target in (tmp_path / "x.safetensors", tmp_path / "folder"):
        with small_files(100_000), pytest.raises(OSError, match=r"cannot write .*free some space") as caught:
            save(target, checkpoint)
        assert caught.value.errno == errno.EFBIG and not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; make it first"):
        save(tmp_path / "nowhere" / "folder", checkpoint)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", checkpoint)
    assert same(load_checkpoint(tmp_path / "empty").unet, checkpoint.unet)
    with pytest.raises(FileExistsError, match="something is there"):
        save(tmp_path / "empty", checkpoint)
    def stop() -> None:
        with writing_folder(tmp_path / "stopped") as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_what_diffusers_cannot_describe_is_refused(saved: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved)
    odd = UNet(UNetConfig(4, 4, 32, (1, 2), 1, (1, 1), 128, 4, middle_depth=2))
    with pytest.raises(ValueError, match="diffusers has no UNet whose middle has 2 transformer blocks and"):
        save_folder(tmp_path / "x", replace(checkpoint, unet=odd))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["x.safetensors", "folder"])
@pytest.mark.parametrize(("mean", "std"), [((0.25,) * 4, None), ((0.5, 1, 2, 3), (2.0,) * 4)])
def test_an_autoencoders_shift_comes_back(saved: Path, tmp_path: Path, target: str, mean: tuple[float, ...],
                                          std: tuple[float, ...] | None) -> None:
    checkpoint = load_checkpoint(saved)
    checkpoint.vae.config = replace(checkpoint.vae.config, mean=mean, std=std)
    save(tmp_path / target, checkpoint)
    assert load_checkpoint(tmp_path / target, prediction="eps").vae.config == checkpoint.vae.config


@pytest.mark.parametrize(("schedule", "says"), [
    (NoiseSchedule.sd15(), {"beta_schedule": "scaled_linear", "beta_end": 0.012, "rescale_betas_zero_snr": False}),
    (NoiseSchedule.sd2_v().zero_terminal_snr(), {"beta_end": 0.012, "rescale_betas_zero_snr": True}),
    (NoiseSchedule.kolors(), {"beta_end": 0.014, "num_train_timesteps": 1100}),
    (NoiseSchedule.linear(0.001, 0.01), {"rescale_betas_zero_snr": False}),
])
def test_schedules_come_back(schedule: NoiseSchedule, says: dict[str, object], saved: Path, tmp_path: Path) -> None:
    assert says.items() <= scheduler_config(schedule).items()
    save(tmp_path / "x", replace(load_checkpoint(saved), noise_schedule=schedule))
    again = load_checkpoint(tmp_path / "x").noise_schedule
    assert again.prediction == schedule.prediction
    torch.testing.assert_close(again.sigmas, schedule.sigmas, rtol=1e-10, atol=0)
