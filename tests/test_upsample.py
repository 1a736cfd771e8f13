"""Caption upsampling: what the llm is given, what is made of its answer, and what is remembered."""

import json
import os
from multiprocessing import Pipe, get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from ella_kd import CaptionUpsampler, Pipeline
from ella_kd.upsample import EXAMPLES, INSTRUCTION, clean_caption

FOX = "A red fox sits on a mossy log. Tall grey pines stand behind it."
CHATML = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DROPS = CHATML.replace("messages %}<", "messages if m['role'] != 'system' %}<", 1)


class Fake:
    """An llm that gives these answers, one after the other, and keeps what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, text: str) -> Any:
        self.asked.append(text)
        return self.answers[(len(self.asked) - 1) % len(self.answers)]


def tokenizer(template: str | None = None) -> Any:
    """One token per byte, so that the ids say the text."""
    letters = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>")
    made.chat_template = template
    return made


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=257,
                         pad_token_id=256, initializer_range=1.0, **more)
    return LlamaForCausalLM(config).eval()


def given_to(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids that the model's `generate` is called with."""
    ids: list[list[int]] = []
    generate = model.generate

    def spy(**arguments: Any) -> Any:
        ids.append(arguments["input_ids"][0].tolist())
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", spy)
    return ids


# What the llm is given

def test_a_callable_is_given_instruction_examples_and_prompt_in_this_order() -> None:
    llm = Fake(FOX)
    assert CaptionUpsampler(llm)("  a fox\n on a log ") == FOX
    examples = "".join(f"Input: {short}\nOutput: {long}\n\n" for short, long in EXAMPLES)
    assert llm.asked == [f"{INSTRUCTION}\n\n{examples}Input: a fox on a log\nOutput:"]


def test_instruction_and_examples_are_the_callers_if_given() -> None:
    llm = Fake(FOX)
    CaptionUpsampler(llm, instruction="Say more.", examples=(("a", "b"),))("a fox")
    assert llm.asked == ["Say more.\n\nInput: a\nOutput: b\n\nInput: a fox\nOutput:"]


def test_the_examples_are_what_the_instruction_asks_for() -> None:
    for short, long in EXAMPLES:
        assert 3 <= long.count(".") <= 5 and clean_caption(long) == long and len(short) < len(long)


@pytest.mark.parametrize("template", [CHATML, REFUSES, DROPS])
def test_a_chat_model_is_asked_in_turns(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = llama(), tokenizer(template)
    ids = given_to(model, monkeypatch)
    CaptionUpsampler.from_transformers(model, words, max_new_tokens=4)("a fox")
    system = f"<|system|>{INSTRUCTION}<|end|><|user|>" if template == CHATML else f"<|user|>{INSTRUCTION}\n\n"
    examples = "<|end|><|user|>".join(f"{short}<|end|><|assistant|>{long}" for short, long in EXAMPLES)
    assert words.decode(ids[0]) == f"{system}{examples}<|end|><|user|>a fox<|end|><|assistant|>"


def test_the_template_writes_the_special_tokens_and_the_tokenizer_adds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    ids = given_to(model, monkeypatch)
    for template in (CHATML, None):
        words = tokenizer(template)
        end = words.eos_token_id
        words.backend_tokenizer.post_processor = processors.TemplateProcessing("</s> $A", None, [("</s>", end)])
        CaptionUpsampler.from_transformers(model, words, max_new_tokens=1)("a fox")
    assert [row.count(end) for row in ids] == [0, 1]


def test_a_model_without_a_template_continues_the_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=4096, n_embd=16, n_layer=1, n_head=2)).eval()
    words = tokenizer()
    ids, llm = given_to(model, monkeypatch), Fake(FOX)
    CaptionUpsampler.from_transformers(model, words, max_new_tokens=32)("a fox")
    CaptionUpsampler(llm)("a fox")
    assert words.decode(ids[0]) == llm.asked[0]


@pytest.mark.parametrize("kind", ["decoder", "encoder and decoder"])
def test_the_answer_is_the_new_tokens_and_no_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = llama() if kind == "decoder" else T5ForConditionalGeneration(T5Config(
        vocab_size=258, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        pad_token_id=256, eos_token_id=257)).eval()
    words, answers = tokenizer(), []
    new = torch.tensor([[*words(FOX, add_special_tokens=False).input_ids, 257]])
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat(
        [input_ids if kind == "decoder" else torch.tensor([[256]]), new], 1))
    answers.append(CaptionUpsampler.from_transformers(model, words)("a fox"))
    assert answers == [FOX]


# How it draws words

def chat(seed: int | None, model: Any, tokens: int = 24) -> str:
    return CaptionUpsampler.from_transformers(model, tokenizer(CHATML), max_new_tokens=tokens, seed=seed).llm(
        [("system", INSTRUCTION), ("user", "a fox")])


def test_greedy_takes_the_likeliest_token_each_time() -> None:
    model, words = llama(), tokenizer(CHATML)
    model.generation_config.do_sample, model.generation_config.num_beams = True, 3  # what the folder says is not asked
    ids = words(f"<|system|>{INSTRUCTION}<|end|><|user|>a fox<|end|><|assistant|>", return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(24):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(2)], 1)
    assert chat(None, model) == chat(None, model) == words.decode(ids[0, start:], skip_special_tokens=True)


def test_a_seed_decides_the_sampled_answer_and_the_global_random_numbers_stay() -> None:
    model = llama()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = chat(1, model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert chat(1, model) == first
    assert len({chat(seed, model) for seed in (None, 0, 1, 2)}) == 4


def test_no_more_tokens_than_asked_for() -> None:
    model = llama()
    model.generation_config.eos_token_id = None
    assert chat(None, model, 40).startswith(chat(None, model, 8)[:4])
    assert len(chat(None, model, 8)) <= 8 < len(chat(None, model, 40))


# What is made of the answer

def test_an_empty_answer_leaves_the_prompt_with_a_warning_and_is_asked_again() -> None:
    llm = Fake("**Output:**", FOX)
    upsample = CaptionUpsampler(llm)
    with pytest.warns(UserWarning, match="the prompt stays as it is: 'a fox'") as caught:
        assert upsample("a  fox") == "a  fox"
    assert caught[0].filename == __file__
    assert upsample("a fox") == FOX


# What is remembered

def test_a_prompt_is_asked_once() -> None:
    llm = Fake(FOX, "A dog.")
    upsample = CaptionUpsampler(llm)
    assert [upsample(prompt) for prompt in ("a fox", "a dog", " a\nfox", "a dog")] == [FOX, "A dog.", FOX, "A dog."]
    assert len(llm.asked) == 2


def test_the_cache_is_a_readable_file_that_the_next_upsampler_starts_from(tmp_path: Path) -> None:
    path, other = tmp_path / "captions.json", Fake("other")
    assert CaptionUpsampler(Fake(FOX), path, "llm")("a fox") == FOX
    assert CaptionUpsampler(other, str(path), "llm")("a fox") == FOX and not other.asked
    (key, caption), = json.loads(path.read_text()).items()
    assert key.startswith("a fox [") and caption == FOX
    assert [file.name for file in tmp_path.iterdir()] == ["captions.json"]


def test_another_llm_instruction_or_example_is_not_the_same_caption(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    ways: list[dict[str, Any]] = [{"name": "a"}, {"name": "b"}, {"name": "a", "instruction": "More."},
                                  {"name": "a", "examples": ()}]
    for count, way in enumerate(ways):
        assert CaptionUpsampler(Fake(f"Fox {count}."), path, **way)("a fox") == f"Fox {count}."
    assert len(json.loads(path.read_text())) == 4


def test_seed_and_length_are_part_of_a_models_name(tmp_path: Path) -> None:
    model = llama()
    names = [CaptionUpsampler.from_transformers(model, tokenizer(), name="m", **how).name  # type: ignore[arg-type]
             for how in ({}, {"seed": 0}, {"seed": 1}, {"max_new_tokens": 3})]
    assert len(set(names)) == 4
    model.config.name_or_path = model.name_or_path = "folder/tiny"
    made = CaptionUpsampler.from_transformers(model, tokenizer(), cache=tmp_path / "c.json")
    assert made.name.startswith("folder/tiny")


def test_two_that_write_the_same_file_in_turns_keep_both_captions(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    a, b = CaptionUpsampler(Fake("A a."), path, "llm"), CaptionUpsampler(Fake("B b."), path, "llm")
    assert (a("a"), b("b"), a("c"), b("d")) == ("A a.", "B b.", "A a.", "B b.")
    assert len(json.loads(path.read_text())) == 4
    assert b("a") == "A a."  # found in the file, not asked


def test_what_another_writes_while_the_llm_answers_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    other = CaptionUpsampler(Fake("A dog."), path, "llm")
    upsample = CaptionUpsampler(lambda text: f"Not {other('a dog')}", path, "llm")
    assert upsample("a fox") == "Not A dog."
    assert sorted(json.loads(path.read_text()).values()) == ["A dog.", "Not A dog."]


def test_the_file_serves_other_processes(tmp_path: Path) -> None:
    path, llm = tmp_path / "captions.json", Fake("A dog.")
    upsample = CaptionUpsampler(llm, path, "llm")
    upsample("a dog")
    ours, theirs = Pipe()

    def another() -> None:
        captions = CaptionUpsampler(lambda text: FOX, path, "llm")
        theirs.send((captions("a dog"), captions("a fox")))

    process = get_context("fork").Process(target=another)
    process.start()
    assert ours.poll(60) and ours.recv() == ("A dog.", FOX)
    process.join()
    assert upsample("a fox") == FOX and len(llm.asked) == 1


@pytest.mark.parametrize("broken", ["write_text", "replace"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(broken: str, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    path, llm = tmp_path / "captions.json", Fake(FOX)
    upsample = CaptionUpsampler(llm, path, "llm")
    upsample("a fox")
    before = path.read_bytes()

    def half(self: Path, text: str, encoding: str) -> None:
        with open(self, "w", encoding=encoding) as file:
            file.write(text[:len(text) // 2])
        raise KeyboardInterrupt

    def never(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*((Path, "write_text", half) if broken == "write_text" else (os, "replace", never)))
        with pytest.raises(KeyboardInterrupt):
            upsample("a dog")
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["captions.json"]
    assert upsample("a dog") == FOX and len(llm.asked) == 2  # the answer itself is not lost


@pytest.mark.parametrize("content", ["{\"a\": \"b\"", "[]", "{\"a\": 1}", "", "null", "\u00ff"])
def test_a_broken_cache_is_an_error_that_names_it_and_stays_as_it_is(content: str, tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content, encoding="latin-1")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"captions\.json is no cache of captions"):
        CaptionUpsampler(Fake(FOX), path, "llm")
    path.unlink()
    llm = Fake(FOX)
    upsample = CaptionUpsampler(llm, path, "llm")
    path.write_bytes(before)  # damaged later: seen before the llm is asked
    with pytest.raises(ValueError, match=r"captions\.json is no cache of captions"):
        upsample("a fox")
    assert path.read_bytes() == before and not llm.asked


# Errors

def test_bad_arguments(tmp_path: Path) -> None:
    upsample = CaptionUpsampler(Fake(FOX))
    with pytest.raises(TypeError, match="must be a string, got list"):
        upsample(["a fox"])  # type: ignore[arg-type]
    for blank in ("", " \n"):
        with pytest.raises(ValueError, match="blank"):
            upsample(blank)
    for llm in ("gpt", llama()):
        with pytest.raises(TypeError, match=r"use CaptionUpsampler\.from_transformers"):
            CaptionUpsampler(llm)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the llm's name"):
        CaptionUpsampler(Fake(FOX), tmp_path / "captions.json")
    with pytest.raises(FileNotFoundError, match="no folder"):
        CaptionUpsampler(Fake(FOX), tmp_path / "none" / "captions.json", "llm")
    with pytest.raises(ValueError, match="needs the llm's name"):
        CaptionUpsampler.from_transformers(llama(), tokenizer(), cache=tmp_path / "captions.json")
    with pytest.raises(TypeError, match=r"and its tokenizer, got .* and LlamaForCausalLM"):
        CaptionUpsampler.from_transformers(tokenizer(), llama())
    for wrong in ({"max_new_tokens": True}, {"max_new_tokens": 4.0}, {"seed": "1"}, {"seed": 1.5}, {"seed": False}):
        with pytest.raises(TypeError, match="must be integers"):
            CaptionUpsampler.from_transformers(llama(), tokenizer(), **wrong)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        CaptionUpsampler.from_transformers(llama(), tokenizer(), max_new_tokens=0)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        CaptionUpsampler.from_transformers(llama().train(), tokenizer())


def test_an_llm_that_answers_no_string_is_named() -> None:
    def pipeline(text: str) -> Any:
        return [{"generated_text": text}]

    with pytest.raises(TypeError, match=r"the llm .*pipeline must answer with a string, got list"):
        CaptionUpsampler(pipeline)("a fox")
    with pytest.raises(TypeError, match="the llm qwen must answer with a string, got NoneType"):
        CaptionUpsampler(Fake(None), name="qwen")("a fox")


def test_what_the_llm_raises_is_raised() -> None:
    def llm(text: str) -> str:
        raise ConnectionError("no network")

    with pytest.raises(ConnectionError, match="no network"):
        CaptionUpsampler(llm)("a fox")


def test_the_caption_is_a_prompt() -> None:
    pipeline = Pipeline.miniature(device="cpu")
    upsample = CaptionUpsampler(Fake("A red heart sits in the top left corner.\nThe scene is set in a deep forest."))
    tokens = [pipeline.encode(prompt)(torch.zeros(1)).tokens
              for prompt in (upsample("a heart"), "A red heart sits in the top left corner. The scene is set in a deep "
                             "forest.", "a heart")]
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])
