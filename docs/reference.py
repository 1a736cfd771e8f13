"""The reference's pages, made of the packages' `__all__` and of the command's own help."""

import ast
import importlib
import inspect
import os
import re
from functools import cache
from itertools import pairwise
from typing import Any

import click

from ella_kd.samplers import SAMPLERS

HOMES = ["ella_kd", "ella_kd.samplers", "ella_kd.guidance", "ella_kd.conditioning", "ella_kd.models"]
"""Every name of their `__all__` is in the reference, once: with the last of them that has it."""
MORE = {  # what the pages speak of beside them
    "Pictures": ["ella_kd.images.Picture", "ella_kd.images.to_images", "ella_kd.images.save_image",
                 "ella_kd.images.contact_sheet", "ella_kd.pictures.options.FromPicture",
                 "ella_kd.pictures.options.FromNoise", "ella_kd.pictures.hires.Hires",
                 "ella_kd.pictures.hires_options.FromHires", "ella_kd.pictures.upscale.upscale",
                 "ella_kd.pictures.progressive.sample_progressively", "ella_kd.pictures.keep.Keep",
                 "ella_kd.pictures.keep.Repaint", "ella_kd.pictures.keep.Unlock", "ella_kd.pictures.start.sigmas_from",
                 "ella_kd.pictures.segments.sample_in_segments", "ella_kd.pictures.inversion.invert"],
    "Add-ons": ["ella_kd.addons.AddOns", "ella_kd.addon_words.FromAddOns", "ella_kd.models.addons.lora.LoRA",
                "ella_kd.models.addons.lora.Strength", "ella_kd.models.addons.lora.with_lora",
                "ella_kd.models.addons.embeddings.Embedding", "ella_kd.models.addons.controlnet.ControlNet",
                "ella_kd.models.addons.t2i.T2IAdapter", "ella_kd.models.addons.ip_adapter.IPAdapter",
                "ella_kd.models.addons.loading.load_control", "ella_kd.models.addons.preprocessing.canny",
                "ella_kd.models.addons.preprocessing.depth"],
    "Networks": ["ella_kd.models.network.Network", "ella_kd.models.networks.BySigma", "ella_kd.models.tiled.Tiled",
                 "ella_kd.models.reuse.Reuse", "ella_kd.models.demofusion.LocalAndGlobal", "ella_kd.refining.HandOver",
                 "ella_kd.models.patches.Patch", "ella_kd.models.seamless.seamless", "ella_kd.inside.FromInside"],
    "Many requests": ["ella_kd.jobs.jobs", "ella_kd.jobs.Job", "ella_kd.placement.Placement",
                      "ella_kd.app.batch.Batch", "ella_kd.app.grid.Grid", "ella_kd.app.web.serve",
                      "ella_kd.app.dpg_questions.read_questions", "ella_kd.app.dpg_answers.ask"],
}
CFG_PP, FORMS = "_cfg_pp", "CFG++ forms"
ORDER = ["Samplers", FORMS, "Schedules", "Functions", "Classes", "Tables and types"]


@cache
def reference() -> dict[str, str]:
    """The pages of the reference by name."""
    found = {f"reference/{home}.md": _page(home) for home in HOMES}
    found["reference/more.md"] = "# And more\n\nWhat the pages speak of beside the names above.\n\n" + "\n".join(
        f"## {title}\n\n" + "".join(_entry(name, whole=True) for name in names) for title, names in MORE.items())
    found["reference/ella-kd.md"] = _command()
    return found


@cache
def homes() -> dict[str, str]:
    """Every public name, "ella_kd.guidance.CFG", and the page that describes it."""
    last = {id(value): home for home in HOMES for name in importlib.import_module(home).__all__
            if _described(value := getattr(importlib.import_module(home), name))}
    return {f"{home}.{name}": f"reference/{last.get(id(getattr(importlib.import_module(home), name)), home)}.md"
            for home in HOMES for name in importlib.import_module(home).__all__}


def _page(home: str) -> str:
    module, where = importlib.import_module(home), homes()
    own = f"reference/{home}.md"
    names = [name for name in module.__all__ if where[f"{home}.{name}"] == own]
    elsewhere = [name for name in module.__all__ if where[f"{home}.{name}"] != own]
    text = f"# {home}\n\n{inspect.getdoc(module)}\n\n"
    if elsewhere:
        text += "| here too | what it is |\n|---|---|\n" + "".join(
            f"| [`{name}`]({os.path.basename(where[f'{home}.{name}'])}#{where[f'{home}.{name}'][10:-3]}.{name}) | "
            f"{_first(getattr(module, name))} |\n" for name in elsewhere) + "\n"
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name, getattr(module, name)), []).append(name)
    for title, some in sorted(groups.items(), key=lambda group: ORDER.index(group[0])):
        text += f"## {title}\n\n" if len(groups) > 1 else ""
        if title == FORMS:
            text += _forms(some, home)
            continue
        text += "".join(_entry(f"{home}.{name}") for name in some)
    return text


def _forms(names: list[str], home: str) -> str:
    """The CFG++ forms of the samplers, whose arguments are theirs."""
    text = ("The arguments of the sampler and `scale`, what cond_scale means: \"lam\", lambda from 0 to 1 (see "
            "[CFGpp](#ella_kd.samplers.CFGpp)).\n\n| form | of | its gain |\n|---|---|---|\n")
    for row in (row for row in SAMPLERS.values() if f"sample_{row.name}" in names):
        plain = next(each.name for each in SAMPLERS.values() if each.method is row.method and not each.cfg_pp)
        gain = "D - U once a step" if row.gain is None else " ".join((row.gain.__doc__ or "").split()).rstrip(".")
        text += (f"| <span id=\"{home}.sample_{row.name}\"></span>`sample_{row.name}` | "
                 f"[`sample_{plain}`](#{home}.sample_{plain}) | {gain} |\n")
    return text + "\n"


def _group(name: str, value: object) -> str:
    if name.endswith(CFG_PP):
        return FORMS
    for prefix, title in {"sample_": "Samplers", "get_sigmas_": "Schedules"}.items():
        if name.startswith(prefix):
            return title
    if not _described(value):
        return "Tables and types"
    return "Classes" if inspect.isclass(value) else "Functions"


def _entry(name: str, whole: bool = False) -> str:
    home, _, last = name.rpartition(".")
    module = importlib.import_module(home)
    if _described(getattr(module, last)):
        return f"::: {name}\n    options: {{heading_level: 3, show_root_full_path: {str(whole).lower()}}}\n\n"
    said = "The version that is installed." if last == "__version__" else _said(module, last)
    return f"### <span id=\"{name}\"></span>`{last}`\n\n{said}\n\n"


def _described(value: object) -> bool:
    return inspect.isclass(value) or inspect.isfunction(value)


def _said(module: Any, name: str) -> str:
    """The text below an assignment, in the module or in that from which it has the name."""
    for each in ast.parse(inspect.getsource(module)).body:
        if isinstance(each, ast.ImportFrom) and any((a.asname or a.name) in (name, "*") for a in each.names):
            source = importlib.import_module(each.module or "")
            original = next((a.name for a in each.names if (a.asname or a.name) == name), name)
            if hasattr(source, original) and (found := _said(source, original)):
                return found
    body = ast.parse(inspect.getsource(module)).body
    for each, after in pairwise(body):
        targets = each.targets if isinstance(each, ast.Assign) else [getattr(each, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets) and isinstance(after, ast.Expr):
            return inspect.cleandoc(str(getattr(after.value, "value", "")))
    return ""


def _first(value: object) -> str:
    """The first sentence of a docstring, for a cell."""
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:])(?<! al\.)(?<! eq\.)\s", text)[0].rstrip(":").replace("|", "\\|")


def _command() -> str:
    """The command's help, as it prints it."""
    from ella_kd.cli import main

    return "# ella-kd\n\n" + "".join(
        (f"## {path}\n\n" if path != "ella-kd" else "") + f"```text\n{_help(command, path)}\n```\n\n"
        for path, command in commands(main).items())


def commands(command: click.Command, path: str = "ella-kd") -> dict[str, click.Command]:
    """A command and those below it, by their words."""
    found = {path: command}
    for name, each in command.commands.items() if isinstance(command, click.Group) else ():
        found |= commands(each, f"{path} {name}")
    return found


def _help(command: click.Command, path: str) -> str:
    return command.get_help(click.Context(command, info_name=path, max_content_width=100, terminal_width=100))
