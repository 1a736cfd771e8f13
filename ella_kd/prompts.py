"""What a prompt may say before it is encoded: `AND` between prompts, `__wildcards__` from text files."""

import random
import re
from difflib import get_close_matches
from pathlib import Path

from ella_kd.addon_words import in_prompt, without

_AND = re.compile(r"\\AND\b|\\.|\bAND\b", re.DOTALL)
_WEIGHT = re.compile(r"(?<!\\):\s*(?P<number>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*$")
_WILDCARD = re.compile(r"__(?P<name>\w(?:[\w/-]*?\w)?)__")


def check_text(name: str, text: object) -> str:
    """A text that can be encoded and kept. TypeError for another type, ValueError for broken UTF-8, and for
    add-ons that cannot be read or stand beside the prompt."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} is not valid UTF-8 text, at character {error.start}: {text[:60]!a}") from error
    asked = in_prompt(text)[1] if name == "prompt" else without(text)[1]
    if asked and name != "prompt":
        raise ValueError(f"the {name} asks for the add-on {asked[0]}: give it in the prompt, for the whole "
                         "picture, or as lora (--lora)")
    return text


def split_and(prompt: str) -> list[tuple[str, float]]:
    r"""The prompts between `AND`s and their weights: "a cat AND a dog :0.7" -> [("a cat", 1.0), ("a dog", 0.7)].

    The composable prompts of A1111's web UI: AND in capitals, as a word of its own; a colon and a number at the end of
    a prompt are its weight, which may be negative. `\AND` is the word itself, `16\:9` at the end no weight; other
    backslashes stay, for the attention syntax to read. Raises ValueError for an AND with nothing on one side.
    """
    parts, start = [""], 0
    for found in _AND.finditer(prompt):
        parts[-1] += prompt[start : found.start()]
        start = found.end()
        if found[0] == "AND":
            parts.append("")
        else:
            parts[-1] += found[0].removeprefix("\\") if found[0] == "\\AND" else found[0]
    parts[-1] += prompt[start:]
    terms = []
    for part in parts:
        weight = _WEIGHT.search(part)
        text = (part[: weight.start()] if weight else part).strip()
        if not text and len(parts) > 1:
            raise ValueError(f"an AND has nothing on one side in {prompt[:80]!r}: give one on both, or write \\AND for "
                             "the word")
        terms.append((text, float(weight["number"]) if weight else 1.0))
    return terms


def expand_wildcards(prompt: str, folder: str | Path, seed: int) -> str:
    """The prompt with each `__name__` replaced by a line of folder/name.txt, chosen by the seed.

    `__animals/cats__` is folder/animals/cats.txt. Blank lines and lines that begin with # are no choices; a line may
    hold wildcards itself. The same prompt, files and seed give the same text on every machine.
    Raises FileNotFoundError for a missing folder or file (with the nearest names), ValueError for a file without a line
    to choose, that is no UTF-8 text, or that leads back to itself.
    """
    folder = _existing(folder)
    rng = random.Random(f"{seed} {prompt}")

    def expand(text: str, inside: tuple[str, ...]) -> str:
        return _WILDCARD.sub(lambda found: choose(found["name"], inside), text)

    def choose(name: str, inside: tuple[str, ...]) -> str:
        if name in inside:
            raise ValueError(f"wildcards lead back to themselves: {' -> '.join((*inside, name))}")
        lines = _lines(folder, name)
        return expand(lines[rng.randrange(len(lines))], (*inside, name))

    return expand(prompt, ())


def check_wildcards(prompt: str, folder: str | Path) -> None:
    """Raises, whatever the seed, what `expand_wildcards` raises for an unlucky one."""
    folder, read = _existing(folder), set[str]()

    def walk(text: str, inside: tuple[str, ...]) -> None:
        for name in {found["name"] for found in _WILDCARD.finditer(text)}:
            if name in inside:
                raise ValueError(f"wildcards lead back to themselves: {' -> '.join((*inside, name))}")
            if name not in read:
                for line in _lines(folder, name):
                    walk(line, (*inside, name))
                read.add(name)

    walk(prompt, ())


def _existing(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder of wildcards at {folder}")
    return Path(folder)


def _lines(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.txt"
    if not path.is_file():
        known = sorted(found.relative_to(folder).with_suffix("").as_posix() for found in folder.rglob("*.txt"))
        near = get_close_matches(name, known, 3) or known[:5]
        raise FileNotFoundError(f"no wildcard file {path} for __{name}__: "
                                + (f"there is {', '.join(near)}" if near else "the folder holds no .txt file"))
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"{path} holds no line to choose for __{name}__")
    return lines
