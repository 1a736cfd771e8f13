"""The autoencoder in strips against the same one whole."""

import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ella_kd import Pipeline, draw
from ella_kd.models import AutoencoderKL, vae, vae_strips
from ella_kd.models.seamless import seamless
from test_models_vae import CONFIGS, error, overflowing, random_vae


@pytest.fixture
def in_strips(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Every picture in strips of a few rows, every map in a file."""
    monkeypatch.setattr(vae, "WHOLE", 0)
    monkeypatch.setattr(vae_strips, "STRIP", 1 << 15)
    monkeypatch.setattr(vae_strips, "HELD", 0)
    return monkeypatch


def whole(network: AutoencoderKL, images: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    scale, shift = network._scaling(latents)[::-1]
    decoded = nn.Sequential(network.post_quant_conv, network.decoder)(latents / scale + shift)
    return nn.Sequential(network.encoder, network.quant_conv)(images).chunk(2, 1)[0], decoded


@pytest.mark.parametrize(("name", "dtype", "tolerance"), [
    *((name, torch.float64, 1e-13) for name in CONFIGS),
    ("miniature", torch.float32, 2e-5), ("miniature", torch.bfloat16, 0.1)])
def test_equals_the_whole(name: str, dtype: torch.dtype, tolerance: float, in_strips: pytest.MonkeyPatch) -> None:
    """For heights that strips do not divide, wherever the maps are and however high the strips; one is seamless."""
    network = random_vae(CONFIGS[name]).to(dtype)
    network = seamless(network) if name == "x4" else network
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 7 * network.factor, 3 * network.factor, generator=generator).to(dtype) + 1
    latents = torch.randn(2, 4, 7, 3, generator=generator).to(dtype)
    mean, decoded = whole(network, images, latents)
    for strip, held in ((1 << 15, 0), (1, 1 << 30)):
        in_strips.setattr(vae_strips, "STRIP", strip)
        in_strips.setattr(vae_strips, "HELD", held)
        assert error(network.moments(images)[0], mean) < tolerance
        assert error(network.decode(latents), decoded) < tolerance


def test_the_size_of_one_picture_decides(in_strips: pytest.MonkeyPatch) -> None:
    """Up to `WHOLE` pixels, and where gradients are wanted, the layers run as they are."""
    network, latents = random_vae(CONFIGS["miniature"]), torch.randn(3, 4, 6, 4)
    _, decoded = whole(network, torch.zeros(1, 3, 4, 4), latents)
    in_strips.setattr(vae, "WHOLE", 6 * 4 * 16)
    assert torch.equal(network.decode(latents), decoded)
    in_strips.setattr(vae, "WHOLE", 6 * 4 * 16 - 1)
    assert 0 < error(network.decode(latents), decoded) < 2e-5
    assert network.decode(latents.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not torch.equal(network.decode(latents), decoded)


def test_pictures_that_overflow_are_computed_in_float32(in_strips: pytest.MonkeyPatch) -> None:
    network, latents = overflowing(), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad(), pytest.warns(UserWarning, match="overflows in float16"):
        images = network.decode(latents)
    in_strips.setattr(vae, "WHOLE", 1 << 20)
    assert images.isfinite().all() and error(images.float(), network.decode(latents).float()) < 2e-3


def test_no_strip_is_larger_than_a_strip(in_strips: pytest.MonkeyPatch) -> None:
    """A map of 3 channels is worked out from one of 128, and in as many rows as those leave room for."""
    network, seen, silu = random_vae(CONFIGS["miniature"]), list[int](), F.silu

    def looking(x: Tensor, inplace: bool = False) -> Tensor:
        seen.append(x.numel() * x.element_size() - 4 * x.shape[1] * x.shape[3] * x.element_size())  # rows beyond
        return silu(x, inplace)

    in_strips.setattr(vae_strips, "STRIP", 1 << 17)
    in_strips.setattr(vae_strips.F, "silu", looking)
    with torch.no_grad():
        network.moments(network.decode(torch.randn(1, 4, 32, 16)))
    assert len(seen) > 50 and max(seen) <= 1 << 17


@torch.no_grad()
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_room_that_a_decode_takes_is_known(name: str, in_strips: pytest.MonkeyPatch) -> None:
    network, stores, peak = random_vae(CONFIGS[name]), weakref.WeakSet[vae_strips.Store](), [0]
    write = vae_strips.Store.write

    def looking(self: vae_strips.Store, a: int, x: Tensor) -> None:
        write(self, a, x)
        stores.add(self)
        peak[0] = max(peak[0], sum(os.fstat(store.file.fileno()).st_size for store in stores))

    in_strips.setattr(vae_strips.Store, "write", looking)
    in_strips.setattr(vae, "HELD", 0)
    network.decode(torch.randn(1, 4, 16, 8))
    assert peak[0] == pytest.approx(network.scratch(8 * network.factor, 16 * network.factor), rel=0.1)
    pipeline = replace(Pipeline.miniature(device="cpu"), vae=network)
    in_strips.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="set TMPDIR to a folder with more"):
        draw(pipeline, pipeline.encode("a"), width=64, height=64, progress=False)


@pytest.mark.slow
def test_memory() -> None:
    """2048 px within 2 GB beyond the weights: whole, 1024 px take 4."""
    said = subprocess.run([sys.executable, "-m", "benchmarks.vae", "2048"], capture_output=True, text=True, check=True)
    used = [float(line.split()[1]) for line in said.stdout.splitlines() if line.startswith(("decode", "encode"))]
    assert len(used) == 2 and max(used) < 2, said.stdout
