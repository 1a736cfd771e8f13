"""The miniature's text encoders: a T5 encoder that reads paragraphs and a CLIP-style encoder that reads tags.

Both are trained to know the scene: a probe with a query per place reads the whole scene out of the features, and every
word's feature must know everything about the thing it speaks of. The probe is thrown away afterwards.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from benchmarks.miniature import captions
from benchmarks.miniature.captions import Word
from benchmarks.miniature.loop import Stage
from benchmarks.miniature.scenes import BACKGROUND_NAMES, COLOUR_NAMES, FILLS, RIMS, SHAPES, Scene, Thing, random_scene
from ella_kd.models import CLIPTextEncoder, T5TextEncoder

WIDTH = 128
CLIP_LENGTH = 40  # room for the tags of four things; paragraphs are cut, as 77 tokens cut a dense prompt
PARAGRAPH = 128
#: What a probe reads of a thing: how many values each fact has, place last (a query per place knows that already).
VALUES = (len(SHAPES), len(COLOUR_NAMES), len(FILLS), len(RIMS), 9)
NOT_ASKED = -100
ALONE_UNTIL = 0.1  # before this share of the budget captions speak of one or two things


def _word_level(specials: list[str], template: str) -> Tokenizer:
    words = [*specials, *captions.vocabulary()]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, vocabulary[word]) for word in specials]
    )
    return tokenizer


def t5_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _word_level(["<pad>", "</s>", "<unk>"], "$A </s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=PARAGRAPH
    )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _word_level(["<bos>", "<eos>", "<unk>"], "<bos> $A <eos>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", unk_token="<unk>",
        model_max_length=CLIP_LENGTH,
    )  # fmt: skip


def t5_model() -> T5EncoderModel:
    """A small T5 encoder; three of its four heads begin by looking near, each further than the one before."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=WIDTH, d_kv=32, num_heads=4, d_ff=256, num_layers=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1, is_encoder_decoder=False,
        use_cache=False,
    )  # fmt: skip
    model: Any = T5EncoderModel(config)
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    distance = torch.arange(config.relative_attention_num_buckets) % (config.relative_attention_num_buckets // 2)
    with torch.no_grad():
        bias.copy_(-distance[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.0]))
    return model


def clip_model() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer()), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4,
            num_attention_heads=WIDTH // 64, max_position_embeddings=CLIP_LENGTH, bos_token_id=0, eos_token_id=1,
            pad_token_id=1,
        )
    )  # fmt: skip


class SceneProbe(nn.Module):
    """Reads a scene out of text features: what stands in each of nine places, and the background."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(10, WIDTH) * WIDTH**-0.5)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        wide = 2 * WIDTH
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, wide), nn.GELU(), nn.Linear(wide, WIDTH))
        self.there = nn.Linear(WIDTH, 2)
        self.thing = nn.Linear(WIDTH, sum(VALUES[:4]))
        self.background = nn.Linear(WIDTH, len(BACKGROUND_NAMES))
        self.word = nn.Linear(WIDTH, sum(VALUES))

    def forward(self, features: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """[B, L, D] and a mask of real tokens to logits of each place and of the background.

        Of a place: whether a thing is there, its shape, colour, fill and rim, [B, 9, n] each; of the background [B, 4].
        """
        queries = self.queries.expand(len(features), -1, -1)
        read, _ = self.attention(queries, features, features, key_padding_mask=~mask, need_weights=False)
        read = read + self.mlp(read)
        places = read[:, :9]
        return [self.there(places), *self.thing(places).split(VALUES[:4], dim=-1)], self.background(read[:, 9])

    def word_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of shape, colour, fill, rim and place for the words with a thing; targets [B, L, 5]."""
        logits = self.word(features).split(VALUES, dim=-1)
        return torch.stack([cross_entropy(part, targets[..., k]) for k, part in enumerate(logits)]).mean()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=NOT_ASKED)


def known(thing: Thing) -> list[int]:
    """Shape, colour, fill, rim and place as numbers."""
    return [SHAPES.index(thing.shape), COLOUR_NAMES.index(thing.colour), FILLS.index(thing.fill),
            RIMS.index(thing.rim), thing.place]  # fmt: skip


def scene_targets(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """What a probe should read: [B, 9, 5] (whether a thing is there, its shape, colour, fill, rim) and [B]."""
    things = torch.full((len(scenes), 9, 5), NOT_ASKED)
    things[..., 0] = 0
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            things[row, thing.place] = torch.tensor([1, *known(thing)[:4]])
    return things, torch.tensor([BACKGROUND_NAMES.index(scene.background) for scene in scenes])


def _word_targets(scenes: list[Scene], written: list[list[Word]], length: int, offset: int) -> Tensor:
    targets = [[[NOT_ASKED] * 5] * length for _ in scenes]
    for row, (scene, words) in enumerate(zip(scenes, written, strict=True)):
        facts = [known(thing) for thing in scene.things]
        for position, word in enumerate(words, start=offset):
            if word.owner >= 0 and position < length:
                targets[row][position] = facts[word.owner]
    return torch.tensor(targets)


class Reader(Stage):
    """A text encoder under training, with its tokenizer and its probe."""

    encoder: T5EncoderModel | CLIPTextModel
    probe: SceneProbe
    tokenizer: PreTrainedTokenizerFast
    first_word = 0  # position of a caption's first word among its tokens

    @abstractmethod
    def write(self, scene: Scene, rng: random.Random, twice: bool | None = None) -> list[Word]:
        """A caption of the kind this encoder is trained on; a paragraph says everything twice, or once, or now and
        then twice (None)."""

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        device = self.probe.queries.device
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(device)
        features = self.encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return features, tokens.attention_mask.bool()

    def forward(self, rng: random.Random, step: int, batch: int, progress: float) -> Tensor:
        """All captions of a batch are about equally long, by their number of things: padding is dear on a CPU."""
        count = rng.choice((1, 2)) if progress < ALONE_UNTIL else rng.choice((1, 2, 3, 3, 4, 4))
        twice = rng.random() < 0.15
        scenes = [random_scene(rng, count) for _ in range(batch)]
        written = [self.write(scene, rng, twice) for scene in scenes]
        features, mask = self.encode([captions.text(words) for words in written])
        device = features.device
        things, backgrounds = scene_targets(scenes)
        things = things.to(device)
        thing_logits, background_logits = self.probe(features, mask)
        words = _word_targets(scenes, written, features.shape[1], self.first_word).to(device)
        there, *facts = (cross_entropy(logits, things[..., k]) for k, logits in enumerate(thing_logits))
        background = cross_entropy(background_logits, backgrounds.to(device))
        return 4 * there + torch.stack(facts).sum() + background + 4 * self.probe.word_loss(features, words)

    @torch.no_grad()
    def accuracy(self, scenes: list[Scene], prompts: list[str]) -> float:
        """The share of scenes that the probe reads back from their captions without a mistake."""
        things, backgrounds = scene_targets(scenes)
        thing_logits, background_logits = self.probe(*self.encode(prompts))
        right = background_logits.argmax(-1).cpu() == backgrounds
        for k, logits in enumerate(thing_logits):
            asked = things[..., k]
            right &= ((logits.argmax(-1).cpu() == asked) | (asked == NOT_ASKED)).all(1)
        return right.float().mean().item()

    @abstractmethod
    def exams(self) -> dict[str, Callable[[Scene, random.Random], list[Word]]]:
        """Captions that leave nothing out, by name."""

    def evaluate(self) -> dict[str, float]:
        """Accuracy on scenes with a combination never seen in training: one to four things, each kind of caption."""
        result = {}
        for name, write in self.exams().items():
            for count in (1, 2, 3, 4) if name == "mixed" else (3,):
                rng = random.Random(f"exam {count}")
                scenes = [random_scene(rng, count, unseen=True) for _ in range(64)]
                prompts = [captions.text(write(scene, rng)) for scene in scenes]
                result[f"{name} {count}"] = round(self.accuracy(scenes, prompts), 3)
        return result


def _dense(**options: Any) -> Callable[[Scene, random.Random], list[Word]]:
    return lambda scene, rng: captions.dense(scene, rng, captions.Wording(**options))


class T5Reader(Reader):
    """The T5 encoder, which reads dense paragraphs, and tags now and then."""

    name = "t5"

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = t5_tokenizer()
        self.encoder: T5EncoderModel = t5_model()
        self.probe = SceneProbe()

    def write(self, scene: Scene, rng: random.Random, twice: bool | None = None) -> list[Word]:
        if rng.random() < 0.1:
            return captions.tags(scene, rng, noise=0.0)
        return captions.dense(scene, rng, captions.Wording(twice=twice))

    def exams(self) -> dict[str, Callable[[Scene, random.Random], list[Word]]]:
        return {"mixed": captions.dense, "by relation": _dense(relations=1.0), "twice": _dense(twice=True),
                "no marks": _dense(marks="none"), "held form": _dense(form="what"),
                "held order": _dense(held=True, form="sits")}  # fmt: skip

    def text_encoder(self) -> T5TextEncoder:
        return T5TextEncoder(self.encoder, self.tokenizer)


class CLIPReader(Reader):
    """The CLIP-style encoder, which reads web captions."""

    name = "clip"
    first_word = 1

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = clip_tokenizer()
        self.encoder: CLIPTextModel = clip_model()
        self.probe = SceneProbe()

    def write(self, scene: Scene, rng: random.Random, twice: bool | None = None) -> list[Word]:
        return captions.web(scene, rng, CLIP_LENGTH - 2)

    def exams(self) -> dict[str, Callable[[Scene, random.Random], list[Word]]]:
        return {"mixed": lambda scene, rng: captions.tags(scene, rng, noise=0.0)}

    def text_encoder(self) -> CLIPTextEncoder:
        return CLIPTextEncoder(self.encoder, self.tokenizer)
