"""Writes the README's table of samplers from the library's own: `python -m benchmarks.readme`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ella_kd.samplers import SAMPLERS, Sampler

README = Path(__file__).parents[1] / "README.md"
MEASURED = Path(__file__).parent / "samplers.json"


def between_marks(text: str, name: str, content: str) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- /name -->` replaced. ValueError without the marks."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in text or end not in text:
        raise ValueError(f"expected the marks {start.strip()} and {end}")
    return text[: text.index(start) + len(start)] + content + "\n" + text[text.index(end) :]


def samplers_table() -> str:
    """A Markdown row per method; the orders are those that `python -m benchmarks.samplers` measured."""
    orders = json.loads(MEASURED.read_text())["orders"] if MEASURED.exists() else {}
    rows = ["| `sample_` | family, paper | evaluations a step | measured order | adds noise | CFG++ |"]
    rows.append("|---" * 6 + "|")
    for name, sampler in SAMPLERS.items():
        if sampler.cfg_pp:
            continue
        order = f"{orders[name]['order']:.2f}" if name in orders else ""
        noise = f"yes ({sampler.solver.noise.capitalize()})" if sampler.stochastic else ""
        forms = [other for other in SAMPLERS if re.fullmatch(rf"{name}(_paper|_comfyui)?_cfg_pp", other)]
        cfg_pp = ", ".join(f"`{form.removeprefix(name)}`" for form in forms)
        family = f"{sampler.family}{paper(sampler)}"
        rows.append(f"| `{name}` | {family} | {sampler.evals} | {order} | {noise} | {cfg_pp} |")
    return "\n".join(rows)


def paper(sampler: Sampler) -> str:
    """The first arXiv number that the function's docstring names, or else the method's."""
    for text in (sampler.function.__doc__, type(sampler.solver).__doc__):
        found = re.search(r"\d{4}\.\d{5}", text or "")
        if found:
            return f", [{found[0]}](https://arxiv.org/abs/{found[0]})"
    return ""


if __name__ == "__main__":
    README.write_text(between_marks(README.read_text(), "samplers", samplers_table()))
