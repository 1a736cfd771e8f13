"""Every way in which a file can be wrong: a clear error, nothing half loaded, nothing run."""

import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ella_kd import Pipeline
from ella_kd.models import (
    TSC,
    load_checkpoint,
    load_tsc,
    save_tsc,
)
from ella_kd.models.files.kinds import kind_of_path
from ella_kd.models.files.weights import Weights
from filing import CLIP, UNET, VAE, Edit, Tensors
from test_models_files_damaged import tiny_file

BREAKAGES: list[tuple[Callable[[Tensors], object], list[str]]] = [
    (lambda t: t.pop(UNET + "out.0.weight"), [f"missing: {UNET}out.0.weight [32]"]),
    (lambda t: t.pop(UNET + "input_blocks.3.1.norm.weight"), [f"missing: {UNET}input_blocks.3.1.norm.weight [64]"]),
    (lambda t: t.pop(UNET + "input_blocks.0.0.weight"), [UNET, "input_blocks.0.0.weight is missing"]),
    (lambda t: t.pop(VAE + "decoder.up.2.block.1.conv2.bias"), [f"missing: {VAE}decoder.up.2.block.1.conv2.bias [64]"]),
    (lambda t: t.pop(VAE + "post_quant_conv.weight"), [VAE, "post_quant_conv.weight is missing"]),
    (lambda t: t.pop(CLIP + "final_layer_norm.bias"), [f"missing: {CLIP}final_layer_norm.bias [128]"]),
    (lambda t: t.pop(CLIP + "embeddings.token_embedding.weight"), ["token_embedding.weight is missing"]),
    (lambda t: t.update({UNET + "label_emb.9.weight": torch.zeros(3, 2)}),
     [f"unexpected: {UNET}label_emb.9.weight [3, 2]"]),
    (lambda t: t.update({"cond_stage_model.model.ln_final.bias": torch.zeros(1)}),
     ["holds its text encoder twice, as cond_stage_model."]),
    (lambda t: t.update({"alphas": torch.zeros(1)}), ["unexpected: alphas [1]"]),
    (lambda t: t.update({UNET + "time_embed.0.weight": torch.zeros(128, 31)}),
     [f"misshapen: {UNET}time_embed.0.weight is [128, 31], must be [128, 32]"]),
    (lambda t: t.update({CLIP + "encoder.layers.1.mlp.fc2.bias": torch.zeros(3)}),
     [f"misshapen: {CLIP}encoder.layers.1.mlp.fc2.bias is [3], must be [128]"]),
    (lambda t: t.update({UNET + "input_blocks.0.0.weight": torch.zeros(32)}), ["must have 4 dimensions"]),
    (lambda t: t.update({CLIP.replace("text_model.", "") + "final_layer_norm.bias": torch.zeros(128)}),
     ["the text encoder holds final_layer_norm.bias twice, as "]),
    (lambda t: [t.pop(name) for name in list(t) if name.startswith(CLIP) and "final" not in name],
     ["token_embedding.weight is missing"]),
    (lambda t: [t.pop(name) for name in list(t) if name.startswith(VAE)],
     ["is a Stable Diffusion 1.x checkpoint without its autoencoder: give an autoencoder with vae=<file or folder>"]),
    (lambda t: [t.pop(name) for name in list(t) if ".1.transformer_blocks.0.ff." in name],
     [f"missing: {UNET}input_blocks.3.1.transformer_blocks.0.ff.net.0.proj.weight", "and 11 more"]),
]


@pytest.mark.parametrize(("breakage", "says"), BREAKAGES, ids=range(len(BREAKAGES)))
def test_a_wrong_tensor_is_named(edited: Edit, breakage: Callable[[Tensors], object],
                                 says: list[str]) -> None:
    path = edited(lambda tensors: [breakage(tensors), tensors][1])
    with pytest.raises(ValueError, match=r"not what this loads|twice|without") as caught:
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
        *((f"lfs.{suffix}", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ValueError,
           "is a pointer of git-lfs") for suffix in ("safetensors", "ckpt")),
        ("empty.ckpt", b"", ValueError, "not a whole torch file"),
        ("text.ckpt", b"<html>404 not found</html>" * 9, ValueError, "or is no checkpoint at all.* it is refused"),
        ("evil.ckpt", {"state_dict": {}, "callbacks": Evil()}, ValueError,
         r"holds Python objects \(builtins.getattr, pathlib.Path, .*it is refused"),
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


@pytest.mark.parametrize(("value", "dtype", "says"), [
    (float("nan"), "float32", "hold NaN or infinity: the file is damaged"),
    (float("-inf"), "float32", "hold NaN or infinity"),
    (float("nan"), "bfloat16", "hold NaN or infinity"),
    (1e6, "float16", "do not fit float16: load this model in float32 or bfloat16"),
])
@pytest.mark.filterwarnings("ignore:float16 on a CPU")
def test_numbers_that_are_none(edited: Edit, value: float, dtype: str, says: str) -> None:
    name = VAE + "decoder.conv_out.weight"
    path = edited(lambda t: t[name].view(-1)[7:8].fill_(value) and None)
    with pytest.raises(ValueError, match=rf"edited.safetensors: the weights {name} {says}"):
        load_checkpoint(path, dtype=dtype)


def test_what_is_no_file(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "pool.safetensors")
    (tmp_path / "pool.safetensors").symlink_to(tmp_path / "loop.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").touch()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "huge.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    cases: list[tuple[str, type[Exception], str]] = [
        ("loop.safetensors", FileNotFoundError, r"no checkpoint at .*loop.*, it is a link that leads nowhere"),
        ("pipe.safetensors", FileNotFoundError, r"no checkpoint at .*, it is neither a file nor a folder"),
        ("gone.safetensors", FileNotFoundError, r"no checkpoint at .*gone.safetensors$"),
        ("folder", FileNotFoundError, r"no weights in the folder .*: expected diffusion_pytorch_model.safetensors"),
        ("pipeline", FileNotFoundError, "it is a whole diffusers folder, whose networks lie in folders of their own"),
        ("empty.safetensors", ValueError, r"is not a whole safetensors file \(it is empty\): fetch it again"),
        ("huge.safetensors", ValueError, "is not a whole safetensors file"),
        ("x.gguf", ValueError, "is a GGUF file: expected .safetensors or .ckpt"),
    ]
    for name, kind, says in cases:
        for load in (load_checkpoint, load_tsc, kind_of_path):
            with pytest.raises(kind, match=says):
                load(tmp_path / name)


def test_a_tensor_that_is_larger_than_its_file(tmp_path: Path) -> None:
    torch.save({"connector.latents": torch.zeros(1).expand(10**9, 10**6)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x.ckpt is not a whole torch file \(the tensor connector.latents is larger"):
        load_tsc(tmp_path / "x.ckpt")


@pytest.mark.parametrize(("content", "says"), [
    ("", "is no index of weights"), ("[]", "is no index of weights"), ("{}", "is no index of weights"),
    ('{"weight_map": []}', "is no index"), ('{"weight_map": {}}', "weight_map must name files beside it"),
    ('{"weight_map": {"a": "../x.safetensors"}}', "weight_map must name files beside it"),
    ('{"weight_map": {"a": 3}}', "is no index"), ("[" * 99999, "is no index"),
    ('{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}', "names 2 files, and y.safetensors is missing"),
    ('{"weight_map": {"a": "x.safetensors", "b": "z.safetensors"}}', "x.safetensors and z.safetensors both hold a"),
])
def test_a_wrong_index_of_shards(tmp_path: Path, content: str, says: str) -> None:
    for name in ("x", "z"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        Weights(tmp_path)


def test_no_permission() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        whole = tiny_file(folder / "x.safetensors")
        (folder / "x.ckpt").write_bytes(whole)
        (folder / "closed").mkdir()
        for each in folder.iterdir():
            each.chmod(0)
        told = as_nobody(lambda: [_error(load_checkpoint, folder / each) for each in ("x.safetensors", "x.ckpt",
                                                                                      "closed", "closed/x.ckpt")])
        assert all("PermissionError" in each and name in each for each in told), told
        told = as_nobody(lambda: [_error(save_tsc, folder / "y.safetensors", TSC(8, 8, 8, 1, 2, 2, 4))])
        assert "PermissionError" in told[0] and "choose a folder that you may write to" in told[0]


def _error(call: Callable[..., object], *args: object) -> str:
    try:
        call(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def as_nobody(call: Callable[[], list[str]]) -> list[str]:
    """What a call says in a child process without rights."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            os.write(write, json.dumps(call()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said: list[str] = json.loads(pipe.read())
    os.waitpid(child, 0)
    return said


def test_a_t5_of_another_width_and_a_connector_of_another_model(tiny_files: dict[str, str], tmp_path: Path) -> None:
    t5, given = tmp_path / "t5", dict[str, Any](tiny_files)
    shutil.copytree(tiny_files["t5"], t5)
    config = json.loads((t5 / "config.json").read_text())
    (t5 / "config.json").write_text(json.dumps(config | {"d_model": 48}))
    with pytest.raises(ValueError, match=rf"the T5 in {t5} has width 48, the connector .* was trained on one of 32"):
        Pipeline.load(**{**given, "t5": str(t5)}, device="cpu")
    save_tsc(tmp_path / "tsc.safetensors", TSC(32, 32, 96, 1, 2, 4, 32))
    with pytest.raises(ValueError, match="makes tokens of width 96, the checkpoint's UNet takes 64: they belong to"):
        Pipeline.load(**{**given, "tsc": str(tmp_path / "tsc.safetensors")}, device="cpu")


def test_code_in_a_folders_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unet").mkdir()
    torch.save({"conv_in.weight": torch.zeros(1), "x": Evil()}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    for path in (tmp_path, tmp_path / "unet"):
        with pytest.raises(ValueError, match=r"holds Python objects .*it is refused"):
            load_checkpoint(path)
    assert not (tmp_path / "should_not_exist").exists()


def test_the_official_pickles_name_a_callback_and_hold_numbers_of_numpy(tmp_path: Path, saved: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = ModuleType(name)
    callback = type("ModelCheckpoint", (), {"__module__": name})
    setattr(module, "ModelCheckpoint", callback)  # noqa: B010
    with monkeypatch.context() as patch:
        for each in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, each, ModuleType(each))
        patch.setitem(sys.modules, name, module)
        torch.save({"state_dict": {"state_dict": load_file(saved)}, "global_step": 875000,
                    "callbacks": {callback: {"best_model_score": np.float64(0.5)}}}, tmp_path / "sd.ckpt")
    weights = Weights(tmp_path / "sd.ckpt")
    assert weights.metadata == {"global_step": "875000"}
    assert load_checkpoint(tmp_path / "sd.ckpt", prediction="eps").kind.family == "sd1"


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


@pytest.mark.parametrize(("metadata", "says"), [
    ({"modelspec.prediction_type": "odd"}, "modelspec.prediction_type = 'odd', known are"),
    ({"ella_kd": "{"}, "is not JSON"), ({"ella_kd": "[]"}, "must be a JSON object"),
    ({"ella_kd": "[" * 99999}, "is not JSON"),
    *(({"ella_kd": f'{{"{key}": {value}}}'}, rf"edited.safetensors: {key} in the metadata 'ella_kd' must be a")
      for key, value in [("num_heads", 0), ("num_heads", "4.0"), ("num_heads", "true"), ("num_heads", '"4"'),
                         ("head_dim", -1), ("scale", "NaN"), ("scale", "Infinity"), ("scale", 0), ("scale", "true"),
                         ("scale", '"1"'), ("heads", 2.0)]),
])
def test_wrong_metadata_is_refused(edited: Edit, metadata: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_checkpoint(edited(dict, **metadata))


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02}q\x00." + bytes(2**20))
        archive.writestr("bomb/version", "3\n")
    with pytest.raises(ValueError, match=r"bomb.ckpt is not a whole torch file \(it is compressed, so it is no"):
        load_checkpoint(path)
