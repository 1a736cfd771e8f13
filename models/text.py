"""Prompts to features: T5 for ELLA, CLIP for plain Stable Diffusion."""

import json
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ella_kd.models.attention import check_mask
from ella_kd.models.devices import check_device, check_dtype, place_of
from ella_kd.models.emphasis import Piece, chunks, parse
from ella_kd.models.tokenizers import check_vocabulary, load_tokenizer, token_ids, tokenize

if TYPE_CHECKING:  # transformers takes seconds to import: it is loaded when a text encoder is
    from transformers import BatchEncoding, CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel


COMMA_BACKTRACK = 20  # A1111's default


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """What a text encoder says about prompts: tokens [B, L, D] and which of them are seen, and how strongly.

    mask [B, L]: bool, True at positions that are seen; or floats >= 0, the factor by which the attention to a position
    is multiplied (0 unseen, 1 plain; see `ella_kd.models.attention.attend`). None: every position is seen.
    """

    tokens: Tensor
    mask: Tensor | None = None

    def __repr__(self) -> str:
        shapes = [f"{name} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
                  for name, x in (("tokens", self.tokens), ("mask", self.mask)) if x is not None]
        return f"TextFeatures({', '.join(shapes)})"


def check_features(features: TextFeatures) -> None:
    """Raises ValueError unless tokens are floats [B, L, D], none of the three 0, and the mask fits (`check_mask`)."""
    tokens = features.tokens
    if tokens.ndim != 3 or 0 in tokens.shape or not tokens.is_floating_point():
        raise ValueError("text features must be floats [B, L, D] with B and L at least 1, got "
                         f"{tokens.dtype} {list(tokens.shape)}")
    check_mask(features.mask, tokens)


class T5TextEncoder:
    """The encoder half of a T5 and its tokenizer: ELLA's text encoder is `flan-t5-xl`, features [B, L, 2048]."""

    def __init__(self, model: "T5EncoderModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        self.model = model
        self.tokenizer = tokenizer

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
            loaded: Any = T5EncoderModel.from_pretrained(path, local_files_only=True, dtype=torch.float32,
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
        return cls(model.to(device, kind).eval().requires_grad_(False), tokenizer)

    def __repr__(self) -> str:
        config = self.model.config
        return f"T5TextEncoder(width {config.d_model}, {config.num_layers} layers, {place_of(self.model)})"

    def __call__(self, prompts: str | Sequence[str], max_length: int | None = None) -> TextFeatures:
        """Prompts -> features [B, L, D].

        max_length None, ELLA's *flexible* mode: the real tokens and nothing else, however many; "" is one token
        (`</s>`); a batch is padded to its longest prompt, and the mask says where. A number (ELLA: 128) is the *fixed*
        mode: padded or, with a warning, truncated to that length; T5 is told what is padding but the mask is None,
        because the connector was trained to read all 128 positions. Raises TypeError or ValueError for bad prompts.
        """
        return self._encode(tokenize(self.tokenizer, _as_list(prompts), max_length), max_length)

    def weighted(self, prompts: str | Sequence[str], max_length: int | None = None) -> TextFeatures:
        """Prompts with weights, "a (red:1.3) car" (`ella_kd.models.emphasis`) -> features with attention weights.

        The features are those that `__call__` gives for the text without the marks; the mask is float32, the weight of
        each token: the mean over the characters that it stands for, 1 for `</s>`, and for padding 0, in fixed mode 1.
        (The connector's LayerNorm undoes a scaling of the features; only attention can be weighted.) If every weight
        is 1 the result is `__call__`'s own. Raises as `__call__` does, and ValueError for prompt editing, for weights
        below 0, and for a tokenizer that cannot say which characters a token stands for.
        """
        pieces = [parse(prompt) for prompt in _as_list(prompts)]
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


class CLIPTextEncoder:
    """CLIP's text model and its tokenizer, as Stable Diffusion 1.x uses them: features [B, 77, 768]."""

    def __init__(self, model: "CLIPTextModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        self.model = model
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        config = self.model.config
        return (f"CLIPTextEncoder(width {config.hidden_size}, {config.num_hidden_layers} layers, "
                f"{place_of(self.model)})")

    def __call__(self, prompts: str | Sequence[str], clip_skip: int = 1) -> TextFeatures:
        """Prompts -> the hidden states [B, 77, 768] of a layer, after the final layer norm; every position is seen.

        clip_skip counts layers from the last, 1, as A1111 does (diffusers calls the same layer clip_skip=0 or None, and
        our 2 its 1). Padded to the model's positions (77); longer prompts are truncated with a warning: `weighted` has
        no limit. Raises TypeError or ValueError for bad prompts, ValueError for a layer that does not exist.
        """
        length = self.model.config.max_position_embeddings
        return TextFeatures(self._hidden(tokenize(self.tokenizer, _as_list(prompts), length)["input_ids"], clip_skip))

    def weighted(self, prompts: str | Sequence[str], clip_skip: int = 1) -> TextFeatures:
        """Prompts of any length, with weights (`ella_kd.models.emphasis`), as A1111 reads them -> [B, 77 n, 768].

        The text between BREAKs is cut into chunks of 75 tokens, each with its own begin and end token and padded; a
        chunk that would end less than 20 tokens after a comma ends at that comma. Every chunk is encoded on its own:
        z = w h for the hidden states h and the tokens' weights w, and z times mean(h) / mean(z) over the chunk (times 1
        where a mean is nothing but rounding: below 1e-4 of the root mean square).
        n is the most chunks of a row. Rows with fewer have empty chunks in their place, which the mask hides, so that
        a batch equals a loop of singles; no mask if all rows have n. Raises as `__call__` does, and ValueError for
        prompt editing.
        """
        rows = [self._chunks(prompt) for prompt in _as_list(prompts)]
        n = max(map(len, rows))
        counts = torch.tensor([len(row) for row in rows], device=self.model.device)
        padded = [row + [self._chunk([])] * (n - len(row)) for row in rows]
        ids = torch.tensor([[token for chunk in row for token, _ in chunk] for row in padded])
        weights = torch.tensor([[weight for chunk in row for _, weight in chunk] for row in padded])
        length = self.model.config.max_position_embeddings
        hidden = self._hidden(ids.view(-1, length), clip_skip)
        weights = weights.view(-1, length, 1).to(hidden.device)
        scaled = _restore_mean(hidden.float() * weights, hidden.float()).to(hidden.dtype)
        tokens = torch.where(weights.eq(1).all(1, keepdim=True), hidden, scaled).view(len(rows), n * length, -1)
        if len({*map(len, rows)}) == 1:
            return TextFeatures(tokens)
        return TextFeatures(tokens, torch.arange(n * length, device=tokens.device) < length * counts[:, None])

    @torch.no_grad()
    def _hidden(self, ids: Tensor, clip_skip: int) -> Tensor:
        """Token ids [N, L] -> hidden states [N, L, D], normed."""
        layers = self.model.config.num_hidden_layers
        if not 1 <= clip_skip <= layers:
            raise ValueError(f"clip_skip must be from 1 (the last layer) to {layers}, got {clip_skip}")
        ids = ids.to(self.model.device)
        if clip_skip == 1:
            return self.model(input_ids=ids).last_hidden_state
        states = self.model(input_ids=ids, output_hidden_states=True).hidden_states
        norm = getattr(self.model, "text_model", self.model).final_layer_norm  # transformers 5 has no text_model
        return norm(states[-clip_skip])

    def _chunks(self, prompt: str) -> list[list[tuple[int, float]]]:
        """The chunks of a prompt, each the model's number of (token, weight)."""
        return [self._chunk(part) for pieces in chunks(prompt) for part in self._split(pieces)]

    def _split(self, pieces: list[Piece]) -> list[list[tuple[int, float]]]:
        """Pieces -> the tokens of each chunk, none empty unless it is the only one."""
        room = self.model.config.max_position_embeddings - len(token_ids(self.tokenizer, ""))
        comma = token_ids(self.tokenizer, ",", special=False)
        tokens = [(token, weight) for text, weight in pieces
                  for token in token_ids(self.tokenizer, text, special=False)]
        parts: list[list[tuple[int, float]]] = []
        while len(tokens) > room:
            commas = [i for i in range(max(room - COMMA_BACKTRACK, 0), room) if [tokens[i][0]] == comma]
            end = commas[-1] + 1 if commas and [tokens[room][0]] != comma else room
            parts.append(tokens[:end])
            tokens = tokens[end:]
        return [*parts, tokens]

    def _chunk(self, part: list[tuple[int, float]]) -> list[tuple[int, float]]:
        """With begin token, end token and padding, all of weight 1."""
        *begin, end = token_ids(self.tokenizer, "")
        ids = [*((token, 1.0) for token in begin), *part, (end, 1.0)]
        return ids + [(self.tokenizer.pad_token_id, 1.0)] * (self.model.config.max_position_embeddings - len(ids))


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


def _as_list(prompts: str | Sequence[str]) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("at least one prompt is needed, got an empty list")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"prompts must be strings, got {type(text).__name__}")
    return texts


def _restore_mean(z: Tensor, h: Tensor) -> Tensor:
    """z [N, L, D] with each mean over (L, D) brought back to that of h, unless one of them is zero but for rounding."""
    mean, target = (x.mean((1, 2), keepdim=True) for x in (z, h))
    known = torch.minimum(mean.abs(), target.abs()) > 1e-4 * h.square().mean((1, 2), keepdim=True).sqrt()
    return z * torch.where(known, target / mean, 1.0)


def _character_weights(pieces: list[Piece]) -> list[tuple[str, float]]:
    return [(character, weight) for text, weight in pieces for character in text]


def _token_weight(start: int, end: int, characters: list[tuple[str, float]]) -> float:
    """The mean weight of a token's characters, without the white space that some tokenizers count in; 1 for none."""
    covered = characters[start:end]
    weights = [weight for character, weight in covered if not character.isspace()] or [weight for _, weight in covered]
    return sum(weights) / len(weights) if weights else 1.0
