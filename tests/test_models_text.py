"""T5 with a tiny model in a real folder: modes, lengths, padding, truncation, dtypes, weights and errors."""

import json
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BatchEncoding,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers import T5ForConditionalGeneration as T5

from ella_kd.models import T5TextEncoder
from ella_kd.models.tokenizers import load_tokenizer, token_ids

WORDS = ["a", "red", "blue", "square", "circle", "left", "of", "the", ",", "("]


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
    return T5Config(vocab_size=13, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
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


class Counted:
    """The tokenizer, which counts how many calls are under way at once: padding is its own state, and calls of two
    lengths change it under each other."""

    is_fast = True

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.now, self.most = tokenizer, 0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.002)
        batch = self.tokenizer(*args, **kwargs)
        self.now -= 1
        return batch


def test_threads_get_what_one_caller_gets(t5: T5TextEncoder) -> None:
    counted: Any = Counted(t5.tokenizer)
    encoder = T5TextEncoder(t5.model, counted)
    calls = [lambda: encoder("a").tokens, lambda: encoder(["a", "a red square left of the blue circle"]).tokens,
             lambda: encoder("a red", 5).tokens, lambda: torch.tensor(token_ids(counted, "a red"))]
    want = [call() for call in calls]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: calls[i % 4](), range(40)))
    assert counted.most == 1
    assert all(torch.equal(tokens, want[i % 4]) for i, tokens in enumerate(got))


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
    save_file({**tensors, "lm_head.weight": torch.zeros(13, 16)}, tmp_path / "model.safetensors", {"format": "pt"})
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


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (Path("should_not_exist"),)  # type: ignore[return-value]


def only_bin(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def lacks_a_shard(folder: Path, t5: T5TextEncoder) -> None:
    (folder / "model.safetensors").unlink()
    t5.model.save_pretrained(folder, max_shard_size="3KB")
    sorted(folder.glob("model-*"))[1].unlink()


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_word_more(path: Path) -> None:
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["more"] = 13
    path.write_text(json.dumps(tokenizer))


DAMAGES: list[tuple[Callable[[Path, T5TextEncoder], object], str]] = [
    (lambda folder, t5: only_bin(folder, {"a": Evil()}), "the weights in {} cannot be read: they hold Python objects"),
    (lambda folder, t5: (folder / "model.safetensors").write_bytes(b""), "the weights in {} cannot be read"),
    (lacks_a_shard, r"the weights in {} cannot be read.*model-00002-of"),
    (lambda folder, t5: (folder / "config.json").write_text("{"), "{}/config.json is not JSON"),
    (lambda folder, t5: (folder / "config.json").write_bytes(b"\xff"), "{}/config.json is not JSON"),
    (lambda folder, t5: (folder / "config.json").write_text("[]"), "{}/config.json describes .* expected a T5"),
    (lambda folder, t5: edit(folder / "config.json", model_type="bert"), "of type 'bert', expected a T5"),
    (lambda folder, t5: edit(folder / "config.json", d_model="x"), "config.json holds values that a T5 cannot"),
    (lambda folder, t5: (folder / "tokenizer.json").write_text("{"), "the T5 tokenizer in {} cannot be read"),
    (lambda folder, t5: (folder / "tokenizer.json").write_text("{}"), "the T5 tokenizer in {} cannot be read"),
    (lambda folder, t5: edit(folder / "tokenizer_config.json", pad_token=None), "tokenizer in {} has no padding token"),
    (lambda folder, t5: one_word_more(folder / "tokenizer.json"), "tokenizer in {} has 14 tokens, the model knows 13"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_a_damaged_folder_is_an_error_that_names_it(t5_folder: Path, t5: T5TextEncoder, tmp_path: Path, says: str,
                                                    damage: Callable[[Path, T5TextEncoder], object],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "t5"
    shutil.copytree(t5_folder, folder)
    damage(folder, t5)
    with pytest.raises(ValueError, match=says.format(folder)):
        T5TextEncoder.from_folder(folder)
    assert not Path("should_not_exist").exists()


def test_weights_in_a_bin_file_are_read(t5_folder: Path, t5: T5TextEncoder, tmp_path: Path) -> None:
    shutil.copytree(t5_folder, tmp_path / "t5")
    only_bin(tmp_path / "t5", t5.model.state_dict())
    assert torch.equal(T5TextEncoder.from_folder(tmp_path / "t5")("a circle").tokens, t5("a circle").tokens)


def test_short_reprs(t5: T5TextEncoder) -> None:
    assert repr(t5) == "T5TextEncoder(width 16, 2 layers, float32 on cpu)"
    assert repr(t5(["a", "a red"])) == "TextFeatures(tokens [2, 3, 16] float32, mask [2, 3] bool)"
    assert repr(t5("a", 4)) == "TextFeatures(tokens [1, 4, 16] float32)"


@pytest.mark.parametrize(("prompts", "kind"), [([], ValueError), (["a", 3], TypeError), ([None], TypeError)])
def test_wrong_prompts_are_refused(t5: T5TextEncoder, prompts: list[str], kind: type[Exception]) -> None:
    for call in (t5, t5.weighted):
        with pytest.raises(kind, match="prompt"):
            call(prompts)


def test_a_wrong_length_is_refused(t5: T5TextEncoder) -> None:
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        t5("a", max_length=0)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no CLIP tokenizer in .*expected a folder with tokenizer.json"):
        load_tokenizer(tmp_path, "CLIP")
