"""Names: diffusers' own modules and its own conversion are the judge, for every shape of network that is read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ella_kd.models.files.names import (
    ema_name,
    taken,
    text_sources,
    to_open_clip,
    unet_sources,
    unet_to_diffusers,
    unet_to_ldm,
    vae_sources,
    vae_to_diffusers,
    vae_to_ldm,
)

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"down": (CROSS,) * 3 + (PLAIN,), "layers_per_block": 2},
    "sd2": {"down": (CROSS,) * 3 + (PLAIN,), "use_linear_projection": True, "attention_head_dim": (1, 1, 2, 2)},
    "sdxl": {"down": (PLAIN, CROSS, CROSS), "transformer_layers_per_block": (1, 2, 3), "use_linear_projection": True,
             "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
             "projection_class_embeddings_input_dim": 64},
    "refiner": {"down": (PLAIN, CROSS, CROSS, PLAIN), "transformer_layers_per_block": 2, "layers_per_block": 2,
                "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 56},
    "no middle attention": {"down": (PLAIN, CROSS, CROSS), "mid_block_type": "UNetMidBlock2D",
                            "transformer_layers_per_block": [0, 1, 2],
                            "reverse_transformer_layers_per_block": [[2, 1], [1, 1], 0]},
    "x4": {"down": (PLAIN, CROSS, CROSS, CROSS), "num_class_embeds": 9, "in_channels": 7,
           "only_cross_attention": (True, True, True, False), "use_linear_projection": True},
    "lcm": {"down": (CROSS, PLAIN), "time_cond_proj_dim": 16},
    "one level": {"down": (CROSS,), "layers_per_block": 3},
}


def unet(down: tuple[str, ...], **config: Any) -> Any:
    up = tuple(each.replace("Down", "Up") for each in reversed(down))
    widths = (32, 32, 64, 64)[:len(down)]
    return UNet2DConditionModel(**{"block_out_channels": widths, "layers_per_block": 1, "down_block_types": down,
                                   "up_block_types": up, "cross_attention_dim": 16, "attention_head_dim": 4, **config})


@pytest.mark.parametrize("kind", UNETS)
def test_a_unet_of_diffusers_is_named_as_its_own_conversion_reads_it(kind: str) -> None:
    model = unet(**UNETS[kind])
    want = model.state_dict()
    sources = unet_sources({name: x.shape for name, x in want.items()})
    ldm = taken(want, sources)
    assert len(ldm) == len(want) and not any(name.startswith(("down_", "mid_", "up_")) for name in ldm)
    file = {"model.diffusion_model." + name: x for name, x in ldm.items()}
    got = convert_ldm_unet_checkpoint(file, {**model.config, "num_class_embeds": model.config.num_class_embeds})
    extra = {"time_embedding.cond_proj.weight"} & set(want)  # its conversion does not know LCM's
    assert set(got) | extra == set(want) and all(torch.equal(got[name], want[name]) for name in got)
    assert unet_to_diffusers(ldm) == {ours: source.name for ours, source in sources.items()}
    assert unet_to_diffusers(unet_to_ldm(want).values()) == {b: a for a, b in unet_to_ldm(want).items()}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("levels", [4, 3])
def test_an_autoencoder_of_diffusers_is_named_as_its_own_conversion_reads_it(levels: int, old: bool) -> None:
    model: Any = AutoencoderKL(block_out_channels=(32, 32, 64, 64)[-levels:], layers_per_block=2, norm_num_groups=32,
                               down_block_types=("DownEncoderBlock2D",) * levels,
                               up_block_types=("UpDecoderBlock2D",) * levels)
    want = given = model.state_dict()
    if old:
        spelled = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
        given = {}
        for name, x in want.items():
            for a, b in spelled.items():
                name = name.replace(a, b)
            given[name] = x
    ldm = taken(given, vae_sources({name: x.shape for name, x in given.items()}))
    assert ldm["decoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    got = convert_ldm_vae_checkpoint({"first_stage_model." + name: x for name, x in ldm.items()}, model.config)
    assert set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)
    assert {vae_to_diffusers(ldm)[b] for b in vae_to_ldm(given).values()} == set(want)
    assert set(vae_to_diffusers(ldm)) == set(ldm)


def test_both_ranks_of_an_autoencoders_attention_are_one_network() -> None:
    sources = vae_sources({"encoder.mid.attn_1.q.weight": (4, 4), "decoder.mid.attn_1.q.weight": (4, 4, 1, 1)})
    assert {source.shape for source in sources.values()} == {(4, 4, 1, 1)}


def open_clip_file() -> tuple[CLIPTextModelWithProjection, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=9, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=7, projection_dim=16))
    return model, to_open_clip({name.removeprefix("text_model."): x for name, x in model.state_dict().items()})


def test_open_clip_is_read_as_diffusers_reads_it() -> None:
    model, file = open_clip_file()
    want = {name.removeprefix("text_model."): x for name, x in model.state_dict().items()}
    prefix = "cond_stage_model.model."
    theirs = convert_open_clip_checkpoint(model, {prefix + name: x for name, x in file.items()
                                                  if name != "text_projection"}, prefix)
    theirs |= {"text_projection.weight": file["text_projection"].T}
    got = taken(file, text_sources({name: x.shape for name, x in file.items()}))
    assert set(got) == set(want) == {name.removeprefix("text_model.") for name in theirs}
    for name, x in theirs.items():
        plain = name.removeprefix("text_model.")
        assert torch.equal(got[plain], want[plain]) and torch.equal(got[plain], x)


@pytest.mark.parametrize(("spelled", "turned"), [
    ("text_projection", True), ("text_projection.weight", False), ("text_projection.weight.weight", False)])
def test_the_orientation_of_a_projection_is_told_by_its_name(spelled: str, turned: bool) -> None:
    model, file = open_clip_file()
    projection = file.pop("text_projection")
    file[spelled] = projection if turned else projection.T
    got = taken(file, text_sources({name: x.shape for name, x in file.items()}))
    assert torch.equal(got["text_projection.weight"], model.text_projection.weight)


def test_text_names_are_plain_and_buffers_are_left() -> None:
    for prefix in ("", "text_model."):
        got = text_sources({prefix + "final_layer_norm.bias": (3,), prefix + "embeddings.position_ids": (1, 7)})
        assert {ours: source.name for ours, source in got.items()} == {
            "final_layer_norm.bias": prefix + "final_layer_norm.bias"}
    with pytest.raises(ValueError, match=r"holds final_layer_norm.bias twice, as text_model.final.* and as final"):
        text_sources({"text_model.final_layer_norm.bias": (3,), "final_layer_norm.bias": (3,)})


@pytest.mark.parametrize("translate", [unet_to_ldm, unet_to_diffusers, vae_to_ldm, vae_to_diffusers])
def test_what_no_table_knows_stays(translate: Callable[[list[str]], dict[str, str]]) -> None:
    odd = ["", ".", "up_blocks.9.foo", "input_blocks.999.0.op." + "x." * 9,
           "down_blocks." + "9" * 5000 + ".attentions.0.x",
           "input_blocks.x.0.op.weight", "conv_in"]
    assert translate(odd) == {name: name for name in odd}


def test_moving_averages_lose_their_dots() -> None:
    assert ema_name("input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"
