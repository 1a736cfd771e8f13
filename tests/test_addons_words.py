"""Textual inversion: every kind of file, against diffusers and a forward by hand, in chunks, weights and pairs."""

import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ella_kd import Pipeline
from ella_kd.models import CLIPTextEncoder, TwoTextEncoders
from ella_kd.models.addons.embeddings import Embedding
from systems import clip_tokenizer, system
from test_models_text import error, word_tokenizer

A, RED, BLUE, SQUARE, COMMA, UNKNOWN = 4, 5, 6, 7, 12, 3


def vectors(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def clip() -> CLIPTextEncoder:
    """<start> 2, <end> 1, <pad> 0, room for six tokens."""
    torch.manual_seed(0)
    config = CLIPTextConfig(vocab_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                            num_attention_heads=2, max_position_embeddings=8, bos_token_id=2, eos_token_id=1)
    model = CLIPTextModel(config).eval()
    torch.nn.init.normal_(getattr(model, "text_model", model).final_layer_norm.bias, 0.1)
    return CLIPTextEncoder(model, word_tokenizer(["<pad>", "<end>", "<start>", "<unk>"], "<start> $A <end>"))


def by_hand(clip: CLIPTextEncoder, *said: int | Tensor) -> Tensor:
    """The hidden states of a chunk in which vectors stand among tokens, by CLIP's own layers."""
    table: Any = clip.model.get_input_embeddings()
    rows = [table.weight[x][None] if isinstance(x, int) else x for x in (2, *said, 1)]
    rows += [table.weight[:1]] * (8 - sum(map(len, rows)))
    body: Any = getattr(clip.model, "text_model", clip.model)
    states = (torch.cat(rows) + body.embeddings.position_embedding.weight)[None]
    mask = torch.full((8, 8), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        for layer in body.encoder.layers:
            states = layer(states, mask)
            states = states[0] if isinstance(states, tuple) else states
        return cast(Tensor, body.final_layer_norm(states))


def test_vectors_stand_in_place_of_token_embeddings(clip: CLIPTextEncoder) -> None:
    cat, dog = vectors(2, 32), vectors(1, 32, 1)
    knows = clip.with_embeddings([Embedding("red square", {"": cat}), Embedding("red", {"": dog}),
                                  Embedding("style-7", {"": dog})])
    for text, said in (
        ("a red square", (A, cat)),  # the longest name
        ("a red blue square", (A, dog, BLUE, SQUARE)),
        ("a embedding:RED, blue", (A, dog, COMMA, BLUE)),
        ("STYLE-7, mystyle-7", (dog, COMMA, UNKNOWN, UNKNOWN, UNKNOWN)),
    ):
        for read in (knows, knows.weighted):
            assert error(read(text).tokens, by_hand(clip, *said)) < 1e-5
    assert torch.equal(knows("a blue square").tokens, clip("a blue square").tokens)
    assert clip.words == () and clip.with_embeddings([]) is clip


def test_chunks_and_weights(clip: CLIPTextEncoder) -> None:
    """A word that does not fit moves whole to the next chunk; what stands around it weighs all of it."""
    cat = vectors(3, 32)
    knows = clip.with_embeddings([Embedding("red", {"": cat})])
    got = knows.weighted("a a a a red blue").tokens
    assert error(got, torch.cat([by_hand(clip, A, A, A, A), by_hand(clip, cat, BLUE)], 1)) < 1e-5
    assert error(knows.weighted("a a a red").tokens, by_hand(clip, A, A, A, cat)) < 1e-5
    h = by_hand(clip, A, cat, BLUE)
    z = h * torch.tensor([1, 1, 1.5, 1.5, 1.5, 1, 1, 1])[:, None]
    assert error(knows.weighted("a (red:1.5) blue").tokens, z * (h.mean() / z.mean())) < 1e-5
    with pytest.warns(UserWarning, match="what follows is lost"):
        assert error(knows("a a a a red").tokens, by_hand(clip, A, A, A, A, cat[:2])) < 1e-5


def test_a_twin_shares_every_tensor(clip: CLIPTextEncoder) -> None:
    one = clip.with_embeddings([Embedding("red", {"": vectors(1, 32)})])
    two = one.with_embeddings([Embedding("blue", {"": vectors(2, 32, 1)})])
    both = clip.with_embeddings([Embedding("blue", {"": vectors(2, 32, 1)}), Embedding("red", {"": vectors(1, 32)})])
    text = "blue red a"
    assert torch.equal(two(text).tokens, both(text).tokens)
    theirs = dict(two.model.named_parameters())
    assert all(theirs[name] is x for name, x in clip.model.named_parameters())
    assert two.model.state_dict().keys() == clip.model.state_dict().keys()
    half = two.moved(lambda model: model.to(torch.float64))
    assert half(text).tokens.dtype == torch.float64 and error(half(text).tokens, both(text).tokens.double()) < 1e-5


@pytest.mark.parametrize("kind", ["emb_params", "a1111", "diffusers", "bare", "one vector", "first"])
def test_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    found = vectors(1 if kind == "one vector" else 3, 768)
    path = tmp_path / ("my style.safetensors" if kind in ("emb_params", "one vector") else "my style.pt")
    if kind == "emb_params":
        save_file({"emb_params": found}, path, {"modelspec.architecture": "stable-diffusion-v1/textual-inversion"})
    elif kind == "one vector":
        save_file({"<cat>": found[0]}, path)
    else:
        torch.save({"a1111": {"string_to_token": {"*": 265}, "string_to_param": {"*": found.requires_grad_()},
                              "name": "other", "step": 500, "sd_checkpoint": "abc"},
                    "first": {"string_to_token": {"*": torch.tensor(265)},
                              "string_to_param": torch.nn.ParameterDict({"*": found})},
                    "diffusers": {"<cat>": found}, "bare": found}[kind], path)
    read = Embedding.load(path)
    assert read.name == "my style" and torch.equal(read.vectors[""], found) and len(read) == len(found)
    assert len(read.sha256) == 64 and not read.vectors[""].requires_grad


def test_as_diffusers_reads_it(tmp_path: Path) -> None:
    parts, tokenizer = system("sd1"), clip_tokenizer()
    word = vectors(3, 64)
    torch.save({"<zz>": word}, tmp_path / "zz.bin")
    knows = CLIPTextEncoder(parts.texts[0], clip_tokenizer()).with_embeddings([Embedding.load(tmp_path / "zz.bin")])
    plain = CLIPTextEncoder(parts.texts[0], clip_tokenizer())("a b zz c").tokens
    pipe: Any = StableDiffusionPipeline(parts.vae, parts.texts[0], tokenizer, parts.unet, PNDMScheduler(), None, None,
                                   requires_safety_checker=False)
    got = knows("a b zz c").tokens
    pipe.load_textual_inversion(str(tmp_path / "zz.bin"), token="<zz>")
    want, *_ = pipe.encode_prompt("a b <zz> c", "cpu", 1, False)
    assert error(got, want) < 1e-5 and error(got, plain) > 1e-2


def test_sdxls_pair(tmp_path: Path) -> None:
    parts = system("sdxl")
    save_file({"clip_l": vectors(2, 64), "clip_g": vectors(2, 128, 1)}, tmp_path / "zz.safetensors")
    pair = Embedding.load(tmp_path / "zz.safetensors")
    both = TwoTextEncoders.sdxl(parts.texts[0], parts.texts[1], clip_tokenizer(), clip_tokenizer("!"))
    got = both.with_embeddings([pair])("a zz b")
    pipe: Any = StableDiffusionXLPipeline(parts.vae, *parts.texts, clip_tokenizer(), clip_tokenizer("!"), parts.unet,
                                          PNDMScheduler(), add_watermarker=False)
    for half, model, words in (("clip_l", pipe.text_encoder, pipe.tokenizer),
                               ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2)):
        pipe.load_textual_inversion({"<zz>": pair.vectors[half]}, token="<zz>", text_encoder=model, tokenizer=words)
    want, _, vector, _ = pipe.encode_prompt("a <zz> b", device="cpu", do_classifier_free_guidance=False)
    assert got.vector is not None
    assert error(got.tokens, want) < 1e-5 and error(got.vector, vector) < 1e-5
    assert error(got.tokens, both("a zz b").tokens) > 1e-2
    lonely = CLIPTextEncoder.big_g(system("sdxl").texts[1], clip_tokenizer())  # the refiner's
    assert error(lonely.with_embeddings([pair])("a zz b").tokens, got.tokens[..., 64:]) < 1e-5


@pytest.mark.parametrize(("made", "message"), [
    ({"": vectors(2, 1024)}, "is Stable Diffusion 2.x's, 1024 wide: this model's text encoder takes vectors 32 wide"),
    ({"clip_l": vectors(2, 32), "clip_g": vectors(2, 64)}, "is SDXL's, a pair 32 and 64 wide: this model's text"),
    ({"": vectors(7, 32)}, "has 7 vectors: a chunk of this text encoder has places for 6"),
])
def test_other_models_embeddings_are_refused(clip: CLIPTextEncoder, made: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip.with_embeddings([Embedding("zz", made)])
    with pytest.raises(ValueError, match=r"zz is 32 wide: this model's text encoder takes clip_l of the pair, 32 wide"):
        TwoTextEncoders(clip, clip).with_embeddings([Embedding("zz", {"": vectors(1, 32)})])
    with pytest.raises(ValueError, match="two embeddings of the name Red"):
        clip.with_embeddings([Embedding("red", {"": vectors(1, 32)}), Embedding("Red", {"": vectors(1, 32)})])


@pytest.mark.parametrize(("tensors", "message"), [
    ({"lora_unet_x.lora_down.weight": vectors(2, 3)}, "looks like a LoRA.* its place is lora, --lora"),
    ({"clip_l": vectors(1, 768)}, "has the vectors clip_l: expected one text encoder's, or clip_l and clip_g"),
    ({"clip_l": vectors(1, 768), "clip_g": vectors(2, 1280)}, "as many for each text encoder"),
    ({"a": vectors(1, 768), "b": vectors(1, 768)}, "it holds 2 tensors: expected emb_params"),
    ({"emb_params": torch.full((1, 768), torch.nan)}, "must hold finite"),
])
def test_other_files_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "zz.safetensors")
    with pytest.raises(ValueError, match=message):
        Embedding.load(tmp_path / "zz.safetensors")


def test_a_pipeline_draws_the_word(pipeline: Pipeline, tmp_path: Path) -> None:
    save_file({"emb_params": vectors(2, 64)}, tmp_path / "style-7.safetensors")
    knows = pipeline.with_embeddings([tmp_path / "style-7.safetensors"])
    assert knows.unet is pipeline.unet and pipeline.with_embeddings([]) is pipeline
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said, plain = (each.encode("a style-7 circle", "clip") for each in (knows, pipeline))
    t = torch.zeros(1)
    assert error(said(t).tokens, plain(t).tokens) > 1e-2
    with pytest.raises(ValueError, match="this pipeline lacks CLIP"):
        Pipeline(pipeline.unet, pipeline.vae, pipeline.noise_schedule).with_embeddings(
            [tmp_path / "style-7.safetensors"])
