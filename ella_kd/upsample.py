"""Caption upsampling: a chat LLM makes a short prompt the kind of caption that ELLA was trained on."""

import json
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ella_kd.files import writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Turns = list[tuple[str, str]]  # role and text
INSTRUCTION = (
    "You rewrite short picture captions as long ones. Keep each object, number, name and written word of the short "
    "caption. Add what a viewer would see: colors, shapes, sizes, materials, and where each thing is relative to the "
    "others. Use three to five plain sentences about visible things, without moods or opinions. Answer with the long "
    "caption alone, as one paragraph.")
EXAMPLES = (
    ("two owls on a branch",
     "Two brown owls with round yellow eyes sit side by side on a thick, bare oak branch. The larger owl on the left "
     "has its wings folded, and the smaller one on the right turns its head to the side. Grey lichen covers the bark "
     "below their feet. Behind them, straight pine trunks stand in a row against a pale blue sky."),
    ("an old bicycle leaning on a wall",
     "A rusty green bicycle with a brown leather saddle leans on a wall of cracked white plaster. A wicker basket full "
     "of lemons hangs from its curved handlebar. To the right of the bicycle is a narrow wooden door, painted blue."),
    ("a market stall with a sign that says PLUMS",
     "A wooden market stall stands under a red and white striped awning. Square crates of purple plums are stacked in "
     "three rows on its counter. Above them hangs a black sign with the word 'PLUMS' in white chalk letters. A woman "
     "in a yellow apron stands behind the crates, and a small grey dog lies on the pavement in front."))

_NOUN = "(?:assistant|output|caption|description|prompt|version|answer|response)"
_LABEL = ("(?:(?:the|final|long|longer|detailed|descriptive|expanded|upsampled|enhanced|rewritten|image|picture) +)*"
          f"(?:long|{_NOUN})")
_CLEANING = [(re.compile(pattern, re.IGNORECASE | re.MULTILINE), new) for pattern, new in (
    (r"\A[\s\S]*</think>|<think>[\s\S]*", ""),  # what a reasoning model says to itself, finished or cut
    (r"(?:</s>|<\|(?:im_end|eot_id|end|endoftext)\|>)[\s\S]*", ""),
    (r"^[ \t]*```+\w*[ \t]*$|[*`]|^(?:[ \t]*(?:#+|>+|[-\u2022]|\d{1,2}[.)])[ \t]+)+", ""),
    (r"(?<!\w)_+(?=\S)([^_\n]*[^_\s])_+(?!\w)", r"\1"),
    (r"\A\s*input *:.*\n+(?=\s*output *:)", ""),  # the question again, before the answer
    (r"(?:^|(?<=[.!?])\s)[^\w\n]*(?:input|user|human) *:[\s\S]*", ""),  # the next question
    (r"\n[^\w\n]*(?:let me know|feel free|i hope this|would you like|note *:)[\s\S]*", ""),
    (r"\A\W*(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|alright)[,.!:]\s+", ""),
    (rf"\A\W*here(?:['\u2019]s| is) [^:.\n]{{0,80}}\b{_NOUN}\b[^:.\n]{{0,80}}"
     r"(?:(?<!reads)(?<!says):(?:\s+|\Z)|[.!]?\n)", ""),
    (rf"\A\W*{_LABEL} *:(?:\s+|\Z)", ""),
    (r"\s+", " "))]
_STOP = r"[.!?\u2026\u3002\uff01\uff1f][\"')\]\u2019\u201d]*"
_SENTENCE = re.compile(rf"(?<!\b[A-Z])(?<!\b[A-Z][a-z])(?<!\bMrs){_STOP}(?= |\Z)")  # not "Mr.", "St.", initials


def clean_caption(text: str) -> str:
    """What an LLM answered, as a caption: one line without quotes around it, openers, labels, markdown, a next question
    or a last sentence that breaks off; "" if nothing is left. Cleaning a clean caption changes nothing."""
    before = None
    while text != before:  # the layers come in any order; each round only takes away
        before = text
        for pattern, new in _CLEANING:
            text = pattern.sub(new, text)
        text = _unquote(text.strip())
        ends = [match.end() for match in _SENTENCE.finditer(text)]
        if ends and not re.search(rf"{_STOP}\Z", text):
            text = text[:ends[-1]]
    return text


def _unquote(text: str) -> str:
    inner = re.sub(r"(?<=\w)['\u2019](?=\w)", "", text[1:-1])  # without apostrophes
    for opening, closing in ('""', "''", "\u201c\u201d", "\u2018\u2019", "\u00ab\u00bb"):
        marks = opening + closing
        two = re.match(rf"[^{marks}]*[^\s({marks}][{marks}]", inner)  # "a" and "b": the first mark inside closes
        if len(text) > 1 and text[0] == opening and text[-1] == closing and not two:
            return text[1:-1].strip()
    lone = sum(map(text.count, '"\u201c\u201d')) == 1  # its partner was cut off
    return text.strip('"\u201c\u201d').strip() if lone else text


@dataclass(frozen=True, eq=False)
class CaptionUpsampler:
    """Short prompts to captions of three to five sentences that name colors, shapes, materials and places, by an LLM.

    ELLA was trained on such captions, up to 128 T5 tokens; an LLM that is given a few examples writes them (Betker et
    al. 2023, "Improving Image Generation with Better Captions"; ELLA's README, "Caption Upscale").

    llm: a function of one text, which holds the instruction, the examples (short, long) and the prompt, to the answer.
    cache: a JSON file that keeps the captions; None, memory only. name: what tells this llm from others in that file.
    Raises TypeError if llm is no function, FileNotFoundError if the cache's folder is missing, ValueError for a cache
    without a name or a file that is no cache.
    """

    llm: Callable[[Any], str]
    cache: str | Path | None = None
    name: str = ""
    instruction: str = INSTRUCTION
    examples: tuple[tuple[str, str], ...] = EXAMPLES
    _known: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.llm) or isinstance(self.llm, torch.nn.Module):
            raise TypeError(f"llm must be a function from a text to a text, got {type(self.llm).__name__}; for a "
                            "transformers model use CaptionUpsampler.from_transformers(model, tokenizer)")
        if self.cache and not self.name:
            raise ValueError("a cache needs the llm's name: captions of another llm in that file are not this one's")
        if self.cache and not Path(self.cache).parent.is_dir():
            raise FileNotFoundError(f"no folder {Path(self.cache).parent} for the cache: make it first")
        self._read()

    @classmethod
    def from_transformers(cls, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *,
                          max_new_tokens: int = 160, seed: int | None = None, cache: str | Path | None = None,
                          name: str = "") -> "CaptionUpsampler":
        """With a transformers model: in turns, by the tokenizer's chat template, or as plain text if it has none.

        seed None: greedy; a number: sampled as the model's generation_config says, and torch's random numbers stay
        where they are. name: by default the model's name_or_path. Raises TypeError or ValueError for bad arguments.
        """
        if not hasattr(model, "generate") or not callable(tokenizer):
            raise TypeError("expected a transformers model that generates and its tokenizer, got "
                            f"{type(model).__name__} and {type(tokenizer).__name__}")
        if {type(max_new_tokens), type(0 if seed is None else seed)} != {int}:
            raise TypeError(f"max_new_tokens and seed must be integers, got {max_new_tokens!r} and {seed!r}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if model.training:
            raise ValueError("the model is in training mode, its dropout is on: call model.eval() first")
        if name := name or str(model.name_or_path or ""):
            name += f", {max_new_tokens} tokens, seed {seed}"
        return cls(_Chat(model, tokenizer, max_new_tokens, seed), cache, name)

    def __call__(self, prompt: str) -> str:
        """The long caption of a prompt, in one line; the prompt itself, with a warning, if the llm answers nothing.

        No prompt is asked twice. Raises TypeError or ValueError for a prompt that is no string or blank, TypeError if
        the llm answers no string, ValueError if the cache file was damaged meanwhile, and whatever the llm raises.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"the prompt must be a string, got {type(prompt).__name__}")
        if not (short := " ".join(prompt.split())):
            raise ValueError("the prompt is blank: there is nothing to describe")
        identity = json.dumps([self.name, self.instruction, self.examples, short])
        key = f"{short} [{sha256(identity.encode()).hexdigest()}]"
        if key not in self._known:
            self._known.update(self._read())
        if key not in self._known:
            turns = [("system", self.instruction)]
            for pair in (*self.examples, (short,)):
                turns += zip(("user", "assistant"), pair)
            answer = self.llm(turns if isinstance(self.llm, _Chat) else _plain(turns))
            if not isinstance(answer, str):
                raise TypeError(f"the llm {self.name or getattr(self.llm, '__qualname__', self.llm)} must answer with "
                                f"a string, got {type(answer).__name__}")
            if not (caption := clean_caption(answer)):
                warnings.warn(f"the llm answered nothing of use, the prompt stays as it is: {short!r}", stacklevel=2)
                return prompt
            self._known[key] = caption
            self._write({**self._read(), key: caption})  # others may have written meanwhile
        return self._known[key]

    def _read(self) -> dict[str, str]:
        if not self.cache or not Path(self.cache).exists():
            return {}
        try:
            captions = json.loads(Path(self.cache).read_text(encoding="utf-8"))
        except ValueError as error:
            captions = error
        if not isinstance(captions, dict) or not all(isinstance(caption, str) for caption in captions.values()):
            raise ValueError(f"{self.cache} is no cache of captions, expected a JSON object of strings, got "
                             f"{str(captions)[:80]}: repair the file, move it away or name another")
        return captions

    def _write(self, captions: dict[str, str]) -> None:
        if self.cache:
            with writing(self.cache) as temporary:
                temporary.write_text(json.dumps(captions, indent=1), encoding="utf-8")


@dataclass(frozen=True, eq=False)
class _Chat:
    """A transformers model that is asked in turns."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    seed: int | None

    @torch.no_grad()
    def __call__(self, turns: Turns) -> str:
        chat = bool(getattr(self.tokenizer, "chat_template", None))
        inputs = self.tokenizer(self._rendered(turns) if chat else _plain(turns), add_special_tokens=not chat,
                                return_tensors="pt").to(self.model.device)
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(gpus):
            torch.default_generator.manual_seed(self.seed or 0)  # torch.manual_seed: also GPUs that are not in use yet
            for gpu in gpus:
                torch.cuda.default_generators[gpu].manual_seed(self.seed or 0)
            tokens = self.model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, num_beams=1,
                                         max_new_tokens=self.max_new_tokens, do_sample=self.seed is not None)[0]
        given = 0 if self.model.config.is_encoder_decoder else inputs.input_ids.shape[1]
        return str(self.tokenizer.decode(tokens[given:], skip_special_tokens=True))

    def _rendered(self, turns: Turns) -> str:
        """The chat as text; the instruction is in the first user turn if the template refuses or drops a system's."""
        from jinja2 import TemplateError

        def render(turns: Turns) -> str:
            messages = [{"role": role, "content": text} for role, text in turns]
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                                          enable_thinking=False))  # a variable of Qwen3's template
        (_, instruction), (_, first), *rest = turns
        with suppress(TemplateError):
            if instruction in (text := render(turns)):
                return text
        return render([("user", f"{instruction}\n\n{first}"), *rest])


def _plain(turns: Turns) -> str:
    start = {"system": "", "user": "\n\nInput: ", "assistant": "\nOutput: "}
    return "".join(start[role] + text for role, text in turns) + "\nOutput:"
