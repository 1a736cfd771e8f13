"""Devices and dtypes are checked before any work, by every door that takes them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ella_kd.models import T5TextEncoder, load_checkpoint, load_features, load_tsc
from ella_kd.models.devices import check_device, check_dtype

DOORS: list[Callable[..., Any]] = [load_checkpoint, load_tsc, T5TextEncoder.from_folder]


@pytest.mark.parametrize("name", ["meta", "nope", "", "cuda:99", "privateuseone", "vulkan"])
def test_a_device_that_is_not_there_is_a_clear_error(name: str, tmp_path: Path) -> None:
    doors: list[Callable[[Any], Any]] = [
        check_device, *(lambda device, door=door: door(tmp_path / "gone", device=device) for door in DOORS),
        lambda device: load_features(tmp_path / "gone", device=device)]
    for door in doors:
        with pytest.raises(ValueError, match=rf"(has no )?device '{name}' .*choose cpu"):
            door(name)


def test_a_device_that_is_there_and_the_default() -> None:
    assert check_device("cpu") == check_device(torch.device("cpu")) == torch.device("cpu")
    assert check_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("dtype", "device", "want"), [
    (None, "cpu", torch.float32), (None, "cuda", torch.float16), ("float32", "cpu", torch.float32),
    ("torch.bfloat16", "cpu", torch.bfloat16), (torch.float64, "cpu", torch.float64), ("float16", "mps", torch.float16),
])
def test_dtypes(dtype: Any, device: str, want: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_dtype(dtype, device) == want


@pytest.mark.parametrize("dtype", ["fp17", torch.int8, torch.float8_e4m3fn, 16])
def test_other_dtypes_are_refused(dtype: Any, tmp_path: Path) -> None:
    for door in (lambda: check_dtype(dtype, "cpu"), *(lambda door=door: door(tmp_path, dtype=dtype) for door in DOORS)):
        with pytest.raises(ValueError, match="networks run in float16, bfloat16, float32, float64, got dtype"):
            door()


def test_float16_on_a_cpu_warns_once(tiny_files: dict[str, str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        encoder = T5TextEncoder.from_folder(tiny_files["t5"], dtype="float16", device="cpu")
        load_tsc(tiny_files["tsc"], dtype=torch.float16)
    assert encoder.model.dtype == torch.float16
    assert [str(warning.message)[:50] for warning in caught] == ["float16 on a CPU takes about 100 times as long as "]
