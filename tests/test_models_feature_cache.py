"""Features from the folder are those of the encoder, which is loaded only for a prompt that is new."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ella_kd import Pipeline
from ella_kd.models import FeatureCache, T5TextEncoder
from tiny import relative

PROMPTS = ["a red circle", "blue square on the left", ""]


@pytest.fixture
def t5(tiny_files: dict[str, Any]) -> T5TextEncoder:
    encoder = Pipeline.load(**tiny_files).t5
    assert encoder is not None
    return encoder


def missing() -> T5TextEncoder:
    raise AssertionError("the encoder was loaded")


@pytest.mark.parametrize("max_length", [None, 9])
def test_features_are_the_encoders(t5: T5TextEncoder, tmp_path: Path, max_length: int | None) -> None:
    cache = FeatureCache(tmp_path / "new" / "folder", "tiny", lambda: t5)
    want = t5(PROMPTS, max_length)
    for again in (cache, FeatureCache(tmp_path / "new" / "folder", "tiny", missing)):
        got = again(PROMPTS, max_length)
        assert got.tokens.shape == want.tokens.shape
        if want.mask is None:
            assert got.mask is None and relative(got.tokens, want.tokens) < 1e-5
        else:
            assert got.mask is not None and torch.equal(got.mask, want.mask)
            assert relative(got.tokens[got.mask], want.tokens[want.mask]) < 1e-5
    assert len(list((tmp_path / "new" / "folder").iterdir())) == len(PROMPTS)


def test_many_may_fill_one_folder(t5: T5TextEncoder, tmp_path: Path) -> None:
    want, loads = [t5(prompt) for prompt in PROMPTS], list[int]()

    def load() -> T5TextEncoder:
        loads.append(1)
        time.sleep(0.01)
        return t5

    caches = [FeatureCache(tmp_path, "tiny", load) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: caches[i % 4](PROMPTS[i % 3]), range(48)))
    assert all(torch.equal(features.tokens, want[i % 3].tokens) for i, features in enumerate(got))
    assert len(loads) <= len(caches) and len(list(tmp_path.iterdir())) == len(PROMPTS)
    assert repr(caches[0]) == f"FeatureCache({str(tmp_path)!r}, 'tiny')"


def test_a_prompt_has_the_same_features_in_every_company(t5: T5TextEncoder, tmp_path: Path) -> None:
    alone = FeatureCache(tmp_path / "a", "tiny", lambda: t5)("a red circle")
    together = FeatureCache(tmp_path / "b", "tiny", lambda: t5)(PROMPTS)
    assert torch.equal(together.tokens[0, :alone.tokens.shape[1]], alone.tokens[0])


def test_weights_are_kept(t5: T5TextEncoder, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "tiny", lambda: t5)
    prompts = ["a (red:2) circle", "blue"]
    want, got = t5.weighted(prompts), cache.weighted(prompts)
    assert got.mask is not None and want.mask is not None and torch.equal(got.mask, want.mask)
    assert torch.equal(FeatureCache(tmp_path, "tiny", missing).weighted(prompts).mask, want.mask)  # type: ignore[arg-type]
    assert cache.path("blue") != cache.path("blue", weighted=True) != cache.path("blue", 9, weighted=True)


def test_the_encoder_is_loaded_for_a_new_prompt_only(t5: T5TextEncoder, tmp_path: Path) -> None:
    FeatureCache(tmp_path, "tiny", lambda: t5)("a red circle")
    cache = FeatureCache(tmp_path, "tiny", missing)
    cache("a red circle")
    for new in (lambda: cache("blue"), lambda: cache("a red circle", 9),
                lambda: FeatureCache(tmp_path, "other", missing)("a red circle")):
        with pytest.raises(AssertionError, match="was loaded"):
            new()


def test_bad_arguments_and_files_are_refused(t5: T5TextEncoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name the encoder"):
        FeatureCache(tmp_path, " ", lambda: t5)
    cache = FeatureCache(tmp_path, "tiny", lambda: t5)
    with pytest.raises(ValueError, match="prompt"):
        cache([])
    cache("red")
    cache.path("red").rename(cache.path("blue"))
    with pytest.raises(ValueError, match=r"holds the features of \('red',\) by 'tiny', not of 'blue'"):
        cache("blue")
    cache.path("blue").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="safetensors"):
        cache("blue")
