"""Prompts that change from step to step, in the notation of A1111's web UI: `[from:to:when]`, `[a|b]`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_TOKEN = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
_NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)\s*")
_Piece = str | tuple[str, ...]  # the same at every step, or one text per step


def edits(prompt: str, steps: int) -> list[str]:
    r"""What the prompt says at each step: `[from:to:when]`, `[to:when]`, `[from::when]` and `[a|b]` read.

    A1111's prompt editing: `to` after `when` steps, a number with a point being a fraction of the steps (.5, 1.0); a
    and b in turns, a new one at every step. They nest; `\[`, `\:` and `\|` are text. All other
    brackets stay, for the attention syntax to read.
    """
    stack, squares = [_Edit("")], 0
    for token in _TOKEN.findall(prompt):
        top = stack[-1]
        if token in ("(", "["):
            stack.append(_Edit(token))
            squares += token == "["
        elif token in (":", "|") and top.opener == "[":
            top.marks.append(token)
            top.fields.append([])
        elif token == ")" and top.opener == "(":
            stack.pop()
            stack[-1].add("(", *top.flat(), ")")
        elif token == "]" and squares:
            last = next(i for i in range(len(stack) - 1, 0, -1) if stack[i].opener == "[")
            _unclosed(stack, last)
            stack[last - 1].add(*stack.pop().edited(steps))
            squares -= 1
        else:
            top.add(token)
    _unclosed(stack, 0)
    said = _joined(stack[0].flat())
    return [said] * steps if isinstance(said, str) else list(said)


def _unclosed(stack: "list[_Edit]", last: int) -> None:
    """Brackets above the last that are never closed are text of it."""
    for bracket in stack[last + 1 :]:
        stack[last].add(bracket.opener, *bracket.flat())
    del stack[last + 1 :]


@dataclass
class _Edit:
    """A bracket while it is read: its pieces between the colons and bars that part them; a piece that changes is one
    text per step."""

    opener: str
    fields: list[list[_Piece]] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list)

    def add(self, *pieces: _Piece) -> None:
        self.fields[-1] += pieces

    def flat(self) -> list[_Piece]:
        rest = [piece for mark, some in zip(self.marks, self.fields[1:]) for piece in (mark, *some)]
        return [*self.fields[0], *rest]

    def edited(self, steps: int) -> list[_Piece]:
        """What a square bracket says, now that it is closed."""
        if "|" in self.marks:
            options: list[list[_Piece]] = [self.fields[0][:]]
            for mark, some in zip(self.marks, self.fields[1:]):
                if mark == "|":
                    options.append(some[:])
                else:
                    options[-1] += [mark, *some]
            return [_each(steps, lambda i: options[i % len(options)])]
        when = _joined(self.fields[-1])
        if len(self.marks) not in (1, 2) or not isinstance(when, str) or not _NUMBER.fullmatch(when):
            return [_joined(["[", *self.flat(), "]"])]
        share = min(float(when[:99]), 1e9)
        last = int(share * steps) if "." in when else int(share)
        before, after = self.fields[:2] if len(self.marks) == 2 else ([], self.fields[0])
        return [_each(steps, lambda i: before if i < last else after)]


def _joined(pieces: Sequence[_Piece]) -> _Piece:
    if all(isinstance(piece, str) for piece in pieces):
        return "".join(pieces)  # type: ignore[arg-type]
    steps = max(len(piece) for piece in pieces if not isinstance(piece, str))
    return _each(steps, lambda i: pieces)


def _each(steps: int, pieces: Callable[[int], Sequence[_Piece]]) -> tuple[str, ...]:
    return tuple("".join(piece if isinstance(piece, str) else piece[i] for piece in pieces(i)) for i in range(steps))
