"""Whole systems of every kind, tiny and random: diffusers' own networks, as files in LDM's layout and as folders."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ella_kd.models.files.names import to_open_clip, unet_to_ldm, vae_to_ldm
from tiny import randomised

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
HF, OPEN = "transformer.text_model.", "model."
SECOND_HAND: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}


@dataclass(frozen=True)
class Recipe:
    """How a kind is made small. texts: the prefixes of its text encoders in LDM's layout."""

    what: str
    unet: dict[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] = ("cond_stage_model." + HF,)
    levels: int = 4  # of the autoencoder
    scale: float = 0.18215
    prediction: str = "epsilon"
    markers: tuple[str, ...] = ()


SD2: dict[str, Any] = {"use_linear_projection": True, "block_out_channels": (64, 128), "attention_head_dim": (1, 2)}
XL: dict[str, Any] = {**SD2, **SECOND_HAND, "down": (PLAIN, CROSS, CROSS), "block_out_channels": (64, 64, 128),
                      "attention_head_dim": (1, 1, 2), "transformer_layers_per_block": (1, 2, 3),
                      "projection_class_embeddings_input_dim": 64 + 6 * 256, "cross_attention_dim": 64 + 128}
XL_TEXTS = ("conditioner.embedders.0." + HF, "conditioner.embedders.1." + OPEN)
SD2_TEXT = ("cond_stage_model." + OPEN,)
RECIPES = {
    "sd1": Recipe("a Stable Diffusion 1.x checkpoint"),
    "sd1 inpainting": Recipe("a Stable Diffusion 1.x inpainting checkpoint", {"in_channels": 9}),
    "sd1 pix2pix": Recipe("a Stable Diffusion 1.x InstructPix2Pix checkpoint", {"in_channels": 8}),
    "lcm": Recipe("a Stable Diffusion 1.x LCM checkpoint", {"time_cond_proj_dim": 256}),
    "sd2": Recipe("a Stable Diffusion 2.x checkpoint", SD2, SD2_TEXT),
    "sd2 v": Recipe("a Stable Diffusion 2.x checkpoint", SD2, SD2_TEXT, prediction="v_prediction"),
    "sd2 depth": Recipe("a Stable Diffusion 2.x depth checkpoint", {**SD2, "in_channels": 5}, SD2_TEXT),
    "x4": Recipe("a Stable Diffusion 2.x x4 upscaler checkpoint",
                 {**SD2, "in_channels": 7, "num_class_embeds": 9, "down": (PLAIN, CROSS, CROSS),
                  "block_out_channels": (64, 64, 128), "attention_head_dim": 8, "cross_attention_dim": 48,
                  "only_cross_attention": (True, True, False)}, (), 3, 0.08333, "v_prediction"),
    "sdxl": Recipe("an SDXL checkpoint", XL, XL_TEXTS, scale=0.13025),
    "sdxl inpainting": Recipe("an SDXL inpainting checkpoint", {**XL, "in_channels": 9}, XL_TEXTS, scale=0.13025),
    "sdxl v": Recipe("an SDXL checkpoint", XL, XL_TEXTS, scale=0.13025, prediction="v_prediction",
                     markers=("v_pred", "ztsnr")),
    "refiner": Recipe("an SDXL refiner checkpoint",
                      {**XL, "down": (PLAIN, CROSS, CROSS, PLAIN), "block_out_channels": (64, 64, 128, 128),
                       "attention_head_dim": (1, 1, 2, 2), "transformer_layers_per_block": 2,
                       "projection_class_embeddings_input_dim": 64 + 5 * 256, "cross_attention_dim": 128},
                      ("conditioner.embedders.0." + OPEN,), scale=0.13025),
    "vega": Recipe("a Segmind Vega checkpoint",
                   {**XL, "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [0, 1, 2],
                    "layers_per_block": 2, "reverse_transformer_layers_per_block": [[2, 1, 1], [1, 1, 2], 0]},
                   XL_TEXTS, scale=0.13025),
    "playground": Recipe("a Playground v2.5 checkpoint", XL, XL_TEXTS, scale=0.5, markers=("edm_mean", "edm_std")),
}


@dataclass(frozen=True, eq=False)
class System:
    """A kind's networks, diffusers' and transformers'."""

    recipe: Recipe
    unet: Any
    vae: Any
    texts: tuple[Any, ...]

    def ldm(self) -> dict[str, Tensor]:
        """The tensors as a single file has them, markers included."""
        unet, vae = self.unet.state_dict(), self.vae.state_dict()
        found = {"model.diffusion_model." + name.replace("embed.cond_proj", "embedding.cond_proj"): unet[theirs]
                 for theirs, name in unet_to_ldm(unet).items()}
        found |= {"first_stage_model." + name: vae[theirs][..., None, None]
                  if ".mid.attn_1." in name and vae[theirs].ndim == 2 else vae[theirs]
                  for theirs, name in vae_to_ldm(vae).items()}
        for prefix, model in zip(self.recipe.texts, self.texts):
            plain = {name.removeprefix("text_model."): x for name, x in model.state_dict().items()}
            spelled = plain if "transformer" in prefix else to_open_clip(plain)
            found |= {prefix + name: x for name, x in spelled.items()}
        values = {"edm_mean": [[[[-1.6574]], [[1.886]], [[-1.383]], [[2.5155]]]],
                  "edm_std": [[[[8.4927]], [[5.9022]], [[6.5498]], [[5.2299]]]]}
        return found | {name: torch.tensor(values.get(name, [])) for name in self.recipe.markers}

    def save_file(self, path: Path, metadata: dict[str, str] | None = None) -> Path:
        save_file({name: x.clone() for name, x in self.ldm().items()}, path, metadata)
        return path

    def save_folder(self, folder: Path, **scheduler: Any) -> Path:
        """As diffusers writes it, without tokenizers."""
        self.unet.save_pretrained(folder / "unet")
        self.vae.save_pretrained(folder / "vae")
        lonely = len(self.texts) == 1 and self.recipe.texts[0].startswith("conditioner")
        for i, model in enumerate(self.texts, 1 + lonely):
            model.save_pretrained(folder / f"text_encoder{'_2' if i == 2 else ''}")
        (folder / "scheduler").mkdir()
        config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                  "num_train_timesteps": 1000, "prediction_type": self.recipe.prediction, **scheduler}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        (folder / "model_index.json").write_text("{}")
        return folder


def system(kind: str, seed: int = 0) -> System:
    recipe = RECIPES[kind]
    torch.manual_seed(seed)
    unet = recipe.unet.copy()
    down = unet.pop("down", (CROSS, PLAIN))
    network = UNet2DConditionModel(**{
        "block_out_channels": (32, 64, 64, 64)[:len(down)], "layers_per_block": 1, "down_block_types": down,
        "up_block_types": tuple(each.replace("Down", "Up") for each in reversed(down)), "cross_attention_dim": 64,
        "attention_head_dim": 8, "sample_size": 8, **unet})
    channels = (32, 32, 32, 64)[-recipe.levels:]
    vae = AutoencoderKL(block_out_channels=channels, layers_per_block=1, norm_num_groups=32,
                        down_block_types=("DownEncoderBlock2D",) * len(channels),
                        up_block_types=("UpDecoderBlock2D",) * len(channels), scaling_factor=recipe.scale,
                        latent_channels=4, sample_size=64)
    texts = tuple(_text("transformer" not in prefix, "conditioner" in prefix) for prefix in recipe.texts)
    models = [randomised(cast(nn.Module, model), seed + i, 0.1).eval()
              for i, model in enumerate([network, vae, *texts])]
    return System(recipe, models[0], models[1], tuple(models[2:]))


def _text(open_clip: bool, projected: bool) -> nn.Module:
    width = 128 if open_clip and projected else 64  # diffusers tells SDXL's two by their widths
    config = CLIPTextConfig(
        vocab_size=99, hidden_size=width, intermediate_size=96, num_hidden_layers=3, num_attention_heads=width // 64,
        max_position_embeddings=77, projection_dim=64, hidden_act="gelu" if open_clip else "quick_gelu",
        bos_token_id=97, eos_token_id=98, pad_token_id=0 if open_clip else 98)
    return CLIPTextModelWithProjection(config) if open_clip and projected else CLIPTextModel(config)


def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """99 tokens, of letters, as CLIP's are numbered: the first is "!", the last two begin and end a text."""
    letters = ["!", *(chr(97 + i % 26) + "x" * (i // 26) for i in range(1, 96))]
    vocabulary = {**{letter: i for i, letter in enumerate(letters)}, "a</w>": 96, "<|startoftext|>": 97,
                  "<|endoftext|>": 98}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad)
