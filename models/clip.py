"""Prompts to features by CLIP: for plain Stable Diffusion, and for the vector that SDXL sees beside any prompt."""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ella_kd.models.addons.embeddings import PAIR, Embedding
from ella_kd.models.devices import place_of
from ella_kd.models.emphasis import Piece, chunks
from ella_kd.models.shapes import Shapes, count_of, shape_of
from ella_kd.models.text import TextFeatures, as_list
from ella_kd.models.tokenizers import cut, token_ids, tokenize
from ella_kd.models.words import Word, units, with_vectors, word

if TYPE_CHECKING:  # transformers takes seconds to import: it is loaded when a text encoder is
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

COMMA_BACKTRACK = 20  # A1111's default


class CLIPTextEncoder:
    """A CLIP text model and its tokenizer, in the way that a family uses them: features [B, 77, D].

    layer: the one whose hidden states are shown, counted from the last, 1; norm: after the final layer norm; pad: the
    token behind a prompt's end, None for the tokenizer's own; pooled: give the last layer at the end token too,
    projected, as the features' vector (the model is a CLIPTextModelWithProjection). As written, Stable Diffusion 1.x;
    `sd2` and `big_g` are the others. words: those that it has learned (`with_embeddings`).
    """

    words: tuple[Word, ...] = ()

    def __init__(self, model: "CLIPTextModel | CLIPTextModelWithProjection", tokenizer: "PreTrainedTokenizerBase", *,
                 layer: int = 1, norm: bool = True, pad: int | None = None, pooled: bool = False) -> None:
        if pooled and not hasattr(model, "text_projection"):
            raise ValueError(f"a pooled text needs a CLIPTextModelWithProjection, got {type(model).__name__}")
        self.model = model
        self.tokenizer = _without_pad_word(tokenizer)
        self.layer, self.norm, self.pooled = layer, norm, pooled
        self.pad: Any = tokenizer.pad_token_id if pad is None else pad

    @property
    def vector_dim(self) -> int | None:
        """The width of the features' vector; None if there is none."""
        return self.model.config.projection_dim if self.pooled else None

    @classmethod
    def sd2(cls, model: "CLIPTextModel", tokenizer: "PreTrainedTokenizerBase") -> Self:
        """OpenCLIP's ViT-H, Stable Diffusion 2.x: the layer before the last of 24, normed. A file may lack the last."""
        return cls(model, tokenizer, layer=2 if model.config.num_hidden_layers == 24 else 1, pad=0)

    @classmethod
    def big_g(cls, model: "CLIPTextModelWithProjection", tokenizer: "PreTrainedTokenizerBase") -> Self:
        """OpenCLIP's ViT-bigG, SDXL's second encoder and the refiner's only one: the layer before the last as it is."""
        return cls(model, tokenizer, layer=2, norm=False, pad=0, pooled=True)

    def __repr__(self) -> str:
        config = self.model.config
        return (f"CLIPTextEncoder(width {config.hidden_size}, {config.num_hidden_layers} layers, "
                f"{place_of(self.model)})")

    def __call__(self, prompts: str | Sequence[str], clip_skip: int = 1) -> TextFeatures:
        """Prompts -> the hidden states [B, 77, D] of a layer; every position is seen.

        clip_skip counts layers from the one that the UNet was trained with, 1: SD1.x's last, SD2's and SDXL's last but
        one. diffusers' clip_skip is one less in every family, A1111's the same for SD1.x. The vector does not skip.
        Padded to the model's positions (77); longer prompts are truncated with a warning: `weighted` has no limit.
        Raises TypeError or ValueError for bad prompts, ValueError for a layer that does not exist.
        """
        texts, length = as_list(prompts), self.model.config.max_position_embeddings
        if self.words:
            rows = [[token for unit in units(self.tokenizer, text, self.words) for token in unit] for text in texts]
            rows = [cut(row, length - self._ends, text) for row, text in zip(rows, texts)]
            ids = torch.tensor([[token for token, _ in self._chunk([(x, 1.0) for x in row])] for row in rows])
        else:
            batch = tokenize(self.tokenizer, texts, length)
            ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, self.pad)
        hidden, vector = self._hidden(ids, clip_skip)
        return TextFeatures(hidden, vector=vector)

    def weighted(self, prompts: str | Sequence[str], clip_skip: int = 1) -> TextFeatures:
        """Prompts of any length, with weights (`ella_kd.models.emphasis`), as A1111 reads them -> [B, 77 n, D].

        The text between BREAKs is cut into chunks of 75 tokens, each with its own begin and end token and padded; a
        chunk that would end less than 20 tokens after a comma ends at that comma. Every chunk is encoded on its own:
        z = w h for the hidden states h and the tokens' weights w, and z times mean(h) / mean(z) over the chunk (times 1
        where a mean is nothing but rounding: below 1e-4 of the root mean square).
        n is the most chunks of a row. Rows with fewer have empty chunks in their place, which the mask hides, so that
        a batch equals a loop of singles; no mask if all rows have n. The vector is the first chunk's, without weights.
        Raises as `__call__` does, and ValueError for prompt editing.
        """
        rows = [self._chunks(prompt) for prompt in as_list(prompts)]
        n = max(map(len, rows))
        counts = torch.tensor([len(row) for row in rows], device=self.model.device)
        padded = [row + [self._chunk([])] * (n - len(row)) for row in rows]
        ids = torch.tensor([[token for chunk in row for token, _ in chunk] for row in padded])
        weights = torch.tensor([[weight for chunk in row for _, weight in chunk] for row in padded])
        length = self.model.config.max_position_embeddings
        hidden, vector = self._hidden(ids.view(-1, length), clip_skip)
        weights = weights.view(-1, length, 1).to(hidden.device)
        scaled = _restore_mean(hidden.float() * weights, hidden.float()).to(hidden.dtype)
        tokens = torch.where(weights.eq(1).all(1, keepdim=True), hidden, scaled).view(len(rows), n * length, -1)
        vector = None if vector is None else vector[::n]
        if len({*map(len, rows)}) == 1:
            return TextFeatures(tokens, vector=vector)
        mask = torch.arange(n * length, device=tokens.device) < length * counts[:, None]
        return TextFeatures(tokens, mask, vector)

    def moved(self, move: Callable[[Any], Any]) -> Self:
        """The same encoder around `move(model)`."""
        twin = copy.copy(self)
        twin.model = move(self.model)
        return twin

    def with_embeddings(self, embeddings: Iterable[Embedding], *halves: str) -> Self:
        """A twin that knows these words beside its own; it shares every tensor. None: the encoder itself.

        A word is called by its name in a text, in any case, or by `embedding:name`; its n vectors take the places of n
        tokens, are never parted by a chunk's end, and have the weight of what calls them. halves: whose vectors of a
        pair are taken. Raises ValueError for another model's embedding, two of one name, and more vectors than a chunk
        has places.
        """
        new = list(embeddings)
        if not new:
            return self
        table: Any = self.model.get_input_embeddings()
        vectors = [each.fitting(table.embedding_dim, *(halves or ("", PAIR[1])[:1 + self.pooled])) for each in new]
        room = self.model.config.max_position_embeddings - self._ends
        words, first = list(self.words), table.num_embeddings + sum(len(each.ids) for each in self.words)
        for each in new:
            if each.name.lower() in {known.name.lower() for known in words}:
                raise ValueError(f"there are two embeddings of the name {each.name}: rename one, its name is the word")
            if len(each) > room:
                raise ValueError(f"the embedding {each.name} has {len(each)} vectors: a chunk of this text encoder has "
                                 f"places for {room}")
            words.append(word(self.tokenizer, each.name, range(first, first + len(each))))
            first += len(each)
        twin = self.moved(lambda model: with_vectors(model, torch.cat([x.to(table.weight) for x in vectors])))
        twin.words = tuple(words)
        return twin

    @property
    def _ends(self) -> int:
        """The tokens that begin and end every chunk."""
        return len(token_ids(self.tokenizer, ""))

    @torch.no_grad()
    def _hidden(self, ids: Tensor, clip_skip: int) -> tuple[Tensor, Tensor | None]:
        """Token ids [N, L] -> hidden states [N, L, D], and the vector [N, P] of a pooled encoder."""
        most = self.model.config.num_hidden_layers - self.layer + 1
        if not 1 <= clip_skip <= most:
            raise ValueError(f"clip_skip must be from 1 (the layer that the UNet knows) to {most}, got {clip_skip}")
        body: Any = getattr(self.model, "text_model", self.model)  # transformers 5 has it with a projection only
        ids, back = ids.to(self.model.device), self.layer + clip_skip - 1
        said = self.model(input_ids=ids, output_hidden_states=back > 1 or not self.norm)
        if back == 1 and self.norm:
            hidden = said.last_hidden_state
        else:
            hidden = said.hidden_states[-back]
            hidden = body.final_layer_norm(hidden) if self.norm else hidden
        if not self.pooled:
            return hidden, None
        end = ids.eq(token_ids(self.tokenizer, "")[-1]).int().argmax(1)  # the first, where the padding is the same
        last = said.last_hidden_state[torch.arange(len(ids), device=ids.device), end]
        return hidden, self.model.text_projection(last)  # type: ignore[operator]

    def _chunks(self, prompt: str) -> list[list[tuple[int, float]]]:
        """The chunks of a prompt, each the model's number of (token, weight)."""
        return [self._chunk(part) for pieces in chunks(prompt) for part in self._split(pieces)]

    def _split(self, pieces: list[Piece]) -> list[list[tuple[int, float]]]:
        """Pieces -> the tokens of each chunk, none empty unless it is the only one."""
        room = self.model.config.max_position_embeddings - self._ends
        comma = tuple(token_ids(self.tokenizer, ",", special=False))
        parts: list[list[tuple[int, float]]] = [[]]
        after = 0  # the place after the part's last comma, 0 without one
        for unit, weight in ((unit, weight) for text, weight in pieces
                             for unit in units(self.tokenizer, text, self.words)):
            part = parts[-1]
            if len(part) == room and unit != comma and after and room - after < COMMA_BACKTRACK:
                parts.append(part[after:])
                del part[after:]
                after = 0
            if len(parts[-1]) + len(unit) > room:
                parts.append([])
                after = 0
            parts[-1] += [(token, weight) for token in unit]
            after = len(parts[-1]) if unit == comma else after
        return parts

    def _chunk(self, part: list[tuple[int, float]]) -> list[tuple[int, float]]:
        """With begin token, end token and padding, all of weight 1."""
        *begin, end = token_ids(self.tokenizer, "")
        ids = [*((token, 1.0) for token in begin), *part, (end, 1.0)]
        return ids + [(self.pad, 1.0)] * (self.model.config.max_position_embeddings - len(ids))


class TwoTextEncoders:
    """SDXL's: the tokens of both, beside each other in width, 768 + 1280, and the second's vector."""

    def __init__(self, first: CLIPTextEncoder, second: CLIPTextEncoder) -> None:
        self.first, self.second = first, second

    @classmethod
    def sdxl(cls, clip_l: "CLIPTextModel", big_g: "CLIPTextModelWithProjection", tokenizer: "PreTrainedTokenizerBase",
             tokenizer_2: "PreTrainedTokenizerBase | None" = None) -> Self:
        """SDXL's base model. Both read the same words and differ in padding, so one tokenizer serves both."""
        return cls(CLIPTextEncoder(clip_l, tokenizer, layer=2, norm=False),
                   CLIPTextEncoder.big_g(big_g, tokenizer_2 or tokenizer))

    @property
    def vector_dim(self) -> int | None:
        return self.second.vector_dim

    @property
    def model(self) -> nn.Module:
        """Both networks."""
        return nn.ModuleList([self.first.model, self.second.model])

    def __repr__(self) -> str:
        return f"TwoTextEncoders({self.first}, {self.second})"

    def __call__(self, prompts: str | Sequence[str], clip_skip: int = 1) -> TextFeatures:
        """As of each: `CLIPTextEncoder`."""
        return _beside(self.first(prompts, clip_skip), self.second(prompts, clip_skip))

    def weighted(self, prompts: str | Sequence[str], clip_skip: int = 1) -> TextFeatures:
        """As of each: `CLIPTextEncoder.weighted`; weights act in each alone."""
        return _beside(self.first.weighted(prompts, clip_skip), self.second.weighted(prompts, clip_skip))

    def moved(self, move: Callable[[Any], Any]) -> Self:
        """The same encoders around `move(model)`."""
        return type(self)(self.first.moved(move), self.second.moved(move))

    def with_embeddings(self, embeddings: Iterable[Embedding]) -> Self:
        """As of each: `CLIPTextEncoder.with_embeddings`; an embedding has vectors for both."""
        new = list(embeddings)
        halves = (each.with_embeddings(new, half) for each, half in zip((self.first, self.second), PAIR))
        return type(self)(*halves) if new else self


def clip_text_model(shapes: Shapes, act: str | None = None) -> "CLIPTextModel | CLIPTextModelWithProjection":
    """A text model of these shapes, in HF's names without `text_model.`; with a projection if there is one.

    Heads have 64 channels in all of them. act, the activation, is not in the shapes: None is OpenAI's quick_gelu for
    CLIP-L's width, 768 or less, and OpenCLIP's gelu above. Raises ValueError naming a tensor that is missing.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocabulary, width = shape_of(shapes, "embeddings.token_embedding.weight", 2)
    projected = "text_projection.weight" in shapes
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, num_attention_heads=max(width // 64, 1),
        projection_dim=shape_of(shapes, "text_projection.weight", 2)[0] if projected else width,
        intermediate_size=shape_of(shapes, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=count_of(shapes, "encoder.layers"),
        max_position_embeddings=shape_of(shapes, "embeddings.position_embedding.weight", 2)[0],
        hidden_act=act or ("quick_gelu" if width <= 768 else "gelu"),
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=0)
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def _beside(a: TextFeatures, b: TextFeatures) -> TextFeatures:
    if a.tokens.shape[1] != b.tokens.shape[1]:
        raise ValueError(f"two text encoders of one UNet read as many tokens, got {a.tokens.shape[1]} and "
                         f"{b.tokens.shape[1]}: they need tokenizers of one vocabulary")
    return TextFeatures(torch.cat([a.tokens, b.tokens], 2), a.mask, b.vector)


def _restore_mean(z: Tensor, h: Tensor) -> Tensor:
    """z [N, L, D] with each mean over (L, D) brought back to that of h, unless one of them is zero but for rounding."""
    mean, target = (x.mean((1, 2), keepdim=True) for x in (z, h))
    known = torch.minimum(mean.abs(), target.abs()) > 1e-4 * h.square().mean((1, 2), keepdim=True).sqrt()
    return z * torch.where(known, target / mean, 1.0)


def _without_pad_word(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The tokenizer with "!" as a word: those published with SD2 and SDXL pad with it, and so read every "!" of a
    prompt as padding, id 0, where training had 256."""
    if tokenizer.pad_token != "!" or not tokenizer.is_fast:
        return tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend: Any = tokenizer
    content = json.loads(backend.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "!"]
    content |= {"padding": None, "truncation": None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)),
                                   bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
                                   unk_token=tokenizer.unk_token, pad_token=tokenizer.eos_token)
