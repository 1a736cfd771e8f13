"""CLIP's tokenizer without a folder: from a package, or from the hub."""

import gzip
import hashlib
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ella_kd import Pipeline
from ella_kd.cli import main
from ella_kd.models import tokenizers
from ella_kd.models.tokenizers import BPE, find_clip_tokenizer, load_tokenizer, token_ids
from ella_kd.pipeline import MINIATURE

MERGES = ["i n", "t h", "a n", "r e", "th e</w>", "c a", "ca t</w>", "a t</w>", "Ġ x", "é e</w>"]
TEXTS = ["a photo of the cat", "THE the  in\nan", "!!! 12 naïve café ½ 日本 😀", "", "<|endoftext|>"]
KNOWN = 2 * 256 + len(MERGES) + 2


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "clip") -> Path:
    """A package with a vocabulary of CLIP's form, which must not be imported."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise RuntimeError('imported')")
    file = folder / name / BPE
    file.write_bytes(gzip.compress("\n".join(['"a version"', *MERGES, "never read"]).encode()))
    monkeypatch.setattr(tokenizers, "BPE_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(tokenizers, "CLIP_VOCABULARY", KNOWN)
    monkeypatch.setattr(tokenizers, "PACKAGES", ("open_clip", "clip"))
    monkeypatch.syspath_prepend(folder)
    return file


@pytest.fixture(autouse=True)
def nothing_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizers, "PACKAGES", ())


@pytest.mark.parametrize("name", ["open_clip", "clip"])
def test_a_package_brings_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' tokenizer, made of the same merges by the published rule, is the judge."""
    file = package(tmp_path, monkeypatch, name)
    assert find_clip_tokenizer(fetch=False) == file
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(x + "</w>" for x in letters), *("".join(merge.split()) for merge in MERGES),
             "<|startoftext|>", "<|endoftext|>"]
    judge = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)},
                          merges=cast(Any, [tuple(merge.split()) for merge in MERGES]), model_max_length=77)
    ours = load_tokenizer(file, "CLIP")
    assert [token_ids(ours, text) for text in TEXTS] == [judge(text).input_ids for text in TEXTS]
    assert token_ids(ours, "the")[1:-1] == [words.index("the</w>")]
    assert (ours.pad_token_id, ours.eos_token_id, ours.model_max_length, len(ours)) == (KNOWN - 1, KNOWN - 1, 77, KNOWN)


def test_another_file_of_that_name_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch).write_bytes(b"something else")
    assert find_clip_tokenizer(fetch=False) is None


def test_the_error_says_the_package_the_hub_and_the_folder() -> None:
    said = (r"CLIP's tokenizer, which no checkpoint holds: no installed package brings it \(open_clip_torch does\), "
            r"and the hub does not give it: .*openai/clip-vit-large-patch14 for --clip-tokenizer.*`ella-kd download "
            r"clip-tokenizer`.*give files of yours with --clip-tokenizer")
    with pytest.raises(FileNotFoundError, match=said):
        find_clip_tokenizer()


def test_the_hub_has_it(tmp_path: Path) -> None:
    """As the cache of the hub holds it: a folder of the tokenizer's files, without weights."""
    root = tmp_path / "cache/models--openai--clip-vit-large-patch14"
    commit = root / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs/main").write_text("0" * 40)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (commit / name).write_bytes((MINIATURE / "clip" / name).read_bytes())
    assert find_clip_tokenizer() == find_clip_tokenizer(fetch=False) == commit
    assert len(load_tokenizer(commit, "CLIP")) == len(load_tokenizer(MINIATURE / "clip", "CLIP"))


def test_a_checkpoint_that_knows_its_words_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The miniature has a vocabulary of its own, which is taken for CLIP's here; then for no one's."""
    known = len(load_tokenizer(MINIATURE / "clip", "CLIP"))
    monkeypatch.setattr(tokenizers, "CLIP_VOCABULARY", known)
    monkeypatch.setattr(tokenizers, "find_clip_tokenizer", lambda fetch: MINIATURE / "clip")
    prompt = "A red heart sits in the center."
    tokens = [sd.encode(prompt, "clip")(torch.ones(1)).tokens for sd in
              (Pipeline.load(MINIATURE / "sd.safetensors", dtype="float32"), Pipeline.miniature())]
    assert torch.equal(*tokens)
    monkeypatch.setattr(tokenizers, "CLIP_VOCABULARY", known + 1)
    with pytest.raises(ValueError, match="clip_tokenizer=<folder>, or \"clip-tokenizer\" to fetch it, or install open"):
        Pipeline.load(MINIATURE / "sd.safetensors").encode(prompt, "clip")


def test_the_command_takes_the_file_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch)
    done = CliRunner().invoke(main, ["generate", "a", "--mode", "clip", "--out", str(tmp_path), "--steps", "1",
                                     "--checkpoint", str(MINIATURE / "sd.safetensors")])
    assert done.exit_code == 2 and f"{KNOWN} tokens, the model knows" in done.stderr, done.output
