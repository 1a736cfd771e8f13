"""Tokenizers of text encoders: finding and reading them, and calls that threads may make at once."""

import gzip
import hashlib
import json
import threading
import warnings
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ella_kd.models.files.hub import cached, find
from ella_kd.models.files.presets import CLIP_TOKENIZER

if TYPE_CHECKING:  # transformers takes seconds to import: it is loaded when a tokenizer is
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# A fast tokenizer keeps padding and truncation as its own state: unlocked, 10 of 600 calls by threads were wrong.
_TOKENIZING = threading.Lock()

BPE = "bpe_simple_vocab_16e6.txt.gz"  # CLIP's, as OpenAI published it, in packages that bring it
BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
PACKAGES = ("open_clip", "clip")
CLIP_VOCABULARY = 49408
ENDS = ("<|startoftext|>", "<|endoftext|>")


def find_clip_tokenizer(fetch: bool = True) -> Path | None:
    """CLIP's published tokenizer: the file of an installed package, else the folder from the hub or its cache.

    The package (open_clip, clip) is not imported, its file is known by its sha256. fetch False: None rather than a
    question to the hub. Raises FileNotFoundError that says all ways to have one.
    """
    for package in PACKAGES:
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            file = Path(folder) / BPE
            if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == BPE_SHA256:
                return file
    if not fetch:
        return cached(CLIP_TOKENIZER, "clip_tokenizer")
    try:
        return find("clip-tokenizer", "clip_tokenizer")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "CLIP's tokenizer, which no checkpoint holds: no installed package brings it (open_clip_torch does), and "
            f"the hub does not give it: {error}") from error


def published_clip_tokenizer(vocabulary: int, fetch: bool) -> "PreTrainedTokenizerBase | None":
    """CLIP's tokenizer for a text model that knows so many tokens; None, and a warning, if it cannot be had.

    None too for a model with a vocabulary of its own. fetch False: see `find_clip_tokenizer`.
    """
    if vocabulary != CLIP_VOCABULARY:
        return None
    try:
        found = find_clip_tokenizer(fetch)
    except FileNotFoundError as error:
        warnings.warn(str(error), stacklevel=3)
        return None
    return None if found is None else load_tokenizer(found, "CLIP")


def load_tokenizer(folder: str | Path, kind: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder, or of CLIP's bpe_simple_vocab_16e6.txt.gz; no code of the folder is run.

    Raises FileNotFoundError if the folder holds none, ValueError naming the folder for one that cannot be used.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    path = Path(folder)
    if path.name == BPE and path.is_file():
        with TemporaryDirectory() as written:
            _write_clip(path, Path(written))
            return load_tokenizer(written, kind)
    names = ("tokenizer.json", "spiece.model", "vocab.json")
    if not any((path / name).is_file() for name in names):
        raise FileNotFoundError(f"no {kind} tokenizer in {path}: expected a folder with {', '.join(names[:-1])} or "
                                f"{names[-1]}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of transformers, tokenizers or sentencepiece: each has its own
        raise ValueError(f"the {kind} tokenizer in {path} cannot be read ({type(error).__name__}: {error}): fetch all "
                         "of the tokenizer's files again") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.pad_token is None:
        raise ValueError(f"the {kind} tokenizer in {path} has no padding token: fetch all of the tokenizer's files")
    return tokenizer


def _write_clip(bpe: Path, folder: Path) -> None:
    """CLIP's merges as the files of a tokenizer folder, which every version of transformers reads.

    The vocabulary: 256 bytes as the letters that stand for them, the same at a word's end, what the merges make, and
    the two ends of a text, 49,408 in all.
    """
    merges = gzip.decompress(bpe.read_bytes()).decode("utf-8").split("\n")[1:CLIP_VOCABULARY - 512 - 2 + 1]
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    words = [*letters, *(f"{x}</w>" for x in letters), *(merge.replace(" ", "") for merge in merges), *ENDS]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": ENDS[0], "eos_token": ENDS[1],
              "unk_token": ENDS[1], "pad_token": ENDS[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", known: int, kind: str, folder: str | Path | None) -> None:
    """Raises ValueError for a tokenizer with more tokens than its model knows."""
    if len(tokenizer) > known:
        raise ValueError(f"the {kind} tokenizer in {folder} has {len(tokenizer)} tokens, the model knows {known}: "
                         "they belong to different models")


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: str, special: bool = True) -> list[int]:
    """The tokens of a text, with the begin and end tokens or without."""
    with _TOKENIZING:
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def tokenize(tokenizer: "PreTrainedTokenizerBase", texts: list[str], length: int | None) -> "BatchEncoding":
    """Token ids and attention mask, and offsets if there are; padded to the longest, or truncated too to a length."""
    if length is not None and length < 1:
        raise ValueError(f"max_length must be at least 1, or None for the real tokens only, got {length}")
    offsets = tokenizer.is_fast
    if length is None:
        with _TOKENIZING:
            return tokenizer(texts, padding="longest", truncation=False, return_tensors="pt", verbose=False,
                             return_offsets_mapping=offsets)
    with _TOKENIZING:
        counts = [len(tokenizer(text, verbose=False).input_ids) for text in texts]
        batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt",
                          return_offsets_mapping=offsets)
    for text, count in zip(texts, counts):
        _warn_of_lost(text, count, length)
    return batch


def cut(ids: list[int], length: int, text: str) -> list[int]:
    """The first tokens of a text, with a warning if there are more."""
    _warn_of_lost(text, len(ids), length)
    return ids[:length]


def _warn_of_lost(text: str, count: int, length: int) -> None:
    if count > length:
        warnings.warn(f"the prompt has {count} tokens and {length} are read: what follows is lost, from "
                      f"{text[:60]!r}...", stacklevel=4)
