"""Every way in which a file can be wrong: a clear error, nothing half loaded, nothing run."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from ella_kd.models import TSC, load_checkpoint, load_tsc, save_tsc
from filing import CLIP, UNET, VAE, Edit, Tensors

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
