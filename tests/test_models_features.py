"""Features on disk: bit-exact round trips, strict reading, and pictures without T5 in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ella_kd import CFGDenoiser, ELLADenoiser, Pipeline
from ella_kd.conditioning import ELLA
from ella_kd.models import TextFeatures, load_features, save_features
from ella_kd.samplers import get_sigmas_karras, sample_dpmpp_2m
from tiny import features, noise

HEADER = "ella_kd_features"


@given(prompts=st.lists(st.text(), min_size=1, max_size=4), length=st.integers(1, 5), seed=st.integers(0, 2**31),
       dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
       mask=st.sampled_from(["none", "bool", "weights"]), mode=st.sampled_from(["flexible", "fixed", "clip"]))
def test_a_round_trip_is_bit_exact(tmp_path: Path, prompts: list[str], length: int, seed: int, dtype: torch.dtype,
                                   mask: str, mode: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(len(prompts), length, 3, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(len(prompts), length, generator=generator) + 0.1
    given_mask = {"none": None, "bool": weights > 0.05, "weights": weights}[mask]
    path = tmp_path / "a.safetensors"
    if mask == "bool" and mode == "fixed":
        with pytest.raises(ValueError, match="seen whole"):
            save_features(path, TextFeatures(tokens, given_mask), prompts, encoder="t5", mode=mode)
        return
    save_features(path, TextFeatures(tokens, given_mask), prompts, encoder="flan-t5-xl", mode=mode)
    got = load_features(path)
    assert (got.prompts, got.encoder, got.mode) == (tuple(prompts), "flan-t5-xl", mode)
    assert got.features.tokens.dtype == dtype
    assert got.features.tokens.numpy(force=True).tobytes() == tokens.numpy(force=True).tobytes() \
        if dtype != torch.bfloat16 else torch.equal(got.features.tokens, tokens)
    assert (got.features.mask is None) == (given_mask is None)
    if given_mask is not None and got.features.mask is not None:
        assert got.features.mask.dtype == given_mask.dtype
        assert torch.equal(got.features.mask, given_mask)
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_header_can_be_read_by_others(tmp_path: Path) -> None:
    save_features(tmp_path / "a.safetensors", features(3), "a cat", encoder="flan-t5-xl", mode="flexible")
    raw = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert json.loads(header[HEADER]) == {"version": 1, "prompts": ["a cat"], "encoder": "flan-t5-xl",
                                          "mode": "flexible", "dtype": "float32"}


def test_one_prompt_of_many_comes_without_its_padding(tmp_path: Path) -> None:
    several = features(2, 5)
    save_features(tmp_path / "a.safetensors", several, ["a cat", "a dog in fog"], encoder="t5", mode="flexible")
    saved = load_features(tmp_path / "a.safetensors")
    assert torch.equal(saved["a cat"].tokens, several.tokens[:1, :2])
    assert saved["a cat"].mask is None
    assert torch.equal(saved["a dog in fog"].tokens, several.tokens[1:])
    with pytest.raises(KeyError, match=r"'a cow' is none of the 2 saved prompts; nearest are \['a cat'"):
        saved["a cow"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("length", [None, 12])
def test_pictures_without_t5(pipeline: Pipeline, tmp_path: Path, length: int | None, weighted: bool) -> None:
    assert pipeline.t5 is not None and pipeline.tsc is not None
    prompts = ["a (red:2) circle", "a square on the left"]
    mode: Any = "flexible" if length is None else "fixed"
    encoded = (pipeline.t5.weighted if weighted else pipeline.t5)(prompts, length)
    save_features(tmp_path / "c.safetensors", encoded, prompts, encoder="tiny", mode=mode)
    save_features(tmp_path / "u.safetensors", pipeline.t5("", length), "", encoder="tiny", mode=mode)
    denoiser = CFGDenoiser(ELLADenoiser(pipeline.unet, pipeline.tsc))
    sigmas = get_sigmas_karras(3, denoiser.sigma_min, denoiser.sigma_max)

    def draw(cond: TextFeatures, uncond: TextFeatures) -> torch.Tensor:
        extra = {"cond": ELLA(pipeline.tsc, cond), "uncond": uncond, "cond_scale": 3.0}  # type: ignore[arg-type]
        return sample_dpmpp_2m(denoiser, noise(2, 4, 8, 8) * sigmas[0], sigmas, extra_args=extra, disable=True)

    saved = [load_features(tmp_path / name).features for name in ("c.safetensors", "u.safetensors")]
    assert torch.equal(draw(*saved), draw(encoded, pipeline.t5("", length)))


@pytest.mark.parametrize(("change", "says"), [
    ({"prompts": ["a", "b"]}, "1 rows need as many prompts, all of them text, got 2"),
    ({"prompts": [3]}, "all of them text"),
    ({"mode": "long"}, "unknown mode 'long': expected one of flexible, fixed, clip"),
    ({"encoder": " "}, "name the encoder"),
    ({"features": TextFeatures(torch.ones(3, 4))}, r"floats \[B, L, D\] .*, got torch.float32 \[3, 4\]"),
    ({"features": TextFeatures(torch.ones(1, 2, 3).long())}, "got torch.int64"),
    ({"features": TextFeatures(torch.full((1, 2, 3), torch.inf))}, "not finite: an fp16 encoder that overflowed"),
    ({"features": TextFeatures(torch.ones(1, 2, 3), torch.ones(1, 3).bool())}, r"mask must be \[1, 2\]"),
    ({"features": TextFeatures(torch.ones(1, 2, 3), -torch.ones(1, 2))}, "finite and at least 0"),
    ({"features": TextFeatures(torch.ones(1, 2, 3), torch.zeros(1, 2))}, "hides every token"),
    ({"path": "a.pt"}, "written as .safetensors"),
])
def test_what_cannot_be_saved(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"path": "a.safetensors", "features": features(3), "prompts": "a", "encoder": "t5",
                            "mode": "flexible"} | change
    with pytest.raises(ValueError, match=says):
        save_features(tmp_path / good.pop("path"), **good)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_features(tmp_path / "x" / "a.safetensors", features(3), "a", encoder="t5", mode="flexible")




@pytest.mark.parametrize(("header", "tensors", "says"), [
    ({"version": 2}, {}, "of version 2, this ella_kd reads version 1"),
    ({"prompts": "a"}, {}, "must have the fields version, prompts, encoder, mode, dtype"),
    ({"prompts": ["a", "b"]}, {}, "as many prompts"),
    ({"more": 1}, {}, "must have the fields"),
    ({"mode": "x"}, {}, "unknown mode"),
    ({"dtype": "float16"}, {}, "says that the tokens are float16, and they are float32"),
    ({}, {"extra": torch.zeros(1)}, r"tensors \['extra', 'tokens'\]"),
    ({}, {"mask": torch.ones(1, 9).bool()}, "mask must be"),
    ({}, {"tokens": torch.ones(3)}, r"floats \[B, L, D\]"),
])
def test_wrong_files_are_refused(tmp_path: Path, header: dict[str, Any], tensors: dict[str, Any], says: str) -> None:
    path = tmp_path / "a.safetensors"
    save_features(path, features(3), "a", encoder="t5", mode="flexible")
    written = {"version": 1, "prompts": ["a"], "encoder": "t5", "mode": "flexible", "dtype": "float32"} | header
    save_file(load_file(path) | tensors, path, {HEADER: json.dumps(written)})
    with pytest.raises(ValueError, match=f"holds no text features: .*{says}"):
        load_features(path)


def test_other_files_are_refused(tmp_path: Path, tiny_files: dict[str, str]) -> None:
    with pytest.raises(FileNotFoundError, match="no features at"):
        load_features(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match=r"its metadata has no 'ella_kd_features': write features with save_features"):
        load_features(tiny_files["tsc"])
    path = tmp_path / "a.safetensors"
    save_features(path, features(3), "a", encoder="t5", mode="flexible")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_features(cut)
    save_file(load_file(path), path, {HEADER: "{"})
    with pytest.raises(ValueError, match="is not JSON"):
        load_features(path)
