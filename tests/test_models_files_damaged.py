"""Files damaged at random load or are errors that name them: nothing hangs, nothing grows."""

import json
import resource
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from ella_kd.models import TSC, AutoencoderKL, UNet, UNetConfig, VAEConfig, load_checkpoint, load_tsc, save_checkpoint
from tiny import randomised


def tiny_file(path: Path) -> bytes:
    """The smallest checkpoint there is, and its bytes."""
    unet = randomised(UNet(UNetConfig(4, 4, 32, (1,), 1, (1,), 8, 1)), 0)
    vae = randomised(AutoencoderKL(VAEConfig(channels=32, channel_mult=(1,), num_res_blocks=1)), 1)
    save_checkpoint(path, unet, vae)
    return path.read_bytes()


def mutated(whole: bytes, random: Random) -> bytes:
    """The file with one thing wrong: cut, bits of its header flipped, or a name, shape, dtype or offset changed."""
    size = int.from_bytes(whole[:8], "little")
    how = random.randrange(4)
    if how == 0:
        return whole[:random.randrange(len(whole)) if random.random() < 0.5 else random.randrange(size + 8)]
    if how == 1:
        damaged = bytearray(whole)
        for _ in range(random.randint(1, 3)):
            damaged[random.randrange(size + 8)] ^= 1 << random.randrange(8)
        return bytes(damaged)
    header = json.loads(whole[8:8 + size])
    name = random.choice([name for name in header if name != "__metadata__"])
    entry = header.pop(name)
    odd: list[Any] = [-1, 0, 1, 2**31, 2**63, 2**64, 1.5, None, "x", [], {}, True, "9" * 5000]
    if how == 2:
        field = random.choice(["dtype", "shape", "data_offsets"])
        change = random.choice([*odd, "F16", "I64", "F8_E4M3", [10**9, 10**9], [0], [1] * 2000, [8, 8]])
        entry = {**entry, field: change}
    else:
        cut = random.randrange(len(name))
        name = random.choice([name[:cut], name[:cut] + "." + name[cut:], name[:cut] + "9" + name[cut + 1:], "",
                              name.replace("input", "output"), "." * 2000, name + "\0", "\ud800"])
    header[name] = entry
    if random.random() < 0.2:
        header["__metadata__"] = random.choice([*odd, {"a": 1}, {"ella_kd": "[]"}, {"ella_kd": "[" * 9999},
                                                {"modelspec.prediction_type": "x"}, {"modelspec.resolution": "9" * 99}])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + size:]


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_load_or_are_errors_that_name_them(count: int, tmp_path: Path) -> None:
    """Nothing hangs and nothing grows; nobody can tell a weight that was changed."""
    path = tmp_path / "x.safetensors"
    whole, random = tiny_file(path), Random(0)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    told: Counter[str] = Counter()
    for _ in range(count):
        path.write_bytes(mutated(whole, random))
        try:
            load_checkpoint(path, prediction="eps")
        except ValueError as error:
            told["refused" if str(path) in str(error) else f"without its name: {error}"[:200]] += 1
        else:
            told["loaded"] += 1
    assert set(told) == {"refused", "loaded"} and told["refused"] > 0.75 * count, told
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB"
    assert time.process_time() - start < 100


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle_loads_or_is_an_error_that_names_it(tmp_path: Path, zipped: bool) -> None:
    """Cut anywhere, and bits flipped anywhere."""
    tsc = TSC(time_channel=8, time_embed_dim=8, width=8, layers=1, heads=2, num_latents=2, input_dim=4)
    path = tmp_path / "x.ckpt"
    torch.save(randomised(tsc, 0).state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole, random = path.read_bytes(), Random(0)
    named = 0
    for i in range(100):
        damaged = bytearray(whole[:random.randrange(len(whole))] if i % 3 == 0 else whole)
        for _ in range(i % 4 if damaged else 0):
            damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        try:
            load_tsc(path)
        except ValueError as error:
            named += str(path) in str(error)
        else:
            named += 1
    assert named == 100
