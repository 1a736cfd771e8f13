"""Tokenizers of text encoders: reading them, and calls that threads may make at once."""

import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # transformers takes seconds to import: it is loaded when a tokenizer is
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# A fast tokenizer keeps padding and truncation as its own state: unlocked, 10 of 600 calls by threads were wrong.
_TOKENIZING = threading.Lock()


def load_tokenizer(folder: str | Path, kind: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder; nothing is fetched, no code of the folder is run.

    Raises FileNotFoundError if the folder holds none, ValueError naming the folder for one that cannot be used.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    path = Path(folder)
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
        if count > length:
            warnings.warn(f"the prompt has {count} tokens and {length} are read: what follows is lost, from "
                          f"{text[:60]!r}...", stacklevel=3)
    return batch
