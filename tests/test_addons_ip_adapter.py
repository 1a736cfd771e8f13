"""IP-Adapter against diffusers' own, base, plus and full: tokens of pictures and of none, and the UNet with them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.speed.ways import as_diffusers
from ella_kd.models import UNet, UNetConfig, fast_on_cpu
from ella_kd.models.addons.image_encoder import ImageEncoder, normalised
from ella_kd.models.addons.ip_adapter import FullProjection, IPAdapter, Projection, Resampler
from ella_kd.models.addons.preprocessing import pixels
from ella_kd.models.context import Context
from ella_kd.models.image_prompts import ImagePrompt
from tiny import randomised, relative

HIDDEN, EMBEDDING, WIDTH = 128, 48, 64
CONFIGS = {"sd1": UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, depth=(1, 1),
                             context_dim=WIDTH, num_heads=2),
           "sdxl": UNetConfig(model_channels=64, channel_mult=(1, 1, 2), num_res_blocks=1, depth=(0, 1, 2),
                              context_dim=WIDTH, num_heads=None, head_dim=64, linear_proj=True, middle_depth=2)}
KINDS: dict[str, Any] = {"base": lambda: Projection(EMBEDDING, WIDTH, 4), "full": lambda: FullProjection(HIDDEN, WIDTH),
                         "plus": lambda: Resampler(HIDDEN, 64, WIDTH, 16, 4, 128, 256)}


def vision() -> Any:
    torch.manual_seed(0)
    model: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=28,
        patch_size=14, projection_dim=EMBEDDING, hidden_act="gelu"))
    return randomised(model, 3, 0.1).eval()


def made(kind: str, config: UNetConfig) -> IPAdapter:
    unet = UNet(config)
    widths = [block.attn2.to_k.weight.shape[0] for block in unet.cross_attentions]
    return randomised(IPAdapter(KINDS[kind](), WIDTH, widths), 4, 0.3)


def nested(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {part: {name.removeprefix(f"{part}."): x.clone() for name, x in tensors.items() if name.startswith(part)}
            for part in ("image_proj", "ip_adapter")}


def photo(seed: int, size: tuple[int, int] = (40, 56)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_diffusers(kind: str, config: str, tmp_path: Path) -> None:
    weights = made(kind, CONFIGS[config]).state_dict()
    save_file({name: x.clone() for name, x in weights.items()}, tmp_path / "ip.safetensors")
    torch.save(nested(weights), tmp_path / "ip.bin")
    vision().save_pretrained(tmp_path / "encoder")
    first = IPAdapter.load(tmp_path / "ip.safetensors", image_encoder=tmp_path / "encoder")
    ours = IPAdapter.load(tmp_path / "ip.bin", image_encoder=vision())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), ours.parameters(), strict=True))
    unet = randomised(UNet(CONFIGS[config]), 5, 0.2)
    twin = as_diffusers(unet)
    twin._load_ip_adapter_weights([nested(weights)])
    for processor in twin.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.6]
    pictures = [photo(1), photo(2, (70, 30))]
    seen = torch.cat([normalised(pixels(picture)[0], 28) for picture in pictures])
    said = vision()(seen, output_hidden_states=True)
    embeds = said.image_embeds if kind == "base" else said.hidden_states[-2]
    x, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([700.0, 3.0]), torch.randn(2, 5, WIDTH)
    want = twin(x, t, tokens, added_cond_kwargs={"image_embeds": [embeds[None].expand(2, *[-1] * (embeds.ndim))]})
    two = ours.tokens(pictures)
    images = ImagePrompt(rows=(0, 1), adapter=ours, tokens=(two, two), strengths=(0.6, 0.6))
    got = unet(x, t, Context(tokens, images=(images,)))
    assert relative(got, want.sample) < 1e-5
    plain = unet(x, t, Context(tokens))
    assert relative(got, plain) > 1e-3
    one = ImagePrompt(rows=(1,), adapter=ours, tokens=(two,), strengths=(0.6,))
    for network in (unet, fast_on_cpu(unet)):
        some = network(x, t, Context(tokens, images=(one,)))
        assert relative(some[:1], plain[:1]) < 1e-5 and relative(some[1:], got[1:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_pictures_and_no_picture_are_diffusers(kind: str, tmp_path: Path) -> None:
    """CLIP's preprocessing, and what the uncond sees: zeros, or the hidden states of a zero picture."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pipe: Any = SimpleNamespace(image_encoder=vision(), feature_extractor=processor)
    whole = kind != "base"
    ours = made(kind, CONFIGS["sd1"])
    save_file({name: x.clone() for name, x in vision().state_dict().items()}, tmp_path / "encoder.safetensors")
    config = json.dumps(vision().config.to_dict())
    (tmp_path / "config.json").write_text(config)
    ours.encoder = ImageEncoder.load(tmp_path / "encoder.safetensors", dtype=torch.float32, device=torch.device("cpu"))
    picture = photo(1)
    want = StableDiffusionPipeline.encode_image(pipe, picture, "cpu", 1, True if whole else None)
    for given, embeds in zip(([picture], None), want):
        tokens = ours.image_proj(embeds).flatten(0, 1)
        assert relative(ours.tokens(given), tokens) < 1e-5
    assert relative(ours.tokens(None), ours.tokens([picture])) > 0.01


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    ours = made("base", CONFIGS["sd1"])
    weights = {name: x.clone() for name, x in ours.state_dict().items()}
    save_file({**weights, "ip_adapter.0.to_q_lora.down.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(ValueError, match="is an IP-Adapter FaceID, which needs insightface"):
        IPAdapter.load(path, image_encoder=vision())
    save_file({name: x for name, x in weights.items() if "image_proj.norm.bias" not in name}, path)
    with pytest.raises(ValueError, match=r"missing: image_proj\.norm\.bias"):
        IPAdapter.load(path, image_encoder=vision())
    save_file({"body.0.block1.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not an IP-Adapter, it looks like a T2I-Adapter"):
        IPAdapter.load(path, image_encoder=vision())
    save_file(made("plus", CONFIGS["sd1"]).state_dict(), path)
    wide: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=64, num_hidden_layers=1, image_size=28,
                                                               num_attention_heads=2, patch_size=14))
    with pytest.raises(ValueError, match="reads 128 numbers of an image encoder and this one gives 64"):
        IPAdapter.load(path, image_encoder=wide)
    with pytest.raises(ValueError, match="is not a CLIP image encoder"):
        IPAdapter.load(path, image_encoder=path)
    unet = UNet(CONFIGS["sdxl"])
    prompt = ImagePrompt(rows=(0,), adapter=ours, tokens=(torch.zeros(4, WIDTH),), strengths=(1.0,))
    with pytest.raises(ValueError, match=r"has keys for \d cross-attentions, .* and this UNet has"):
        unet(torch.zeros(1, 4, 8, 8), torch.ones(1), Context(torch.zeros(1, 3, WIDTH), images=(prompt,)))
