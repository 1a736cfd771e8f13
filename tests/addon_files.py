"""Small add-ons in files, for the tiny system, and pictures drawn with them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ella_kd import Pipeline, generate
from ella_kd.models import UNet
from ella_kd.models.addons.controlnet import ControlNet
from tiny import randomised

PROMPT = "a red circle"
LORA = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_lora(path: Path, sides: dict[str, int] | None = None, seed: int = 0, **metadata: Any) -> Path:
    """Of the tiny system's UNet and text encoder, or of the modules that are given, square ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sides = sides or {LORA: 32, TEXT: 64}
    tensors = {f"{name}.{end}.weight": noise(*((2, n) if end == "lora_down" else (n, 2)), seed=seed + i)
               for i, (name, n) in enumerate(sides.items()) for end in ("lora_down", "lora_up")}
    save_file(tensors, path, metadata or None)
    return path


def write_files(folder: Path, pipeline: Pipeline) -> None:
    """A LoRA, an embedding, a ControlNet and a picture of edges in a folder."""
    write_lora(folder / "style.safetensors")
    save_file({"emb_params": noise(2, 64)}, folder / "zz.safetensors")
    assert isinstance(pipeline.unet, UNet)
    net = ControlNet.of(pipeline.unet)
    randomised(net.zero_convs, 0, 0.5)
    randomised(net.middle_block_out, 1, 0.5)
    randomised(net.input_hint_block, 2, 0.2)
    net.save(folder / "edges.safetensors")
    Image.fromarray((np.arange(24 * 24 * 3) % 256).reshape(24, 24, 3).astype(np.uint8)).save(folder / "room.png")


def draw(pipeline: Pipeline, prompts: Any = PROMPT, **options: Any) -> list[bytes]:
    options = {"seeds": 1, "steps": 2, "mode": "clip", "progress": False, **options}
    return [picture.image.tobytes() for picture in generate(pipeline, prompts, **options)]
