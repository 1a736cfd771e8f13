"""A small checkpoint of ours, on disk and changed: what the tests of files share."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ella_kd.models import AutoencoderKL, UNet, UNetConfig, VAEConfig

DATA = Path(__file__).parent / "data"
UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
Networks = tuple[UNet, AutoencoderKL, CLIPTextModel]
Tensors = dict[str, Tensor]
Edit = Callable[..., Path]


def small_networks() -> Networks:
    torch.manual_seed(0)
    unet = UNet(UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, depth=(0, 1),
                           context_dim=128, num_heads=4))
    vae = AutoencoderKL(VAEConfig(channels=32, channel_mult=(1, 1, 2), num_res_blocks=1, scale=0.5))
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=9, hidden_size=128, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=2, max_position_embeddings=6, bos_token_id=1,
                                        eos_token_id=2)).eval()
    for model in (unet, vae, clip):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return unet, vae, clip


def editor(source: Path, target: Path) -> Edit:
    """`edit(change, **metadata)`: the source file with its tensors, and perhaps its metadata, changed."""
    def edit(change: Callable[[Tensors], Tensors | None], **metadata: str) -> Path:
        tensors = load_file(source)
        with safe_open(source, "pt") as file:
            told = {name: text for name, text in (file.metadata() | metadata).items() if text}
        save_file(change(tensors) or tensors, target, told)
        return target
    return edit


def same(a: torch.nn.Module | None, b: torch.nn.Module | None) -> bool:
    assert a is not None and b is not None
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
