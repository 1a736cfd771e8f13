"""Files: a whole small Stable Diffusion checkpoint written and read, and every way a file can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from ella_kd.models import (
    TSC,
    AutoencoderKL,
    NoiseSchedule,
    UNet,
    UNetConfig,
    VAEConfig,
    load_checkpoint,
    load_tsc,
    save_checkpoint,
    save_tsc,
)

DATA = Path(__file__).parent / "data"
UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
Networks = tuple[UNet, AutoencoderKL, CLIPTextModel]
Tensors = dict[str, Tensor]


def randomise(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)


@pytest.fixture(scope="module")
def networks() -> Networks:
    torch.manual_seed(0)
    unet = UNet(UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention=(False, True),
                           context_dim=128, num_heads=4))
    vae = AutoencoderKL(VAEConfig(channels=32, channel_mult=(1, 1, 2), num_res_blocks=1, scale=0.5))
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=9, hidden_size=128, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=2, max_position_embeddings=6, bos_token_id=1,
                                        eos_token_id=2)).eval()
    for model in (unet, vae, clip):
        randomise(model)
    return unet, vae, clip


@pytest.fixture(scope="module")
def saved(networks: Networks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "sd.safetensors"
    save_checkpoint(path, *networks, {"title": "small"})
    return path


@pytest.fixture
def edited(saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """The saved file with its tensors, and perhaps its metadata, changed."""
    def edit(change: Callable[[Tensors], Tensors | None], **metadata: str) -> Path:
        tensors = load_file(saved)
        with safe_open(saved, "pt") as file:
            told = file.metadata() | metadata
        save_file(change(tensors) or tensors, tmp_path / "edited.safetensors", told)
        return tmp_path / "edited.safetensors"
    return edit


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_whole_checkpoint_comes_back(networks: Networks, saved: Path) -> None:
    unet, vae, clip = networks
    loaded = load_checkpoint(saved)
    assert (loaded.unet.config, loaded.vae.config) == (unet.config, vae.config)
    assert all(map(same, networks, (loaded.unet, loaded.vae, loaded.text_model)))
    assert torch.equal(loaded.noise_schedule.alphas_cumprod, NoiseSchedule.sd15().alphas_cumprod)
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


def test_both_styles_of_clip_names_load(networks: Networks, edited: Callable[..., Path]) -> None:
    path = edited(lambda tensors: {name.replace("text_model.", ""): x for name, x in tensors.items()})
    with safe_open(path, "pt") as file:
        assert not any("text_model" in name for name in file.keys())  # noqa: SIM118
    assert same(load_checkpoint(path).text_model, networks[2])


@pytest.mark.parametrize("name", [
    CLIP + "embeddings.position_ids", "cond_stage_model.transformer.embeddings.position_ids", "model_ema.decay",
    "model_ema.diffusion_modelout2weight", "betas", "logvar", "alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod",
    "posterior_mean_coef1", "lvlb_weights", "scale_factor", VAE + "loss.logvar",
])
def test_what_training_left_is_ignored_by_name(networks: Networks, edited: Callable[..., Path], name: str) -> None:
    path = edited(lambda tensors: {**tensors, name: torch.zeros(3, dtype=torch.int64)})
    assert same(load_checkpoint(path).unet, networks[0])


BREAKAGES: list[tuple[Callable[[Tensors], object], list[str]]] = [
    (lambda t: t.pop(UNET + "out.0.weight"), [f"missing: {UNET}out.0.weight [32]"]),
    (lambda t: t.pop(UNET + "input_blocks.3.1.norm.weight"), [f"missing: {UNET}input_blocks.3.1.norm.weight [64]"]),
    (lambda t: t.pop(UNET + "input_blocks.0.0.weight"), [UNET, "input_blocks.0.0.weight is missing"]),
    (lambda t: t.pop(VAE + "decoder.up.2.block.1.conv2.bias"), [f"missing: {VAE}decoder.up.2.block.1.conv2.bias [64]"]),
    (lambda t: t.pop(VAE + "post_quant_conv.weight"), [VAE, "post_quant_conv.weight is missing"]),
    (lambda t: t.pop(CLIP + "final_layer_norm.bias"), [f"missing: {CLIP}final_layer_norm.bias [128]"]),
    (lambda t: t.pop(CLIP + "embeddings.token_embedding.weight"), [CLIP, "token_embedding.weight is missing"]),
    (lambda t: t.update({UNET + "label_emb.0.0.weight": torch.zeros(3, 2)}),
     [f"unexpected: {UNET}label_emb.0.0.weight [3, 2]"]),
    (lambda t: t.update({"cond_stage_model.model.ln_final.bias": torch.zeros(1)}),
     ["unexpected: cond_stage_model.model.ln_final.bias [1]"]),
    (lambda t: t.update({"alphas": torch.zeros(1)}), ["unexpected: alphas [1]"]),
    (lambda t: t.update({UNET + "time_embed.0.weight": torch.zeros(128, 31)}),
     [f"misshapen: {UNET}time_embed.0.weight is [128, 31], must be [128, 32]"]),
    (lambda t: t.update({CLIP + "encoder.layers.1.mlp.fc2.bias": torch.zeros(3)}),
     [f"misshapen: {CLIP}encoder.layers.1.mlp.fc2.bias is [3], must be [128]"]),
    (lambda t: t.update({UNET + "input_blocks.0.0.weight": torch.zeros(32)}), ["must have 4 dimensions"]),
    (lambda t: t.update({CLIP.replace("text_model.", "") + "final_layer_norm.bias": torch.zeros(128)}),
     [f"holds {CLIP}final_layer_norm.bias twice"]),
    (lambda t: [t.pop(name) for name in list(t) if name.startswith(CLIP)], [CLIP, "token_embedding.weight is missing"]),
    (lambda t: [t.pop(name) for name in list(t) if ".1.transformer_blocks.0.ff." in name],
     [f"missing: {UNET}input_blocks.3.1.transformer_blocks.0.ff.net.0.proj.weight", "and 11 more"]),
]


@pytest.mark.parametrize(("breakage", "says"), BREAKAGES, ids=range(len(BREAKAGES)))
def test_a_wrong_tensor_is_named(edited: Callable[..., Path], breakage: Callable[[Tensors], object],
                                 says: list[str]) -> None:
    path = edited(lambda tensors: [breakage(tensors), tensors][1])
    with pytest.raises(ValueError, match=r"not what this loads|twice") as caught:
        load_checkpoint(path)
    for part in [*says, str(path)]:
        assert part in str(caught.value)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (Path("should_not_exist"),)  # type: ignore[return-value]


def test_a_file_that_is_no_checkpoint_is_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = saved.read_bytes()
    cases: list[tuple[str, bytes | object, type[Exception], str]] = [
        ("empty.safetensors", b"", ValueError, "not a whole safetensors file"),
        ("text.safetensors", b"<html>404 not found</html>" * 9, ValueError, "not a whole safetensors file"),
        ("short.safetensors", whole[:-100], ValueError, "not a whole safetensors file"),
        ("header.safetensors", whole[:100], ValueError, "not a whole safetensors file"),
        ("empty.ckpt", b"", ValueError, "not a whole torch file"),
        ("text.ckpt", b"<html>404 not found</html>" * 9, ValueError, "no checkpoint at all: it is refused"),
        ("evil.ckpt", {"state_dict": {}, "callbacks": Evil()}, ValueError, "holds Python objects.*it is refused"),
        ("list.pt", [torch.zeros(1)], ValueError, "does not hold named tensors"),
        ("number.pt", {"a": 1}, ValueError, "does not hold named tensors"),
    ]
    for name, content, kind, says in cases:
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(kind, match=says):
            load_checkpoint(tmp_path / name)
    torch.save(load_file(saved), tmp_path / "whole.ckpt")
    (tmp_path / "short.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:-5000])
    with pytest.raises(ValueError, match="not a whole torch file"):
        load_checkpoint(tmp_path / "short.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*gone\.safetensors"):
        load_checkpoint(tmp_path / "gone.safetensors")
    assert not (tmp_path / "should_not_exist").exists()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_damaged_file_loads_or_is_an_error_that_names_it(tmp_path: Path, kind: str) -> None:
    """Cut anywhere, and bits flipped: in a .safetensors in its header, for nothing can tell a flipped weight."""
    tsc = TSC(time_channel=8, time_embed_dim=8, width=8, layers=1, heads=2, num_latents=2, input_dim=4)
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.ckpt")
    if kind == "safetensors":
        save_tsc(path, tsc)
    else:
        torch.save(tsc.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole, random = path.read_bytes(), Random(0)
    fragile = 8 + int.from_bytes(whole[:8], "little") if kind == "safetensors" else len(whole)
    refused = 0
    for i in range(100):
        damaged = bytearray(whole[:random.randrange(len(whole))] if i % 3 == 0 else whole)
        for _ in range(i % 4 if damaged else 0):
            damaged[random.randrange(min(fragile, len(damaged)))] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        try:
            load_tsc(path)
        except ValueError as error:
            refused += str(path) in str(error)
        else:
            refused += 1
    assert refused == 100


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_are_floats(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = load_file(saved)
    name = VAE + "decoder.conv_out.bias"
    tensors[name] = tensors[name].to(dtype)
    torch.save(tensors, tmp_path / "sd.ckpt")
    if dtype.is_floating_point:
        bias = load_checkpoint(tmp_path / "sd.ckpt").vae.decoder.conv_out.bias
        assert bias is not None and torch.equal(bias, tensors[name].float())
        return
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"sd\.ckpt: the weights {name} are {kind}, expected floats"):
        load_checkpoint(tmp_path / "sd.ckpt")
    save_tsc(tmp_path / "tsc.safetensors", TSC(32, 32, 32, 1, 2, 4, 8))
    connector = load_file(tmp_path / "tsc.safetensors")
    torch.save({**connector, "connector.latents": torch.zeros(4, 32, dtype=dtype)}, tmp_path / "tsc.ckpt")
    with pytest.raises(ValueError, match=rf"tsc\.ckpt: the weights connector.latents are {kind}"):
        load_tsc(tmp_path / "tsc.ckpt")


@pytest.mark.parametrize(("names", "says"), [
    (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "a LoRA"),
    (["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"], "a LoRA"),
    (["lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"], "a LoRA"),
    (["control_model.input_hint_block.0.weight", "control_model.input_blocks.0.0.weight"], "a ControlNet"),
    (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "a ControlNet"),
    (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
    (["conv_in.weight", "body.0.block1.weight"], "a T2I-Adapter"),
    (["emb_params"], "a textual-inversion embedding"),
    (["conditioner.embedders.1.model.ln_final.weight", UNET + "out.2.bias"], "an SDXL checkpoint"),
    (["conditioner.embedders.0.model.ln_final.weight", UNET + "out.2.bias"], "an SDXL refiner"),
    (["cond_stage_model.model.transformer.resblocks.0.ln_1.bias", UNET + "out.2.bias"], "a Stable Diffusion 2.x"),
    (["double_blocks.0.img_attn.proj.bias"], "a Flux or SD3 model"),
    (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5"),
    (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "the UNet of a diffusers folder"),
    (["encoder.down_blocks.0.resnets.0.conv1.weight"], "the autoencoder of a diffusers folder"),
    (["text_model.encoder.layers.0.self_attn.k_proj.bias"], "a CLIP text encoder alone"),
    ([UNET + "out.2.bias", CLIP + "final_layer_norm.bias"], "a checkpoint without its autoencoder"),
    (["input_blocks.0.0.weight"], "the UNet of a checkpoint alone"),
    (["encoder.conv_in.weight", "decoder.conv_in.weight"], r"the autoencoder \(VAE\) of a checkpoint alone"),
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
    with pytest.raises(ValueError, match="does not hold named tensors, it looks like a textual-inversion embedding"):
        load_checkpoint(tmp_path / "x.pt")
    (tmp_path / "model_index.json").touch()
    with pytest.raises(FileNotFoundError, match="it is a diffusers folder: expected one file"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(("said", "argument", "want"), [
    ("epsilon", None, "eps"), ("v", None, "v"), ("v", "eps", "eps"), ("odd", "v", "v")])
def test_prediction_is_the_argument_then_the_metadata(edited: Callable[..., Path], said: str, argument: str | None,
                                                      want: str) -> None:
    path = edited(dict, **{"modelspec.prediction_type": said})
    assert load_checkpoint(path, prediction=argument).noise_schedule.prediction == want  # type: ignore[arg-type]


@pytest.mark.parametrize(("metadata", "says"), [
    ({"modelspec.prediction_type": "odd"}, "modelspec.prediction_type = 'odd', known are"),
    ({"ella_kd": "{"}, "is not JSON"), ({"ella_kd": "[]"}, "must be a JSON object"),
    ({"ella_kd": "[" * 99999}, "is not JSON"),
    *(({"ella_kd": f'{{"{key}": {value}}}'}, rf"edited.safetensors: {key} in the metadata 'ella_kd' must be a")
      for key, value in [("num_heads", 0), ("num_heads", "4.0"), ("num_heads", "true"), ("num_heads", '"4"'),
                         ("head_dim", -1), ("scale", "NaN"), ("scale", "Infinity"), ("scale", 0), ("scale", "true"),
                         ("scale", '"1"'), ("heads", 2.0)]),
])
def test_wrong_metadata_is_refused(edited: Callable[..., Path], metadata: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_checkpoint(edited(dict, **metadata))


def test_the_schedule_is_the_exact_one_unless_the_file_has_another(edited: Callable[..., Path]) -> None:
    exact = NoiseSchedule.sd15().alphas_cumprod
    rounded = load_checkpoint(edited(lambda t: {**t, "alphas_cumprod": exact.half()}))
    assert torch.equal(rounded.noise_schedule.alphas_cumprod, exact)
    other = NoiseSchedule.scaled_linear(beta_end=0.014, n=1100, prediction="v")
    loaded = load_checkpoint(edited(lambda t: {**t, "alphas_cumprod": other.alphas_cumprod}), prediction="v")
    assert torch.equal(loaded.noise_schedule.alphas_cumprod, other.alphas_cumprod)
    with pytest.raises(ValueError, match=r"edited.safetensors has a noise schedule of its own .*decrease strictly"):
        load_checkpoint(edited(lambda t: {**t, "alphas_cumprod": torch.zeros(1000)}))
    for table in (exact.bfloat16(), exact.bfloat16().float(), exact.half().float(), exact.half().bfloat16()):
        loaded = load_checkpoint(edited(lambda t, table=table: {**t, "alphas_cumprod": table}))
        assert torch.equal(loaded.noise_schedule.alphas_cumprod, exact)
    with pytest.raises(ValueError, match=r"\(in bfloat16, which is coarse: give it in float32\): .*strictly"):
        load_checkpoint(edited(lambda t: {**t, "alphas_cumprod": other.alphas_cumprod.bfloat16()}))


def test_a_text_encoder_needs_a_tokenizer(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass clip_tokenizer=<folder> to load_checkpoint"):
        load_checkpoint(saved).text_encoder  # noqa: B018
    with pytest.raises(FileNotFoundError, match="no CLIP tokenizer"):
        load_checkpoint(saved, clip_tokenizer=tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "red": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    checkpoint = load_checkpoint(saved, clip_tokenizer=tmp_path)
    tokens = checkpoint.text_encoder("red").tokens
    assert tokens.shape == (1, 6, 128)
    assert torch.equal(tokens, checkpoint.text_model(torch.tensor([[1, 0, 0, 0, 0, 0]])).last_hidden_state)


def test_a_connector_comes_back_with_its_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tsc = TSC(time_channel=32, time_embed_dim=24, width=32, layers=2, heads=4, num_latents=6, input_dim=20)
    randomise(tsc)
    save_tsc(tmp_path / "tsc.safetensors", tsc, dtype=torch.float16)
    loaded = load_tsc(tmp_path / "tsc.safetensors")
    features, t = torch.randn(1, 3, 20), torch.tensor([500.5])
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(features, t), tsc.half().float()(features, t))
    tensors = load_file(tmp_path / "tsc.safetensors")
    for name, says in [("connector.latents", "connector.latents is missing"),
                       ("connector.perceiver_blocks.1.ln_2.linear.bias",
                        r"missing: connector.perceiver_blocks.1.ln_2.linear.bias \[64\]")]:
        save_file({key: x for key, x in tensors.items() if key != name}, tmp_path / "broken.safetensors")
        with pytest.raises(ValueError, match=says):
            load_tsc(tmp_path / "broken.safetensors")


def test_a_failed_write_leaves_the_old_file(networks: Networks, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_is_full(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    path = tmp_path / "sd.safetensors"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr("ella_kd.files.save_file", disk_is_full)
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(path, *networks)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["sd.safetensors"]
    save_checkpoint(path, *networks)
    assert same(load_checkpoint(path).unet, networks[0])
    with pytest.raises(ValueError, match=r"written as \.safetensors"):
        save_checkpoint(tmp_path / "sd.ckpt", *networks)
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_checkpoint(tmp_path / "nowhere" / "sd.safetensors", *networks)


def test_every_name_of_sd15_is_understood() -> None:
    """The whole real layout, 1130 tensors, on the meta device: nothing is missing, nothing is left over."""
    from ella_kd.models.checkpoint import _build, _clip, _split

    real = json.loads((DATA / "sd15_ldm_keys.json").read_text())
    groups, extra = _split({name: torch.empty(shape, device="meta") for name, shape in real.items()}, "real")
    assert not extra
    assert [len(group) for group in groups.values()] == [686, 248, 196]
    with torch.device("meta"):
        text_model = _build(_clip, groups[CLIP], CLIP, "real")
    config = text_model.config
    assert (config.num_attention_heads, config.num_hidden_layers, config.max_position_embeddings) == (12, 12, 77)
    assert (config.bos_token_id, config.eos_token_id, config.hidden_act) == (49406, 49407, "quick_gelu")
    assert {CLIP + name.removeprefix("text_model."): list(x.shape) for name, x in text_model.state_dict().items()} == {
        name: shape for name, shape in real.items() if name.startswith(CLIP)}


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
