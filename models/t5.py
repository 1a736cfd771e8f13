"""Prompts to features by T5, for ELLA."""

import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

import torch

from ella_kd.models.devices import check_device, check_dtype, place_of
from ella_kd.models.emphasis import Piece, parse
from ella_kd.models.text import TextFeatures, as_list
from ella_kd.models.tokenizers import check_vocabulary, load_tokenizer, tokenize

if TYPE_CHECKING:  # transformers takes seconds to import: it is loaded when a text encoder is
    from transformers import BatchEncoding, PreTrainedTokenizerBase, T5EncoderModel


class T5TextEncoder:
    """The encoder half of a T5 and its tokenizer: ELLA's text encoder is `flan-t5-xl`, features [B, L, 2048]."""

    def __init__(self, model: "T5EncoderModel", tokenizer: "PreTrainedTokenizerBase",
                 again: "Callable[[], T5EncoderModel] | None" = None) -> None:
        """again: reads the model once more, after `release`; None: it stays."""
        self.tokenizer = tokenizer
        self._model: T5EncoderModel | None = model
        self._again, self._moving = again, Lock()
        self._back: torch.device | None = None  # where it runs, while it waits elsewhere

    @property
    def model(self) -> "T5EncoderModel":
        """The network, back where it was if it was released; once, whichever thread asks."""
        with self._moving:
            if self._model is None:
                assert self._again is not None
                self._model = self._again()
            if self._back is not None:
                self._model.to(self._back)  # type: ignore[arg-type]
                self._back = None
            return self._model

    @property
    def loaded(self) -> bool:
        """Whether the network is in memory."""
        return self._model is not None

    def release(self, rest: torch.device | None = None) -> None:
        """Let the network go until the next prompt: to the device `rest`, or None: out of memory, if it can be read
        again. Not while another thread encodes."""
        with self._moving:
            if self._model is None or self._back is not None:
                return
            if rest is not None:
                self._back = self._model.device
                self._model.to(rest)  # type: ignore[arg-type]
            elif self._again is not None:
                self._model = None

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: str | torch.dtype | None = None,
                    device: str | torch.device = "cpu") -> "T5TextEncoder":
        """Read a T5 folder (config.json, weights, tokenizer), the encoder alone or the whole model; nothing is fetched.

        dtype None: fp32 on a CPU, where fp16 runs hundreds of times slower, fp16 elsewhere. Every tensor is cast, `wo`
        included, as ELLA did in training; `from_pretrained(dtype=float16)` keeps `wo` in fp32. bf16 warns: its pictures
        differ visibly (ELLA issue 23). Raises FileNotFoundError, or ValueError naming the folder for a config, weights
        or a tokenizer that are damaged, of another kind, or do not fit each other.
        """
        from transformers import T5EncoderModel

        device = check_device(device)
        kind = check_dtype(dtype, device)
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"no T5 model in {path}: expected a folder with config.json, the weights and the "
                                    "tokenizer, such as a copy of google/flan-t5-xl")
        _check_t5_config(path / "config.json")
        if kind == torch.bfloat16:
            warnings.warn("T5 in bf16 changes ELLA's pictures visibly: it was trained on fp16 features", stacklevel=2)
        tokenizer = load_tokenizer(path, "T5")
        if not any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
            raise FileNotFoundError(f"no weights in {path}: expected .safetensors or .bin files beside config.json")
        try:  # mismatches are not ignored: they are collected, and refused below with the rest
            loaded: Any = T5EncoderModel.from_pretrained(path, local_files_only=True, dtype=kind,
                                                         output_loading_info=True, ignore_mismatched_sizes=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"the weights in {path} cannot be read: they hold Python objects, which may run code; use "
                             "the .safetensors version of this model") from error
        except Exception as error:  # of transformers, safetensors or torch: each has its own
            raise ValueError(f"the weights in {path} cannot be read ({type(error).__name__}: {error}): fetch them "
                             "again, as .safetensors") from error
        model, info = loaded
        extra = [name for name in info["unexpected_keys"] if not name.startswith(("decoder.", "lm_head."))]
        wrong = [*map(str, sorted(info["missing_keys"])), *map(str, sorted(info["mismatched_keys"])), *sorted(extra)]
        if wrong:
            raise ValueError(f"the weights in {path} are not the T5 that its config.json describes: missing, misshapen "
                             f"or unexpected are {', '.join(wrong[:5])}" + ", ..." * (len(wrong) > 5))
        check_vocabulary(tokenizer, model.config.vocab_size, "T5", path)
        model = model.to(device, kind).eval().requires_grad_(False)  # kind again: some stay float32 by its config
        return cls(model, tokenizer, lambda: cls.from_folder(path, kind, device).model)

    def moved(self, move: "Callable[[T5EncoderModel], T5EncoderModel]") -> Self:
        """The same encoder around `move(model)`."""
        again = self._again
        return type(self)(move(self.model), self.tokenizer, None if again is None else lambda: move(again()))

    def __repr__(self) -> str:
        if not self.loaded:
            return "T5TextEncoder(not in memory)"
        config = self.model.config
        return f"T5TextEncoder(width {config.d_model}, {config.num_layers} layers, {place_of(self.model)})"

    def __call__(self, prompts: str | Sequence[str], max_length: int | None = None) -> TextFeatures:
        """Prompts -> features [B, L, D].

        max_length None, ELLA's *flexible* mode: the real tokens and nothing else, however many; "" is one token
        (`</s>`); a batch is padded to its longest prompt, and the mask says where. A number (ELLA: 128) is the *fixed*
        mode: padded or, with a warning, truncated to that length; T5 is told what is padding but the mask is None,
        because the connector was trained to read all 128 positions. Raises TypeError or ValueError for bad prompts.
        """
        return self._encode(tokenize(self.tokenizer, as_list(prompts), max_length), max_length)

    def weighted(self, prompts: str | Sequence[str], max_length: int | None = None) -> TextFeatures:
        """Prompts with weights, "a (red:1.3) car" (`ella_kd.models.emphasis`) -> features with attention weights.

        The features are those that `__call__` gives for the text without the marks; the mask is float32, the weight of
        each token: the mean over the characters that it stands for, 1 for `</s>`, and for padding 0, in fixed mode 1.
        (The connector's LayerNorm undoes a scaling of the features; only attention can be weighted.) If every weight
        is 1 the result is `__call__`'s own. Raises as `__call__` does, and ValueError for prompt editing, for weights
        below 0, and for a tokenizer that cannot say which characters a token stands for.
        """
        pieces = [parse(prompt) for prompt in as_list(prompts)]
        for text, weight in (piece for row in pieces for piece in row):
            if weight < 0:
                raise ValueError(f"attention weights must be at least 0, {text[:60]!r} has {weight:g}: to draw the "
                                 "opposite of a prompt, give it a negative weight in a composition")
        batch = tokenize(self.tokenizer, ["".join(text for text, _ in row) for row in pieces], max_length)
        features = self._encode(batch, max_length)
        if all(weight == 1 for row in pieces for _, weight in row):
            return features
        if not batch.is_fast:
            raise ValueError("this tokenizer does not tell which characters a token stands for, so words cannot be "
                             "weighted: use a T5 folder with a tokenizer.json")
        hidden = 0.0 if max_length is None else 1.0
        rows = [[_token_weight(start, end, row) if seen else hidden for (start, end), seen in zip(offsets, mask)]
                for offsets, mask, row in zip(batch["offset_mapping"].tolist(), batch["attention_mask"].tolist(),
                                              map(_character_weights, pieces))]
        return TextFeatures(features.tokens, torch.tensor(rows, dtype=torch.float32, device=features.tokens.device))

    @torch.no_grad()
    def _encode(self, batch: "BatchEncoding", max_length: int | None) -> TextFeatures:
        ids, mask = (batch[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        tokens = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return TextFeatures(tokens, mask.bool() if max_length is None else None)


def _check_t5_config(path: Path) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from error
    kind = config.get("model_type", "t5") if isinstance(config, dict) else config
    if "t5" not in str(kind):
        raise ValueError(f"{path} describes a model of type {kind!r:.60}, expected a T5 such as google/flan-t5-xl")
    from transformers import T5Config

    try:
        T5Config.from_pretrained(path.parent, local_files_only=True)
    except Exception as error:  # what its values make transformers raise
        raise ValueError(f"{path} holds values that a T5 cannot have ({error}): fetch it again") from error


def _character_weights(pieces: list[Piece]) -> list[tuple[str, float]]:
    return [(character, weight) for text, weight in pieces for character in text]


def _token_weight(start: int, end: int, characters: list[tuple[str, float]]) -> float:
    """The mean weight of a token's characters, without the white space that some tokenizers count in; 1 for none."""
    covered = characters[start:end]
    weights = [weight for character, weight in covered if not character.isspace()] or [weight for _, weight in covered]
    return sum(weights) / len(weights) if weights else 1.0
