"""T5 and CLIP with tiny models in real folders: modes, lengths, padding, truncation, dtypes and errors."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel
from transformers import T5ForConditionalGeneration as T5

from ella_kd.models import CLIPTextEncoder, T5TextEncoder
from ella_kd.models.text import load_tokenizer

WORDS = ["a", "red", "blue", "square", "circle", "left", "of", "the"]


def word_tokenizer(specials: list[str], template: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, vocabulary[word]) for word in specials])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=specials[0], eos_token=specials[1],
                                   unk_token="<unk>")


@pytest.fixture(scope="module")
def t5_config() -> T5Config:
    return T5Config(vocab_size=11, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
                    feed_forward_proj="gated-gelu")


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory, t5_config: T5Config) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    T5EncoderModel(t5_config).save_pretrained(folder)
    word_tokenizer(["<pad>", "</s>", "<unk>"], "$A </s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(t5_folder: Path) -> T5TextEncoder:
    return T5TextEncoder.from_folder(t5_folder)


@pytest.fixture(scope="module")
def clip() -> CLIPTextEncoder:
    torch.manual_seed(0)
    config = CLIPTextConfig(vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                            num_attention_heads=2, max_position_embeddings=6, bos_token_id=2, eos_token_id=1)
    return CLIPTextEncoder(CLIPTextModel(config).eval(),
                           word_tokenizer(["<pad>", "<end>", "<start>", "<unk>"], "<start> $A <end>"))


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def test_flexible_sees_the_real_tokens_only(t5: T5TextEncoder) -> None:
    prompts = ["a red square left of the blue circle", "a circle", ""]
    features = t5(prompts)
    assert features.tokens.shape == (3, 9, 16)
    assert features.mask is not None
    assert features.mask.dtype == torch.bool
    assert features.mask.sum(1).tolist() == [9, 3, 1]
    for row, prompt in enumerate(prompts):  # in a padded batch every prompt is what it is alone
        alone = t5(prompt)
        length = int(features.mask[row].sum())
        assert alone.tokens.shape == (1, length, 16)
        assert alone.mask is not None
        assert alone.mask.all()
        assert error(features.tokens[row, :length], alone.tokens[0]) < 1e-5


def test_flexible_does_not_truncate(t5: T5TextEncoder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert t5("red " * 700).tokens.shape == (1, 701, 16)


def test_fixed_pads_and_hides_nothing(t5: T5TextEncoder) -> None:
    features = t5(["a circle", ""], max_length=128)
    assert features.tokens.shape == (2, 128, 16)
    assert features.mask is None
    # T5 itself gets its attention mask: the real tokens are what they are without padding
    assert error(features.tokens[:1, :3], t5("a circle").tokens) < 1e-5
    ids = torch.zeros(1, 128, dtype=torch.long)
    ids[0, 0] = 1
    assert error(t5.model(input_ids=ids).last_hidden_state[:, :1], features.tokens[1:, :1]) > 1e-3


def test_fixed_truncates_with_a_warning_and_keeps_the_end_token(t5: T5TextEncoder) -> None:
    with pytest.warns(UserWarning, match="9 tokens and 4 are read"):
        features = t5("a red square left of the blue circle", max_length=4)
    assert error(features.tokens, t5("a red square").tokens) < 1e-6


def test_a_half_t5_casts_every_tensor(t5_folder: Path) -> None:
    """transformers' own fp16 loading would keep `wo` in fp32; ELLA was trained on features of an all-fp16 T5."""
    t5 = T5TextEncoder.from_folder(t5_folder, dtype=torch.float16)
    assert {p.dtype for p in t5.model.parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in t5.model.parameters())
    assert t5("a circle").tokens.dtype == torch.float16


def test_bf16_warns_and_the_cpu_default_is_fp32(t5_folder: Path) -> None:
    with pytest.warns(UserWarning, match="bf16 changes ELLA's pictures"):
        T5TextEncoder.from_folder(t5_folder, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert T5TextEncoder.from_folder(t5_folder).model.dtype == torch.float32


def test_a_whole_t5_folder_gives_its_encoder(t5_folder: Path, t5: T5TextEncoder, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = T5(T5Config(**t5.model.config.to_dict()))
    whole.encoder.load_state_dict(t5.model.encoder.state_dict())
    whole.shared.load_state_dict(t5.model.shared.state_dict())
    whole.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "decoder.final_layer_norm.weight" in tensors
    save_file({**tensors, "lm_head.weight": torch.zeros(11, 16)}, tmp_path / "model.safetensors", {"format": "pt"})
    t5.tokenizer.save_pretrained(tmp_path)
    assert torch.equal(T5TextEncoder.from_folder(tmp_path)("a circle").tokens, t5("a circle").tokens)


def test_wrong_t5_folders_are_refused(t5_folder: Path, t5_config: T5Config, t5: T5TextEncoder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no T5 model in .*nowhere: expected a folder with config.json"):
        T5TextEncoder.from_folder(tmp_path / "nowhere")
    T5EncoderModel(t5_config).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no T5 tokenizer"):
        T5TextEncoder.from_folder(tmp_path)
    t5.tokenizer.save_pretrained(tmp_path)
    state = t5.model.state_dict()
    del state["encoder.block.1.layer.0.SelfAttention.q.weight"]
    t5.model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight"):
        T5TextEncoder.from_folder(tmp_path)
    t5.model.save_pretrained(tmp_path, state_dict={**t5.model.state_dict(), "encoder.more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"encoder\.more"):
        T5TextEncoder.from_folder(tmp_path)
    T5EncoderModel(T5Config(**{**t5_config.to_dict(), "d_ff": 48})).save_pretrained(tmp_path)
    t5_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not the T5 that its config.json describes.*DenseReluDense"):
        T5TextEncoder.from_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((t5_folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        T5TextEncoder.from_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        T5TextEncoder.from_folder(tmp_path)


def test_clip_pads_to_its_positions_and_sees_them_all(clip: CLIPTextEncoder) -> None:
    features = clip(["a circle", ""])
    assert features.tokens.shape == (2, 6, 32)
    assert features.mask is None
    ids = torch.tensor([[2, 4, 8, 1, 0, 0], [2, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        want = clip.model(ids).last_hidden_state  # no attention mask, after the final layer norm
    assert torch.equal(features.tokens, want)
    assert torch.allclose(features.tokens.var(-1, correction=0), torch.ones(2, 6), atol=1e-3)


def test_clip_truncates_with_a_warning(clip: CLIPTextEncoder) -> None:
    with pytest.warns(UserWarning, match="10 tokens and 6 are read: what follows is lost, from 'a red square"):
        features = clip(["a circle", "a red square left of the blue circle"])
    assert torch.equal(features.tokens[1:], clip("a red square left").tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip("a red square left")


@pytest.mark.parametrize(("prompts", "kind"), [([], ValueError), (["a", 3], TypeError), ([None], TypeError)])
def test_wrong_prompts_are_refused(t5: T5TextEncoder, clip: CLIPTextEncoder, prompts: list[str],
                                   kind: type[Exception]) -> None:
    for encoder in (t5, clip):
        with pytest.raises(kind, match="prompt"):
            encoder(prompts)


def test_a_wrong_length_is_refused(t5: T5TextEncoder) -> None:
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        t5("a", max_length=0)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no CLIP tokenizer in .*expected a folder with tokenizer.json"):
        load_tokenizer(tmp_path, "CLIP")
