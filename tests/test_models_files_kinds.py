"""What a file is, told before any weight is read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ella_kd.models import TSC, load_checkpoint, load_tsc, save_tsc
from ella_kd.models.files.kinds import kind_of_path
from filing import CLIP, UNET, VAE
from systems import RECIPES, system


@pytest.mark.parametrize("kind", RECIPES)
def test_every_kind_is_told_in_both_layouts(kind: str, tmp_path: Path) -> None:
    made = system(kind)
    file = kind_of_path(made.save_file(tmp_path / "x.safetensors"))
    if "text" in file.parts:
        assert str(file).startswith(made.recipe.what + ": its place is checkpoint, --checkpoint")
    assert file.what.startswith(made.recipe.what) and file.read
    folder = kind_of_path(made.save_folder(tmp_path / "folder"))
    if kind != "playground":  # whose folder tells by its configuration only
        assert folder == file
    alone = kind_of_path(tmp_path / "folder" / "unet")
    if kind != "playground":
        assert alone.what == f"the UNet of {made.recipe.what} alone" and alone.read
    assert kind_of_path(tmp_path / "folder" / "vae").place == "vae"


@pytest.mark.parametrize(("names", "says"), [
    (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "a LoRA"),
    (["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"], "a LoRA"),
    (["lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"], "a LoRA"),
    (["unet.down_blocks.0.attentions.0.processor.to_q_lora.down.weight"], "a LoRA"),
    (["lora_controlnet", "input_hint_block.0.weight"], "a Control-LoRA"),
    (["control_model.input_hint_block.0.weight", "control_model.input_blocks.0.0.weight"], "a ControlNet"),
    (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "a ControlNet"),
    (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
    (["conv_in.weight", "body.0.block1.weight"], "a T2I-Adapter"),
    (["down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"], "a motion module"),
    (["emb_params"], "a textual-inversion embedding"), (["<cat>"], "a textual-inversion embedding"),
    (["cond_stage_model.roberta.embeddings.word_embeddings.weight", UNET + "out.2.bias"], "an AltDiffusion checkpoint"),
    (["encoder_hid_proj.weight", "down_blocks.0.resnets.0.conv1.weight"], "Kolors, whose text encoder is not read"),
    (["double_blocks.0.img_attn.proj.bias"], "a Flux or SD3 model"),
    ([UNET + "joint_blocks.0.context_block.attn.qkv.bias"], "a Flux or SD3 model"),
    (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5: its place is t5"),
    (["encoder.down_blocks.0.resnets.0.conv1.weight"], r"an autoencoder \(VAE\) alone: its place is vae, --vae"),
    (["encoder.conv_in.weight", "decoder.conv_in.weight"], r"an autoencoder \(VAE\) alone: its place is vae, --vae"),
    (["text_model.encoder.layers.0.self_attn.k_proj.bias"], "a text encoder alone: its place is text_encoder"),
    (["transformer.resblocks.0.ln_1.bias"], "a text encoder alone: its place is text_encoder"),
    (["vision_model.post_layernorm.bias"], "a CLIP image encoder"),
    ([VAE + "encoder.conv_in.weight", CLIP + "final_layer_norm.bias"], "a checkpoint without its UNet"),
])
def test_a_file_of_another_kind_is_told_by_name(tmp_path: Path, names: list[str], says: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path)
    for load in (load_checkpoint, load_tsc):
        with pytest.raises(ValueError, match=rf"x\.safetensors is not what this loads, it looks like {says}"):
            load(path)


def test_each_of_the_two_kinds_is_told_in_the_others_place(saved: Path, tmp_path: Path) -> None:
    save_tsc(tmp_path / "tsc.safetensors", TSC(32, 32, 32, 1, 2, 4, 8))
    with pytest.raises(ValueError, match=r"it looks like ELLA's connector \(TSC\): its place is tsc"):
        load_checkpoint(tmp_path / "tsc.safetensors")
    with pytest.raises(ValueError, match=r"it looks like a Stable Diffusion 1.x checkpoint: its place is checkpoint"):
        load_tsc(saved)
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}, "name": "x"}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="it looks like a textual-inversion embedding"):
        load_checkpoint(tmp_path / "x.pt")


def test_ic_lights_offsets_are_told_from_a_network(tmp_path: Path) -> None:
    made = system("sd1 pix2pix")
    tensors = {name: x.clone() for name, x in made.unet.state_dict().items()}
    tensors["conv_norm_out.weight"] += 1
    save_file(tensors, tmp_path / "net.safetensors")
    assert kind_of_path(tmp_path / "net.safetensors").purpose == "InstructPix2Pix"
    tensors["conv_norm_out.weight"] -= 1
    save_file(tensors, tmp_path / "fc.safetensors")
    with pytest.raises(ValueError, match=r"IC-Light's offsets, which are added to a Stable Diffusion 1.x UNet"):
        load_checkpoint(tmp_path / "fc.safetensors")


def test_nobody_knows_everything(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert kind_of_path(tmp_path / "x.safetensors").what == ""
    with pytest.raises(ValueError, match=r"x.safetensors is not what this loads: expected a UNet"):
        load_checkpoint(tmp_path / "x.safetensors")
