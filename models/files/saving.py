"""Writing a system: an LDM single file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ella_kd.models.files.building import plain
from ella_kd.models.files.layout import CLIP, TABLE, UNET, VAE
from ella_kd.models.files.metadata import CONFIG
from ella_kd.models.files.schedule import PREDICT_KEY, PREDICTION
from ella_kd.models.files.weights import write_tensors
from ella_kd.models.noise_schedule import NoiseSchedule
from ella_kd.models.unet import UNet
from ella_kd.models.vae import AutoencoderKL

if TYPE_CHECKING:
    from transformers import CLIPTextModel


def save_checkpoint(path: str | Path, unet: UNet, vae: AutoencoderKL, text_model: "CLIPTextModel",
                    metadata: Mapping[str, str] | None = None, *, noise_schedule: NoiseSchedule | None = None,
                    dtype: torch.dtype | None = None) -> None:
    """Write a Stable Diffusion 1.x single file as `load_checkpoint` reads it; what shapes do not say is metadata.

    dtype None: the parameters' own. The file appears whole or not at all.
    """
    schedule = noise_schedule or NoiseSchedule.sd15()
    tensors = {UNET + name: x for name, x in unet.state_dict().items()}
    tensors |= {VAE + name: x for name, x in vae.state_dict().items()}
    tensors |= {CLIP + "text_model." + plain(name): x for name, x in text_model.state_dict().items()
                if not name.endswith("position_ids")}
    if dtype is not None:
        tensors = {name: x.to(dtype) for name, x in tensors.items()}
    tensors[TABLE] = schedule.alphas_cumprod.float()
    config = {"num_heads": unet.config.num_heads, "head_dim": unet.config.head_dim, "scale": vae.config.scale}
    said = "epsilon" if schedule.prediction == "eps" else "v"
    write_tensors(path, tensors, {PREDICTION: said, PREDICT_KEY: said, CONFIG: json.dumps(config), **(metadata or {})})
