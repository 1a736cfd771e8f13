"""A small Stable Diffusion checkpoint written and read, and the real one's names and size."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ella_kd import Pipeline
from ella_kd.models import NoiseSchedule, UNetConfig, VAEConfig, load_checkpoint, save_checkpoint
from ella_kd.models.files.checkpoint import text_of
from ella_kd.models.files.kinds import kind_of
from ella_kd.models.files.layout import parts_of
from ella_kd.models.files.weights import Weights
from filing import CLIP, DATA, VAE, Edit, Networks, same


def test_a_whole_checkpoint_comes_back(networks: Networks, saved: Path) -> None:
    unet, vae, clip = networks
    loaded = load_checkpoint(saved)
    assert (loaded.unet.config, loaded.vae.config) == (unet.config, vae.config)
    assert all(map(same, networks, (loaded.unet, loaded.vae, loaded.text_model)))
    assert torch.equal(loaded.noise_schedule.sigmas, NoiseSchedule.sd15().sigmas) and loaded.text_model
    assert loaded.noise_schedule.prediction == "eps"
    ids = torch.tensor([[1, 5, 2, 0, 0, 0]])
    with torch.no_grad():
        assert torch.equal(loaded.text_model(ids).last_hidden_state, clip(ids).last_hidden_state)
    for model in (loaded.unet, loaded.vae, loaded.text_model):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(b.is_meta for b in model.buffers())


def test_the_file_has_the_real_layout(saved: Path, networks: Networks) -> None:
    real = json.loads((DATA / "sd15_ldm_keys.json").read_text())
    with safe_open(saved, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert {name for name in names if name.startswith(CLIP)} <= set(real)
    tops = {"model", "first_stage_model", "cond_stage_model", "alphas_cumprod"}
    assert {name.split(".")[0] for name in names} == tops
    assert metadata["title"] == "small"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert [p.name for p in saved.parent.iterdir()] == ["sd.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtypes_on_disk_and_in_memory_are_independent(networks: Networks, tmp_path: Path, dtype: torch.dtype) -> None:
    save_checkpoint(tmp_path / "x.safetensors", *networks, dtype=dtype)
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors.pop("alphas_cumprod").dtype == torch.float32
    assert {x.dtype for x in tensors.values()} == {dtype}
    loaded = load_checkpoint(tmp_path / "x.safetensors")
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.float32}
    got, want = loaded.vae.quant_conv.weight, networks[1].quant_conv.weight
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-4)
    half = load_checkpoint(tmp_path / "x.safetensors", dtype=torch.bfloat16)
    assert half.text_model
    for model in (half.unet, half.vae, half.text_model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_of_tensors_loads(networks: Networks, saved: Path, tmp_path: Path, wrapped: bool) -> None:
    """As SD1.x .ckpt files are; a pickle has no metadata, so what shapes do not say is SD1.x's: 8 heads, .18215."""
    tensors = load_file(saved)
    torch.save({"state_dict": tensors, "global_step": 5} if wrapped else tensors, tmp_path / "sd.ckpt")
    loaded = load_checkpoint(tmp_path / "sd.ckpt")
    assert same(loaded.unet, networks[0])
    assert (loaded.unet.config.num_heads, loaded.vae.config.scale) == (8, 0.18215)


@pytest.mark.parametrize("suffix", ["sft", "SAFETENSORS"])
def test_safetensors_by_other_suffixes(networks: Networks, saved: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"sd.{suffix}"
    file.write_bytes(saved.read_bytes())
    assert same(load_checkpoint(file).unet, networks[0])
    assert Pipeline.load(file, device="cpu").size == Pipeline.load(saved, device="cpu").size


def test_both_styles_of_clip_names_load(networks: Networks, edited: Edit) -> None:
    path = edited(lambda tensors: {name.replace("text_model.", ""): x for name, x in tensors.items()})
    with safe_open(path, "pt") as file:
        assert not any("text_model" in name for name in file.keys())  # noqa: SIM118
    assert same(load_checkpoint(path).text_model, networks[2])


@pytest.mark.parametrize("name", [
    CLIP + "embeddings.position_ids", "cond_stage_model.transformer.embeddings.position_ids", "model_ema.decay",
    "model_ema.diffusion_modelout2weight", "betas", "logvar", "alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod",
    "posterior_mean_coef1", "lvlb_weights", "scale_factor", VAE + "loss.logvar",
    "cond_stage_model.logit_scale", "cond_stage_model.text_projection", "conditioner.embedders.0.logit_scale",
    "conditioner.embedders.0.text_projection.weight",
])
def test_what_training_left_is_ignored_by_name(networks: Networks, edited: Edit, name: str) -> None:
    path = edited(lambda tensors: {**tensors, name: torch.zeros(3, dtype=torch.int64)})
    assert same(load_checkpoint(path).unet, networks[0])


def test_a_whole_clip_is_a_text_encoder(networks: Networks, saved: Path, tmp_path: Path) -> None:
    inside = {name.removeprefix("cond_stage_model.transformer."): x for name, x in load_file(saved).items()
              if name.startswith("cond_stage_model.")}
    others = ("logit_scale", "vision_model.embeddings.class_embedding", "vision_model.encoder.layers.0.mlp.fc1.bias",
              "visual_projection.weight")
    save_file(inside | {name: torch.zeros(2, 2) for name in others}, tmp_path / "model.safetensors")
    assert same(load_checkpoint(saved, text_encoder=tmp_path / "model.safetensors").text_model, networks[2])
    save_file(inside | {"odd": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unexpected: odd"):
        load_checkpoint(saved, text_encoder=tmp_path / "model.safetensors")


def test_a_text_encoder_needs_a_tokenizer(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass clip_tokenizer=<folder> to load_checkpoint"):
        load_checkpoint(saved).text_encoder  # noqa: B018
    with pytest.raises(FileNotFoundError, match="no CLIP tokenizer"):
        load_checkpoint(saved, clip_tokenizer=tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "red": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    checkpoint = load_checkpoint(saved, clip_tokenizer=tmp_path)
    assert checkpoint.text_model
    tokens = checkpoint.text_encoder("red").tokens
    assert tokens.shape == (1, 6, 128)
    assert torch.equal(tokens, checkpoint.text_model(torch.tensor([[1, 0, 0, 0, 0, 0]])).last_hidden_state)


def test_every_name_of_sd15_is_understood(tmp_path: Path) -> None:
    """The whole real layout, 1130 tensors, in a file that is one hole: nothing is missing, nothing is left over."""
    weights = Weights(hollow(tmp_path / "x.safetensors"))
    assert kind_of(weights).what == "a Stable Diffusion 1.x checkpoint"
    parts, others = parts_of(weights)
    assert not others and {name: len(part.sources) for name, part in parts.items()} == {
        "unet": 686, "vae": 248, "text": 196}
    with torch.device("meta"):
        text_model = text_of(parts["text"], kind_of(weights))
    config = text_model.config
    assert (config.num_attention_heads, config.num_hidden_layers, config.max_position_embeddings) == (12, 12, 77)
    assert (config.bos_token_id, config.eos_token_id, config.hidden_act) == (49406, 49407, "quick_gelu")
    assert {name.removeprefix("text_model."): x.shape for name, x in text_model.state_dict().items()} == parts[
        "text"].shapes


def hollow(path: Path) -> Path:
    """A file of the real one's names, shapes and size, without a number in it: nothing is stored."""
    header, at = {}, 0
    for name, shape in json.loads((DATA / "sd15_ldm_keys.json").read_text()).items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at := at + size]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path


@pytest.mark.slow
def test_a_full_size_sd15_file_loads_and_runs(tmp_path: Path) -> None:
    """Random weights with the real names, shapes and dtype (2 GB), one UNet evaluation and one decoding at 512 px."""
    real = json.loads((DATA / "sd15_ldm_keys.json").read_text())
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in real.items():
        fan_in = max(torch.Size(shape[1:]).numel(), 1)
        tensors[name] = (torch.ones(shape) if name.endswith("weight") and len(shape) == 1 else
                         torch.randn(shape, generator=generator) * (fan_in**-0.5 if len(shape) > 1 else 0.01)).half()
    tensors[CLIP + "embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, tmp_path / "sd15.safetensors")
    del tensors
    checkpoint = load_checkpoint(tmp_path / "sd15.safetensors")
    assert checkpoint.text_model
    assert (checkpoint.unet.config, checkpoint.vae.config) == (UNetConfig(), VAEConfig())
    latents = torch.randn(1, 4, 64, 64, generator=generator)
    with torch.no_grad():
        tokens = checkpoint.text_model(torch.randint(0, 49408, (1, 77), generator=generator)).last_hidden_state
        eps = checkpoint.unet(latents, torch.tensor([961.73]), tokens)
        image = checkpoint.vae.decode(latents)
    assert (tokens.shape, eps.shape, image.shape) == ((1, 77, 768), (1, 4, 64, 64), (1, 3, 512, 512))
    assert eps.isfinite().all()
    assert image.isfinite().all()
    assert eps.std() > 0.01
