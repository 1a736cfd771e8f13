"""Writes the README's table of samplers from the library's own: `python -m benchmarks.readme`."""

from __future__ import annotations

from pathlib import Path

from ella_kd.samplers import SAMPLERS

README = Path(__file__).parents[1] / "README.md"


def between_marks(text: str, name: str, content: str) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- /name -->` replaced. ValueError without the marks."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in text or end not in text:
        raise ValueError(f"expected the marks {start.strip()} and {end}")
    return text[: text.index(start) + len(start)] + content + "\n" + text[text.index(end) :]


def samplers_table() -> str:
    """A Markdown row per method; `tests/test_samplers_orders.py` measures the orders that it states."""
    rows = ["| `sample_` | family | order | evaluations a step | adds noise | CFG++ |", "|---|---|---|---|---|---|"]
    for name, sampler in SAMPLERS.items():
        if sampler.cfg_pp:
            continue
        noise = "yes" if sampler.stochastic else ""
        cfg_pp = f"`{name}_cfg_pp`" if f"{name}_cfg_pp" in SAMPLERS else ""
        rows.append(f"| `{name}` | {sampler.family} | {sampler.order} | {sampler.evals} | {noise} | {cfg_pp} |")
    return "\n".join(rows)


if __name__ == "__main__":
    README.write_text(between_marks(README.read_text(), "samplers", samplers_table()))
