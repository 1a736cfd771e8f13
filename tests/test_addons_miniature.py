"""What add-ons are for, on the bundled miniature: each was trained by `benchmarks.miniature.addons`, and its pictures are
read back from their pixels."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

import studio
from benchmarks import addons
from benchmarks.miniature import captions
from benchmarks.miniature.addons import BUNDLED
from benchmarks.miniature.scenes import Scene, parse

COUNT = 9
LORAS = {name: BUNDLED / f"{name}.safetensors" for name in ("striped", "azure")}


def styled(loras: dict[str, float], sampler: str = "dpmpp_2m") -> tuple[list[Scene], list[np.ndarray]]:
    """What prompts of all colours and fills ask for, and the pictures with these LoRAs, ELLA's."""
    wanted = addons.held_out(COUNT)
    sd = studio.miniature().with_lora([(LORAS[name], weight) for name, weight in loras.items()])
    return wanted, addons.drawn(sd, sd.encode(addons.written(wanted, captions.dense)), COUNT, sampler)


def stripes(wanted: Sequence[Scene], pictures: Sequence[np.ndarray]) -> float:
    """Of all things: 0 none, 1 as rendered."""
    return addons.look(wanted, pictures).stripes
