"""Where a benchmark writes: a folder of its own, or the pages and pictures of this repository when it is told to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

HERE = Path(__file__).parent
#: A table's place in a page outside the repository.
START = "## {0}\n\n<!-- {0} -->\n<!-- /{0} -->\n\n"


@dataclass(frozen=True)
class Results:
    """name: the benchmark's. folder: where its files go. published: whether that is this repository's own."""

    name: str
    folder: Path
    published: bool

    def write_tables(self, tables: dict[str, str]) -> None:
        """Each between its marks: in benchmarks/README.md when published, else in a page of their own, made anew."""
        page = self.folder / ("README.md" if self.published else f"{self.name}.md")
        text = page.read_text() if self.published else "".join(START.format(name) for name in tables)
        for name, table in tables.items():
            text = between_marks(text, name, table)
        page.write_text(text)


def writes(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options --out and --publish of a click command, which gets them as `results`; the folder is made first."""
    def decorate(main: Callable[..., None]) -> Callable[..., None]:
        @click.option("--out", type=click.Path(path_type=Path, file_okay=False),
                      help=f"Folder for the files; made if it is not there.  [default: out/{name}]")
        @click.option("--publish", is_flag=True, help="Replace the files in benchmarks/ and the tables of the READMEs.")
        @functools.wraps(main)
        def command(out: Path | None, publish: bool, **options: Any) -> None:
            if publish and out is not None:
                raise click.UsageError("--publish writes into benchmarks/: leave --out away")
            folder = HERE if publish else out or Path("out") / name
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise click.BadParameter(f"cannot make {folder}: {error.strerror}", param_hint="--out") from error
            main(results=Results(name, folder, publish), **options)

        return command

    return decorate


def device(_context: click.Context, _parameter: click.Parameter, name: str) -> torch.device:
    """A click callback: the device of this name, if this machine has it."""
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise click.BadParameter(f"no {name!r} on this machine: {str(error).splitlines()[0]}") from error
    return found


def between_marks(text: str, name: str, content: str) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- /name -->` replaced. ValueError without the marks."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in text or end not in text:
        raise ValueError(f"expected the marks {start.strip()} and {end}")
    return text[: text.index(start) + len(start)] + content + "\n" + text[text.index(end) :]
