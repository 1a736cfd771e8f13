"""The documentation: its blocks run as they stand, on the miniature in few steps, and every public name is in it.

```python blocks of a page are one script, ```bash blocks are run, of ```console ones the options are read; ```py is to
be looked at.
"""

import importlib
import re
import runpy
import shlex
from contextlib import suppress
from dataclasses import fields
from inspect import isclass, isfunction, ismethod, signature
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.exceptions import Exit
from click.testing import CliRunner
from PIL import Image, ImageDraw

import ella_kd
import studio
from ella_kd import cli
from ella_kd.denoiser import Denoiser
from ella_kd.models.files.presets import PRESETS
from ella_kd.pipeline import MINIATURE
from ella_kd.samplers import SAMPLERS, SCHEDULES
from ella_kd.samplers.registry import COMPATIBLE_SCHEDULES, RANGE_SAMPLERS

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))}
TEXTS = [*PAGES.values(), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md"))]
REFERENCE = runpy.run_path(str(ROOT / "docs" / "reference.py"))
COMMANDS: dict[str, click.Command] = REFERENCE["commands"](cli.main)
STEPS = 1
BLOCK = re.compile(r"^```(python|bash|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Each `ella-kd ...` of a block as its words; lines may go on after a backslash."""
    lines = (line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines())
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"(\S*/)?ella-kd\s", line)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pages speak of, in the current folder; one miniature for all, and few steps."""
    monkeypatch.chdir(tmp_path)
    image = Image.new("RGB", (48, 48), "white")
    ImageDraw.Draw(image).rectangle((8, 8, 24, 24), fill="red")
    image.save("room.png")
    mask = Image.new("L", (48, 48))
    mask.paste(255, (24, 0, 48, 48))
    mask.save("mask.png")
    Path("prompts.txt").write_text("The scene is set in snow. A red heart sits in the center.\n")
    Path("wildcards").mkdir()
    Path("wildcards", "where.txt").write_text("in the center\nat the top left\n")
    Path("models").mkdir()
    Path("models", "miniature").symlink_to(MINIATURE)
    miniature = studio.miniature()
    monkeypatch.setattr(ella_kd.Pipeline, "miniature", lambda **given: miniature)

    def short(function: Any) -> Any:
        return lambda *args, **given: function(*args, **{"progress": False, **given, "steps": min(
            STEPS, given.get("steps", STEPS))})

    for name in ("draw", "generate"):
        monkeypatch.setattr(ella_kd, name, short(getattr(ella_kd, name)))
    return tmp_path


@pytest.mark.usefixtures("tables", "folder")
@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if BLOCK.search(path.read_text())])
def test_a_page_runs(page: str) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for kind, block in BLOCK.findall(PAGES[page].read_text()):
        if kind == "python":
            exec(compile(block, f"docs/{page}", "exec"), names)
        for words in commands(block) if kind == "bash" else ():
            more = ["--steps", str(STEPS)] if words[0] in ("generate", "compare") and "--sigmas" not in words else []
            done = CliRunner().invoke(cli.main, [*words, *more], catch_exceptions=False)
            assert done.exit_code == 0, f"{words}: {done.output}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_have_their_options(path: Path) -> None:
    text = path.read_text()
    shown = [words for block in re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
             for words in commands(block)]
    shown += commands("\n".join(line for line in text.splitlines() if line.startswith("    ")))
    for words in shown:
        command: Any = cli.main
        name = "ella-kd"
        while isinstance(command, click.Group):
            name, command = f"{name} {words[0]}", command.commands[words.pop(0)]
        with suppress(Exit):  # --help
            command.make_context(name, words).close()
    known = {option for command in COMMANDS.values() for param in command.params for option in param.opts}
    said = set(re.findall(r"(?<=`)--[a-z][a-z0-9-]*", text)) - OTHERS
    assert said <= known, said - known


OTHERS = {"--no-deps", "--publish"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        page = path.parent / file if file else path
        assert page.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\s-]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_our_names_beside_theirs_exist() -> None:
    """The last column of the tables of names: what is called, arguments, and names of samplers and schedules."""
    names = [*REFERENCE["homes"](), *(name for some in REFERENCE["MORE"].values() for name in some)]
    values = [getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    known = {name.rpartition(".")[2] for name in names} | {*dir(torch), *dir(Denoiser), *SAMPLERS, *SCHEDULES}
    known |= {*COMPATIBLE_SCHEDULES, *RANGE_SAMPLERS, *PRESETS}
    known |= {name for value in values if isclass(value) for name in dir(value)}
    called = [value for value in values if isfunction(value) or isclass(value)]
    called += [getattr(value, name) for value in called if isclass(value) for name in dir(value) if name[0] != "_"]
    arguments = {each for value in called if isfunction(value) or ismethod(value) or isclass(value)
                 for each in signature(value).parameters}
    arguments |= {each.name for each in fields(ella_kd.Request)} | {"window"}
    cells = [line.replace("\\|", "").rstrip(" |").rpartition("|")[2]
             for line in PAGES["coming-from.md"].read_text().splitlines() if line.startswith("|")]
    code = [code for cell in cells for code in re.findall(r"`([^`]+)`", cell) if not code.startswith(("--", "("))]
    wrong = []
    for one in code:
        said = set(re.findall(r"(?<![\w\"/])([A-Za-z_]\w+)(?=\()", one))
        said |= {one} if one.islower() and one.isidentifier() else set()
        given = set(re.findall(r"(\w+)=(?!=)", re.sub(r"\".*?\"", "", one)))
        wrong += [(one, name) for name in (said - known - arguments) | (given - arguments)]
    assert not wrong


def test_every_public_name_is_in_the_reference() -> None:
    pages = REFERENCE["reference"]()
    for name, page in REFERENCE["homes"]().items():
        home, _, last = name.rpartition(".")
        own = f"{page.removeprefix('reference/').removesuffix('.md')}.{last}"
        assert f"::: {own}\n" in pages[page] or f"#{own}}}" in pages[page] or f'id="{own}"' in pages[page], name
        assert f"`{last}`" in pages[f"reference/{home}.md"] or f"{home}.{last}\n" in pages[f"reference/{home}.md"], name
    for name, command in COMMANDS.items():
        assert all(option in pages["reference/ella-kd.md"] for param in command.params for option in param.opts[:1]
                   if option.startswith("--")), name
