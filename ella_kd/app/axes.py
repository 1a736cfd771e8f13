"""The axes of a grid: what a text of values means, and what each value changes in a request or a model."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from ella_kd.addon_words import FromAddOns
from ella_kd.app.loading import WORDS
from ella_kd.request import Request

FIELDS: dict[str, Field[Any]] = {each.name: each for each in fields(Request)
                                 if each.name not in ("model", "version", "dtype", "hashes")}
MODEL = (*WORDS,)  # options of the model, `ella_kd.options.model_options`
#: Texts of a request in which words are replaced: the prompt, what is written like it, and what holds numbers as text.
TEXTS = ("prompt", "negative", "tags", "guidance", "hires_prompt", "hires_negative", *FromAddOns.add_on_names())
OTHER = {"cfg": "scale", "cfgscale": "scale", "checkpointname": "checkpoint", "var": "variation",
         "denoising": "strength", "denoise": "strength", "lambda": "scale", "scheduler": "schedule", "size": "width"}

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\s*-\s*({_NUMBER})")
_STEPPED = re.compile(rf"({_NUMBER})\s*-\s*({_NUMBER})\s*\(\s*({_NUMBER})\s*\)")
_COUNTED = re.compile(rf"({_NUMBER})\s*-\s*({_NUMBER})\s*\[\s*(\d+)\s*\]")
MOST = 10_000  # values of an axis: more is a slip of the keyboard


@dataclass(frozen=True)
class Value:
    """A value of an axis. sets: options of the request; model: options of the model; replaces: (what, by what) in the
    request's texts; adds: a text behind the prompt."""

    title: str
    sets: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    replaces: tuple[str, str] | None = None
    adds: str = ""


@dataclass(frozen=True)
class Axis:
    title: str
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"the axis {self.title} has no values")


def read_axis(name: str, said: Any) -> Axis:
    """An axis of a grid.

        sampler: euler, heun                        an option of the request or the model, by its name
        scale: 1-7 (+2)                             a range: see `values_of`
        word: {replace: red, values: "red, blue"}   search and replace, in the prompt and the other texts
        size:                                       any title; each value says what it sets
          - {title: wide, width: 96}
          - {title: tall, height: 96}

    Instead of the values themselves a map with `values`, `title`, `option`, `replace`. Raises ValueError that names the
    axis.
    """
    try:
        how = dict(said) if isinstance(said, Mapping) else {"values": said}
        if unknown := how.keys() - {"values", "title", "option", "replace"}:
            raise ValueError(f"unknown key {min(map(str, unknown))!r}: expected values, title, option, replace")
        if how.get("values") in (None, "", [], ()):
            raise ValueError("it has no values")
        title = str(how.get("title", name))
        if "replace" in how:
            return Axis(title, _replacing(how["replace"], how["values"]))
        values = how["values"]
        if isinstance(values, list) and all(isinstance(each, Mapping) for each in values) and "option" not in how:
            return Axis(title, tuple(map(_several, values)))
        option = option_named(str(how.get("option", name)))
        return Axis(title, tuple(_one(option, each) for each in values_of(option, values)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"axis {name}: {error}") from error


def matrix(said: Any) -> list[Axis]:
    """A prompt matrix: each part is an axis of its own, without it and with it behind the prompt; parts as a list or
    as a text, "at night | in snow"."""
    parts = [part.strip() for part in said.split("|")] if isinstance(said, str) else [str(part) for part in said or ()]
    if not parts or not all(parts):
        raise ValueError('matrix: expected parts of a prompt, "at night | in snow", or a list of them')
    return [Axis(part, (Value("without"), Value("with", adds=part))) for part in parts]


def option_named(name: str) -> str:
    """An option by its name in any spelling. ValueError with the nearest."""
    known = {_plain(each): each for each in (*FIELDS, *MODEL)}
    found = known.get(_plain(name)) or OTHER.get(_plain(name))
    if found is None:
        near = [known[each] for each in get_close_matches(_plain(name), known, 3, 0.6)]
        raise ValueError(f"no option is named {name!r}" + (f": did you mean {' or '.join(near)}?" if near else
                                                          ": for words of the prompt say what to replace"))
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def values_of(option: str, said: Any) -> list[Any]:
    """The values that are said for an option: a list, one value, or a text.

    A text is parted by commas, values with a comma in quotes, or by `||`. For numbers `1-5`, `1-10 (+3)` and
    `0-1 [5]`, five of equal distance, and `1, 2, ..., 10` are ranges.
    """
    if isinstance(said, Sequence) and not isinstance(said, str):
        return [_converted(option, each) for each in said]
    if not isinstance(said, str):
        return [_converted(option, said)]
    parts = _parts(said)
    if _is_number(option):
        parts = [str(part) for each in dotted(parts) for part in ranged(each)]
    return [_converted(option, part) for part in parts]


def _parts(text: str) -> list[str]:
    if "||" in text:
        found = [part.strip() for part in text.split("||")]
    else:
        [row] = csv.reader([" ".join(text.splitlines())], skipinitialspace=True, strict=True)
        found = [part.strip() for part in row]
    if not all(found):
        raise ValueError(f"a value is empty in {text[:80]!r}: part values by commas, or by || where they hold commas")
    return found


def dotted(parts: Sequence[str]) -> list[str]:
    """`1, 2, ..., 10`: two values before the dots say the step, one after it the end."""
    if "..." not in parts:
        return list(parts)
    at = parts.index("...")
    if at < 2 or at + 1 >= len(parts) or not all(re.fullmatch(_NUMBER, parts[i]) for i in (at - 2, at - 1, at + 1)):
        raise ValueError("expected two numbers before ... and one after it: 1, 2, ..., 10")
    first, second, last = (float(parts[i]) for i in (at - 2, at - 1, at + 1))
    between = stepped(second, last, second - first)[1:]
    if last == second:
        return [*parts[:at], *dotted(parts[at + 2 :])]
    if between and float(between[-1]) == last:
        del between[-1]
    return [*parts[:at], *between, *dotted(parts[at + 1 :])]


def ranged(part: str) -> list[str]:
    """`1-5`, `1-10 (+3)`, `0-1 [5]` as numbers; anything else as it is."""
    if found := _COUNTED.fullmatch(part):
        start, end, count = float(found[1]), float(found[2]), int(found[3])
        if not 1 <= count <= MOST:
            raise ValueError(f"{part!r} asks for {count} values: expected 1 to {MOST}")
        return [_said(start + (end - start) * i / max(count - 1, 1)) for i in range(count)]
    if found := _STEPPED.fullmatch(part):
        return stepped(*map(float, found.groups()))
    if found := _RANGE.fullmatch(part):
        start, end = float(found[1]), float(found[2])
        return stepped(start, end, math.copysign(1, end - start))
    return [part]


def stepped(start: float, end: float, step: float) -> list[str]:
    """Numbers from start to end, end included where a step lands on it, but for rounding."""
    if not step or (end - start) / step < 0:
        raise ValueError(f"no way leads from {start:g} to {end:g} in steps of {step:g}")
    count = math.floor((end - start) / step + 1e-9) + 1
    if count > MOST:
        raise ValueError(f"{count} values from {start:g} to {end:g}: expected at most {MOST}")
    return [_said(start + i * step) for i in range(count)]


def _said(number: float) -> str:
    return f"{round(number, 10):.10g}"


def _is_number(option: str) -> bool:
    each = FIELDS.get(option)
    if each is None:
        return False
    kinds = {each.type, *getattr(each.type, "__args__", ())}
    return bool(kinds & {int, float}) and str not in kinds


def _converted(option: str, said: Any) -> Any:
    """A text as what the option is; other values as they are."""
    each = FIELDS.get(option)
    if not isinstance(said, str):
        return said
    if each is None:
        flag = isinstance(WORDS[option], bool)
        return _switch(option, said) if flag else said
    kinds = {each.type, *getattr(each.type, "__args__", ())}
    if bool in kinds:
        return _switch(option, said)
    optional = each.default is None or type(None) in kinds
    if optional and said.lower() in ("none", "default", ""):
        return each.default if each.default is not MISSING else None
    if int in kinds and re.fullmatch(r"[+-]?\d+", said):
        return int(said)
    if kinds & {int, float} and str not in kinds:
        if not re.fullmatch(_NUMBER, said):
            raise ValueError(f"{option} is a number, got {said!r}")
        return float(said)
    return said


def _switch(option: str, said: str) -> bool:
    words = {**dict.fromkeys(("on", "yes", "true", "1"), True), **dict.fromkeys(("off", "no", "false", "0"), False)}
    if said.lower() not in words:
        raise ValueError(f"{option} is on or off, got {said!r}")
    return words[said.lower()]


def _one(option: str, value: Any) -> Value:
    title = _title(value)
    if option in MODEL:
        return Value(title, model={option: value})
    return Value(title, sets={option: value})


def _title(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return _said(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_title, value)) or "none"
    return "none" if value is None else str(value)


def _several(said: Mapping[str, Any]) -> Value:
    """A value that says itself what it sets."""
    options = {option_named(str(name)): value for name, value in said.items() if name != "title"}
    if not options and "title" not in said:
        raise ValueError("a value says neither a title nor an option")
    title = str(said.get("title", ", ".join(f"{name} {_title(value)}" for name, value in options.items())))
    return Value(title, {name: _converted(name, value) for name, value in options.items() if name not in MODEL},
                 {name: _converted(name, value) for name, value in options.items() if name in MODEL})


def _replacing(what: Any, said: Any) -> tuple[Value, ...]:
    """Search and replace; the values are texts, `0-1 [5]` and `1, 2, ..., 10` are ranges, `1-5` is a text."""
    if not isinstance(what, (str, int, float)) or not str(what):
        raise ValueError(f"replace says which words are to be replaced, got {what!r}")
    parts = _parts(said) if isinstance(said, str) else [str(each) for each in (
        said if isinstance(said, Sequence) else [said])]
    if isinstance(said, str):
        parts = [part for each in dotted(parts)
                 for part in (ranged(each) if _COUNTED.fullmatch(each) or _STEPPED.fullmatch(each) else [each])]
    return tuple(Value(part, replaces=(str(what), part)) for part in parts)
