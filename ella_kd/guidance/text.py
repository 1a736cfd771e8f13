"""Rules as text: what `repr` writes, read back; how the command line and a picture's settings name them."""

import ast
import math
from difflib import get_close_matches
from typing import Any

from ella_kd import guidance as rules
from ella_kd.guidance.rule import Guidance

OF_OBJECTS = {"AutoGuidance": "a second model", "Patched": "a patch", "Perturbed": "a patch",
              "PromptToPrompt": "a patch"}


def parse(text: str) -> Guidance:
    """The rule that a text names: `parse("Rescale(CFG(7), phi=0.7)")`. Numbers, strings, tuples and `inf` as arguments.

    Nothing is executed. Raises ValueError for anything else, naming the rules that exist.
    """
    shown = text if len(text) <= 80 else f"{text[:80]}..."
    try:
        rule = _value(ast.parse(text.strip(), mode="eval").body, shown)
    except (SyntaxError, RecursionError, MemoryError, UnicodeError) as error:  # thousands of signs or brackets too
        raise ValueError(f"not a guidance rule: {shown!r}: expected something like CFG(7) or Rescale(CFG(7), 0.7)"
                         ) from error
    if not isinstance(rule, Guidance):
        raise ValueError(f"not a guidance rule: {shown!r}: expected something like CFG(7) or Rescale(CFG(7), 0.7)")
    return rule


def known() -> dict[str, type[Guidance]]:
    """The rules that a text may name: those that take nothing but numbers, names and rules."""
    found = {name: getattr(rules, name) for name in rules.__all__ if name not in OF_OBJECTS}
    return {name: rule for name, rule in found.items()
            if isinstance(rule, type) and issubclass(rule, Guidance) and rule is not Guidance}


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name, table = node.func.id, known()
        if name in OF_OBJECTS:
            raise ValueError(f"{name} takes {OF_OBJECTS[name]}, which a text cannot name: use it in a script")
        if name not in table:
            near = get_close_matches(name, table, 3)
            raise ValueError(f"unknown guidance rule {name!r}: "
                             + (f"did you mean {', '.join(near)}?" if near else f"choose {', '.join(sorted(table))}"))
        args = [_value(arg, text) for arg in node.args]
        keywords: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg in keywords:
                raise ValueError(f"{name} takes each argument once, by its name, in the guidance rule {text!r}")
            keywords[keyword.arg] = _value(keyword.value, text)
        try:
            return table[name](*args, **keywords)
        except TypeError as error:
            raise ValueError(f"{name}: {str(error).replace(f'{name}.__init__() ', '')}") from error
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    if isinstance(node, ast.Tuple):
        return tuple(_value(element, text) for element in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(f"cannot read {ast.unparse(node)[:80]!r} in the guidance rule {text!r}") from error
