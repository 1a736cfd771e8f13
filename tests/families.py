"""Tiny pipelines of Stable Diffusion 2, SDXL and its refiner: ours, and diffusers' on the same tensors."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from benchmarks.speed.ways import as_diffusers
from ella_kd import Pipeline
from ella_kd.models import (
    TSC,
    AutoencoderKL,
    CLIPTextEncoder,
    NoiseSchedule,
    T5TextEncoder,
    TwoTextEncoders,
    UNet,
    UNetConfig,
    VAEConfig,
)
from tiny import randomised

LENGTH, WIDTH, POOLED = 24, 64, 48
BOS, EOS = 512, 513
WAYS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def byte_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer without a merge, one token per byte: "!" is 0 inside a word and 256 at its end, as in CLIP's."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], pad_token=pad,
                         model_max_length=LENGTH)


def text_model(projected: bool, layers: int = 3, seed: int = 0) -> Any:
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=POOLED, hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0)
    return randomised((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed, 0.3).eval()


@dataclass(frozen=True, eq=False)
class Family:
    """A pipeline of ours, and what makes diffusers' own of the same networks."""

    ours: Pipeline
    texts: tuple[nn.Module, ...]

    def theirs(self, kind: type, **more: Any) -> Any:
        """diffusers' pipeline of a kind, with its Euler scheduler."""
        vae = self.ours.vae.config
        levels = len(vae.channel_mult)
        twin: Any = diffusers.AutoencoderKL(
            block_out_channels=[mult * vae.channels for mult in vae.channel_mult], layers_per_block=vae.num_res_blocks,
            down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
        weights = {f"first_stage_model.{name}": x for name, x in self.ours.vae.state_dict().items()}
        twin.load_state_dict(convert_ldm_vae_checkpoint(weights, twin.config))
        prediction = {"eps": "epsilon", "v": "v_prediction"}[self.ours.noise_schedule.prediction]
        scheduler = diffusers.EulerDiscreteScheduler(**WAYS, prediction_type=prediction, timestep_spacing="trailing")
        pipe = kind(vae=twin, unet=as_diffusers(self.ours.unet), scheduler=scheduler, **more)  # type: ignore[arg-type]
        pipe.set_progress_bar_config(disable=True)
        return pipe


def autoencoder() -> AutoencoderKL:
    return randomised(AutoencoderKL(VAEConfig(channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1)), 5, 0.1)


def unet(depth: tuple[int, ...], context: int, vector: int | None) -> UNet:
    return randomised(UNet(UNetConfig(
        model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, depth=depth, context_dim=context, num_heads=None,
        head_dim=16, linear_proj=True, middle_depth=depth[-1], vector_dim=vector)), 0, 0.1)


def ella(width: int) -> dict[str, Any]:
    """A connector of this width and its T5, on the same tokenizer."""
    t5 = T5EncoderModel(T5Config(vocab_size=514, d_model=32, d_kv=16, num_heads=2, d_ff=32, num_layers=1))
    tokenizer = byte_tokenizer()
    return {"tsc": randomised(TSC(32, 32, width, 1, 2, 4, 32), 1), "t5": T5TextEncoder(t5.eval(), tokenizer)}


@cache
def family(name: str) -> Family:
    """sd2, sdxl or refiner; SDXL has a connector too."""
    bang = byte_tokenizer("!")
    if name == "sd2":
        text = text_model(False, 2)
        sd = Pipeline(unet((1, 1, 2), WIDTH, None), autoencoder(), NoiseSchedule.sd2_v(),
                      CLIPTextEncoder.sd2(text, bang), size=64)
        return Family(sd, (text,))
    big_g = text_model(True, seed=3)
    if name == "refiner":
        sd = Pipeline(unet((0, 2, 2), WIDTH, POOLED + 5 * 256), autoencoder(), NoiseSchedule.sd15(),
                      CLIPTextEncoder.big_g(big_g, bang), size=64)
        return Family(sd, (big_g,))
    clip_l = text_model(False)
    sd = Pipeline(unet((0, 1, 2), 2 * WIDTH, POOLED + 6 * 256), autoencoder(), NoiseSchedule.sd15(),
                  TwoTextEncoders.sdxl(clip_l, big_g, byte_tokenizer(), bang), size=64, **ella(2 * WIDTH))
    return Family(sd, (clip_l, big_g))
