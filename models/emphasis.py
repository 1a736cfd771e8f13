"""The attention syntax of prompts: `a (red:1.3) car, [blurred]`, as A1111's web UI and LPW pipelines read it.

    prompt = item*
    item   = "(" prompt ")"              the weight of everything inside times 1.1
           | "(" prompt ":" number ")"   times that number: 1.3, .5, 2., -1; spaces around it are allowed
           | "[" prompt "]"              divided by 1.1
           | "BREAK"                     as a word of its own: what follows begins a new chunk of CLIP's 75 tokens
           | "\\" special                 that character or word itself; special = ( ) [ ] : | \\ BREAK
           | character                   any other one, a "\\" before nothing special among them

Weights multiply where brackets nest. Brackets need not balance: one that closes nothing is an ordinary character, one
that is never closed reaches to the end; round and square ones are paired apart, so "(a [b) c]" gives a 1.1, b 1 and
c 1 / 1.1. All this is A1111's reading, with three differences: a backslash before an ordinary character stays, BREAK
works inside brackets, and text that looks like a number but is none ("1.2.3") is text.

Prompt editing, `[from:to:0.5]`, `[to:0.5]`, `[from::0.5]` and `[a|b]`, is not part of it and is refused here:
`ella_kd.prompt_editing` reads it first.
"""

import math
import re
from itertools import groupby
from operator import itemgetter

Piece = tuple[str, float]  # text and its weight

_TOKEN = re.compile(r"""
      \\(?P<literal>BREAK\b|[()\[\]:|\\])
    | (?P<break>\bBREAK\b)
    | :\s*(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*(?P<end>[)\]])
    | .""", re.VERBOSE | re.DOTALL)
_SPECIAL = re.compile(r"\bBREAK\b|[()\[\]:|\\]")


def escape(text: str) -> str:
    """The prompt that reads as text itself, with weight 1, also inside brackets: `parse(escape(s)) == [(s, 1.0)]`."""
    return _SPECIAL.sub(lambda special: "\\" + special[0], text)


def parse(prompt: str) -> list[Piece]:
    """A prompt -> its pieces, (text, weight), in order; "".join of the texts is what is meant to be read.

    Neighbours differ in weight, and no text is empty unless it is the only one. A BREAK reads as a space: it is for
    encoders that have chunks (`chunks`). Raises ValueError for prompt editing and for weights that overflow.
    """
    first, *rest = chunks(prompt)
    return _merge([*first, *(piece for chunk in rest for piece in [(" ", 1.0), *chunk])])


def chunks(prompt: str) -> list[list[Piece]]:
    """The pieces between one BREAK and the next, without the white space around it; see `parse`.

    Two BREAKs in a row, or one at the start, leave an empty chunk, [("", 1.0)]; one at the end leaves nothing.
    """
    parts: list[list[Piece]] = [[]]
    for piece in _read(prompt):
        if piece is None:
            parts.append([])
        else:
            parts[-1].append(piece)
    if len(parts) > 1 and not "".join(text for text, _ in parts[-1]).strip():
        parts.pop()
        parts[-1] = _strip(parts[-1], right=True)
    return [_merge(_strip(_strip(part, left=i > 0), right=i < len(parts) - 1)) for i, part in enumerate(parts)]


class _Bracket:
    """An open bracket; around: the one of its kind around it, None for the ground on which there is none."""

    def __init__(self, around: "_Bracket | None", number: int, steps: int) -> None:
        self.around, self.number = around, number
        self.steps, self.factor = steps, 1.0  # times 1.1 so often, and times factor: never both

    def add(self) -> None:
        """Count in the brackets around it, of which this was done before."""
        if self.around is not None:
            self.steps += self.around.steps
            self.factor *= self.around.factor


def _read(prompt: str) -> list[Piece | None]:
    """The characters, or runs of them, with their weights; None for a BREAK. Linear in the prompt's length."""
    inner = {"(": _Bracket(None, 0, 0), "[": _Bracket(None, 0, 0)}  # the innermost open one of each kind
    brackets: list[_Bracket] = []
    texts: list[tuple[str | None, _Bracket, _Bracket]] = []
    for token in _TOKEN.finditer(prompt):
        text, end = token[0], token["end"] or token[0]
        round_, square = inner["("], inner["["]
        if text in "([":
            inner[text] = _Bracket(inner[text], len(brackets) + 1, 1 if text == "(" else -1)
            brackets.append(inner[text])
        elif end == ")" and round_.around:
            if token["number"] is not None:
                round_.steps, round_.factor = 0, float(token["number"])
            inner["("] = round_.around
        elif square.around and ((end == "]" and token["number"]) or (text == "|" and square.number > round_.number)):
            raise ValueError(f"{prompt[:80]!r} edits the prompt while it is drawn ({text!r} in square brackets): make "
                             r"two conditionings and switch between them by sigma, or write \: and \| for text")
        elif end == "]" and square.around:
            inner["["] = square.around
        else:
            texts.append((None if token["break"] else token["literal"] or text, round_, square))
    for bracket in brackets:  # the steps as a sum, so that ([x]) is exactly 1
        bracket.add()
    return [None if text is None else (text, _weight(round_.steps + square.steps, round_.factor, prompt))
            for text, round_, square in texts]


def _weight(step: int, factor: float, prompt: str) -> float:
    try:
        weight = factor * 1.1**step
    except OverflowError:
        weight = math.inf
    if not math.isfinite(weight):
        raise ValueError(f"the weights in {prompt[:80]!r} multiply to {weight}: give finite ones")
    return weight


def _strip(pieces: list[Piece], left: bool = False, right: bool = False) -> list[Piece]:
    """Without white space at that end; the pieces are characters or single escaped ones."""
    words = [i for i, (text, _) in enumerate(pieces) if text.strip()]
    if not words:
        return [] if left or right else pieces
    return pieces[words[0] if left else 0:words[-1] + 1 if right else len(pieces)]


def _merge(pieces: list[Piece]) -> list[Piece]:
    rows = groupby((piece for piece in pieces if piece[0]), key=itemgetter(1))
    return [("".join(text for text, _ in row), weight) for weight, row in rows] or [("", 1.0)]
