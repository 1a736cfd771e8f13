"""Prompts to features: T5 for ELLA, CLIP for plain Stable Diffusion."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

if TYPE_CHECKING:  # transformers takes seconds to import: it is loaded when a text encoder is
    from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """What a text encoder says about prompts: tokens [B, L, D] and which of them are seen, and how strongly.

    mask [B, L]: bool, True at positions that are seen; or floats >= 0, the factor by which the attention to a position
    is multiplied (0 unseen, 1 plain; see `ella_kd.models.layers.attend`). None: every position is seen.
    """

    tokens: Tensor
    mask: Tensor | None = None


class T5TextEncoder:
    """The encoder half of a T5 and its tokenizer: ELLA's text encoder is `flan-t5-xl`, features [B, L, 2048]."""

    def __init__(self, model: "T5EncoderModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype | None = None,
                    device: str | torch.device = "cpu") -> "T5TextEncoder":
        """Read a T5 folder (config.json, weights, tokenizer), the encoder alone or the whole model; nothing is fetched.

        dtype None: fp32 on a CPU, where fp16 runs hundreds of times slower, fp16 elsewhere. Every tensor is cast, `wo`
        included, as ELLA did in training; `from_pretrained(dtype=float16)` keeps `wo` in fp32. bf16 warns: its pictures
        differ visibly (ELLA issue 23). Raises FileNotFoundError, or ValueError for weights that do not fit.
        """
        from transformers import T5EncoderModel

        path = Path(folder)
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"no T5 model in {path}: expected a folder with config.json, the weights and the "
                                    "tokenizer, such as a copy of google/flan-t5-xl")
        if dtype == torch.bfloat16:
            warnings.warn("T5 in bf16 changes ELLA's pictures visibly: it was trained on fp16 features", stacklevel=2)
        tokenizer = load_tokenizer(path, "T5")
        if not any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
            raise FileNotFoundError(f"no weights in {path}: expected .safetensors or .bin files beside config.json")
        try:  # mismatches are not ignored: they are collected, and refused below with the rest
            loaded: Any = T5EncoderModel.from_pretrained(path, local_files_only=True, dtype=torch.float32,
                                                         output_loading_info=True, ignore_mismatched_sizes=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"the weights in {path} cannot be read: {error}") from error
        model, info = loaded
        extra = [name for name in info["unexpected_keys"] if not name.startswith(("decoder.", "lm_head."))]
        wrong = [*map(str, sorted(info["missing_keys"])), *map(str, sorted(info["mismatched_keys"])), *sorted(extra)]
        if wrong:
            raise ValueError(f"the weights in {path} are not the T5 that its config.json describes: missing, misshapen "
                             f"or unexpected are {', '.join(wrong[:5])}" + ", ..." * (len(wrong) > 5))
        return cls(model.to(device, dtype or default_dtype(device)).eval().requires_grad_(False), tokenizer)

    @torch.no_grad()
    def __call__(self, prompts: str | Sequence[str], max_length: int | None = None) -> TextFeatures:
        """Prompts -> features [B, L, D].

        max_length None, ELLA's *flexible* mode: the real tokens and nothing else, however many; "" is one token
        (`</s>`); a batch is padded to its longest prompt, and the mask says where. A number (ELLA: 128) is the *fixed*
        mode: padded or, with a warning, truncated to that length; T5 is told what is padding but the mask is None,
        because the connector was trained to read all 128 positions. Raises TypeError or ValueError for bad prompts.
        """
        texts = _as_list(prompts)
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, or None for the real tokens only, got {max_length}")
        ids, mask = _tokenize(self.tokenizer, texts, max_length, self.model.device)
        tokens = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return TextFeatures(tokens, mask.bool() if max_length is None else None)


class CLIPTextEncoder:
    """CLIP's text model and its tokenizer, as Stable Diffusion 1.x uses them: features [B, 77, 768]."""

    def __init__(self, model: "CLIPTextModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        self.model = model
        self.tokenizer = tokenizer

    @torch.no_grad()
    def __call__(self, prompts: str | Sequence[str]) -> TextFeatures:
        """Prompts -> the last hidden state, after the final layer norm; every position is seen, padding included.

        Padded to the model's positions (77); longer prompts are truncated with a warning. Raises TypeError or
        ValueError for bad prompts.
        """
        length = self.model.config.max_position_embeddings
        ids, _ = _tokenize(self.tokenizer, _as_list(prompts), length, self.model.device)
        return TextFeatures(self.model(input_ids=ids).last_hidden_state)


def load_tokenizer(folder: str | Path, kind: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder; nothing is fetched. Raises FileNotFoundError if the folder holds none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    path = Path(folder)
    names = ("tokenizer.json", "spiece.model", "vocab.json")
    if not any((path / name).is_file() for name in names):
        raise FileNotFoundError(f"no {kind} tokenizer in {path}: expected a folder with {', '.join(names[:-1])} or "
                                f"{names[-1]}")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def default_dtype(device: str | torch.device) -> torch.dtype:
    """fp32 on a CPU, fp16 elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


def _as_list(prompts: str | Sequence[str]) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("at least one prompt is needed, got an empty list")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"prompts must be strings, got {type(text).__name__}")
    return texts


def _tokenize(tokenizer: "PreTrainedTokenizerBase", texts: list[str], length: int | None,
              device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, padded to the longest text, or padded and truncated to a length."""
    if length is None:
        batch = tokenizer(texts, padding="longest", truncation=False, return_tensors="pt", verbose=False)
    else:
        for text in texts:
            count = len(tokenizer(text, verbose=False).input_ids)
            if count > length:
                warnings.warn(f"the prompt has {count} tokens and {length} are read: what follows is lost, from "
                              f"{text[:60]!r}...", stacklevel=3)
        batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return batch.input_ids.to(device), batch.attention_mask.to(device)
