"""The miniature's text encoders: a T5 encoder that reads paragraphs and a CLIP-style encoder that reads tags.

Both are trained to know the scene: a probe with a query per place reads the whole scene out of the features, and every
word's feature must know shape, colour and place of the thing it speaks of. The probe is thrown away afterwards.
"""

from __future__ import annotations

import random
from abc import abstractmethod

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
from benchmarks.miniature.scenes import BACKGROUND_NAMES, COLOUR_NAMES, SHAPES, Scene, random_scene
from ella_kd.models import CLIPTextEncoder, T5TextEncoder

WIDTH = 128
CLIP_LENGTH = 32  # room for the tags of three things; a paragraph about two is cut, as 77 tokens cut a dense prompt
PARAGRAPH = 128
KINDS = len(SHAPES) * len(COLOUR_NAMES)


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
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()), d_model=WIDTH, d_kv=32, num_heads=4, d_ff=256, num_layers=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1, is_encoder_decoder=False,
            use_cache=False,
        )
    )  # fmt: skip


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
        self.thing = nn.Linear(WIDTH, 1 + KINDS)
        self.background = nn.Linear(WIDTH, len(BACKGROUND_NAMES))
        self.word = nn.Linear(WIDTH, len(SHAPES) + len(COLOUR_NAMES) + 9)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, D] and a mask of real tokens to logits [B, 9, 31] and [B, 4]."""
        queries = self.queries.expand(len(features), -1, -1)
        read, _ = self.attention(queries, features, features, key_padding_mask=~mask, need_weights=False)
        read = read + self.mlp(read)
        return self.thing(read[:, :9]), self.background(read[:, 9])

    def word_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of shape, colour and place for the words with a thing; targets [B, L, 3], -100 elsewhere."""
        logits = self.word(features).split((len(SHAPES), len(COLOUR_NAMES), 9), dim=-1)
        losses = [F.cross_entropy(part.flatten(0, 1), targets[..., k].flatten()) for k, part in enumerate(logits)]
        return torch.stack(losses).mean()


def scene_targets(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """What a probe should read: [B, 9] (0 empty, else 1 + kind) and [B]."""
    things = torch.zeros(len(scenes), 9, dtype=torch.long)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            kind = SHAPES.index(thing.shape) * len(COLOUR_NAMES) + COLOUR_NAMES.index(thing.colour)
            things[row, thing.place] = 1 + kind
    return things, torch.tensor([BACKGROUND_NAMES.index(scene.background) for scene in scenes])


def _word_targets(scenes: list[Scene], written: list[list[Word]], length: int, offset: int) -> Tensor:
    targets = torch.full((len(scenes), length, 3), -100)
    for row, (scene, words) in enumerate(zip(scenes, written, strict=True)):
        for position, word in enumerate(words, start=offset):
            if word.owner >= 0 and position < length:
                thing = scene.things[word.owner]
                known = (SHAPES.index(thing.shape), COLOUR_NAMES.index(thing.colour), thing.place)
                targets[row, position] = torch.tensor(known)
    return targets


class Reader(Stage):
    """A text encoder under training, with its tokenizer and its probe."""

    encoder: T5EncoderModel | CLIPTextModel
    probe: SceneProbe
    tokenizer: PreTrainedTokenizerFast
    first_word = 0  # position of a caption's first word among its tokens

    @abstractmethod
    def write(self, scene: Scene, rng: random.Random) -> list[Word]:
        """A caption of the kind this encoder is trained on."""

    @abstractmethod
    def write_all(self, scene: Scene, rng: random.Random) -> list[Word]:
        """A caption of that kind that leaves nothing out."""

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        device = self.probe.queries.device
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(device)
        features = self.encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return features, tokens.attention_mask.bool()

    def forward(self, rng: random.Random, batch: int, progress: float) -> Tensor:
        scenes = [random_scene(rng, rng.choice((1, 2, 2, 3))) for _ in range(batch)]
        written = [self.write(scene, rng) for scene in scenes]
        features, mask = self.encode([captions.text(words) for words in written])
        device = features.device
        things, backgrounds = scene_targets(scenes)
        thing_logits, background_logits = self.probe(features, mask)
        words = _word_targets(scenes, written, features.shape[1], self.first_word).to(device)
        return (
            9 * F.cross_entropy(thing_logits.flatten(0, 1), things.flatten().to(device))
            + F.cross_entropy(background_logits, backgrounds.to(device))
            + self.probe.word_loss(features, words)
        )

    @torch.no_grad()
    def accuracy(self, scenes: list[Scene], rng: random.Random) -> float:
        """The share of scenes that the probe reads back from a complete caption without a mistake."""
        things, backgrounds = scene_targets(scenes)
        features, mask = self.encode([captions.text(self.write_all(scene, rng)) for scene in scenes])
        thing_logits, background_logits = self.probe(features, mask)
        right = (thing_logits.argmax(-1).cpu() == things).all(1) & (background_logits.argmax(-1).cpu() == backgrounds)
        return right.float().mean().item()

    def evaluate(self) -> dict[str, float]:
        """Accuracy on scenes with a combination never seen in training."""
        rng = random.Random(1)
        counts = {"one": 1, "two": 2, "three": 3}
        unseen = {name: [random_scene(rng, n, unseen=True) for _ in range(256)] for name, n in counts.items()}
        return {f"parse_{name}": self.accuracy(scenes, rng) for name, scenes in unseen.items()}


class T5Reader(Reader):
    """The T5 encoder, which reads dense paragraphs."""

    name = "t5"

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = t5_tokenizer()
        self.encoder: T5EncoderModel = t5_model()
        self.probe = SceneProbe()

    def write(self, scene: Scene, rng: random.Random) -> list[Word]:
        return captions.dense(scene, rng)

    write_all = write

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

    def write(self, scene: Scene, rng: random.Random) -> list[Word]:
        return captions.web(scene, rng, CLIP_LENGTH - 2)

    def write_all(self, scene: Scene, rng: random.Random) -> list[Word]:
        return captions.tags(scene, rng, noise=0.0)

    def text_encoder(self) -> CLIPTextEncoder:
        return CLIPTextEncoder(self.encoder, self.tokenizer)
