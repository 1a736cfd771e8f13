"""The `parameters` text in a PNG, as the AUTOMATIC1111 web UI writes and reads it.

    prompt, of any number of lines
    Negative prompt: ...
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, Model: ...
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, fields
from typing import Any

from PIL import Image

from ella_kd.addon_words import FromAddOns, in_prompt, in_text, without
from ella_kd.addon_words import read as read_door
from ella_kd.inside import FromInside
from ella_kd.pictures import hires_options
from ella_kd.pictures.options import FromPicture
from ella_kd.samplers.names import a1111_sampler, a1111_schedule, sampler_named, schedule_named
from ella_kd.samplers.registry import COMPATIBLE_SCHEDULES

# What the web UI's schedule type "Automatic" is: of these samplers this one, of the others "normal".
AUTOMATIC = {
    **dict.fromkeys(("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_ancestral", "dpm_2", "dpm_2_ancestral", "restart"), "karras"),
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_3m_sde"), "exponential"),
}
PICTURE = {each.metadata.get("label", each.name.replace("_", " ").capitalize()): each
           for each in (*fields(FromPicture), *fields(FromInside))}
DOORS = {f"ELLA {name.replace('_', ' ')}": name for name in FromAddOns.add_on_names()}
_PARTING = str.maketrans("", "", ":,")
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # the web UI's own


def write(values: Mapping[str, Any]) -> str:
    """The text of a request's fields."""
    given = {
        "Steps": values["steps"],
        "Sampler": a1111_sampler(values["sampler"]),
        "Schedule type": a1111_schedule(values["schedule"]),
        "CFG scale": None if values["scale"] is None else f"{values['scale']:g}",
        "Seed": values["seed"],
        "Size": f"{values['width']}x{values['height']}" if values["width"] and values["height"] else None,
        "Model": values["model"] or None,
        "Clip skip": values["clip_skip"] if values["clip_skip"] != 1 else None,
        "Tiling": values["tiling"] or None,
        "Reuse": values["reuse"],
        "ELLA": values["mode"],
        "ELLA negative": values["negative_mode"],
        "ELLA syntax": "on" if values["syntax"] else None,
        "CLIP prompt": values["tags"],
        "Guidance": values["guidance"] or None,
        "Refiner": values["refiner"],
        "Refiner switch at": None if values["refiner"] is None else values["refiner_at"],
        **{label: said(values[each.name]) for label, each in PICTURE.items() if values[each.name] != each.default},
        **hires_options.write(values),
        **_add_ons(values),
        **{label: json.dumps(values[name], ensure_ascii=False) for label, name in DOORS.items() if values[name]},
        "Version": f"ella_kd {values['version']}",
    }
    lines = [values["prompt"].strip() + _loras(values["lora"])]
    if values["negative"].strip():
        lines.append(f"Negative prompt: {values['negative'].strip()}")
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in given.items() if value is not None))
    return "\n".join(lines)


def _loras(doors: Iterable[str]) -> str:
    """The LoRAs of a door, as the web UI has them behind a prompt."""
    return "".join(f" {in_text(read_door('lora', door))}" for door in doors)


def _add_ons(values: Mapping[str, Any]) -> dict[str, str]:
    """The web UI's words for add-ons: hashes, and ControlNet's units, whose pictures they do not name."""
    hashes = dict(each.rpartition("=")[::2] for each in values["hashes"])
    loras = [*(read_door("lora", door) for door in values["lora"]), *in_prompt(values["prompt"])[1]]
    words = [read_door("embedding", door) for door in values["embedding"]]
    found = {}
    for label, add_ons in (("Lora hashes", loras), ("TI hashes", words)):
        said = {each.name.translate(_PARTING): hashes[each.file][:12] for each in add_ons if each.file in hashes}
        if said:
            found[label] = ", ".join(f"{name}: {short}" for name, short in said.items())
    for i, door in enumerate(values["control"]):
        control = read_door("control", door)
        options = dict(control.options)
        model = control.name + (f" [{hashes[control.file][:8]}]" if control.file in hashes else "")
        found[f"ControlNet {i}"] = (f"Module: {options.get('preprocess', 'none')}, Model: {model.translate(_PARTING)}, "
                                    f"Weight: {control.weight:g}, Resize Mode: Just Resize, Control Mode: Balanced")
    return found


def read(text: str) -> tuple[dict[str, Any], list[str]]:
    """A request's fields as far as the text gives them, and the "Key: value" that it has beside them.

    Raises ValueError for a text that does not end in such a line.
    """
    *lines, last = text.strip().split("\n")
    given = {key.strip(): _unquoted(value) for key, value in _PAIR.findall(last)}
    if len(given) < 3:
        raise ValueError(f"expected generation parameters that end in a line such as {'Steps: 20, Sampler: Euler'!r}, "
                         f"got {last[:80]!r}")
    at = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    found: dict[str, Any] = {
        "prompt": "\n".join(lines[:at]).strip(),
        "negative": "\n".join(lines[at:]).removeprefix("Negative prompt:").strip(),
        "version": "",
    }
    made_by = given.pop("Version", "")
    ours = made_by.startswith("ella_kd ")
    if ours:
        found["version"] = made_by.removeprefix("ella_kd ")
    found["mode"] = given.pop("ELLA", "clip")
    found["syntax"] = given.pop("ELLA syntax", "" if ours else "on") == "on"
    if "Sampler" in given:
        found["sampler"], schedule = sampler_named(given.pop("Sampler"))
        label = given.pop("Schedule type", schedule)
        if label is None:
            found["schedule"] = "normal"  # before it had schedule types
        elif label == "Automatic":
            found["schedule"] = AUTOMATIC.get(found["sampler"], "normal")
        else:
            name = schedule_named(label)
            theirs = f"{name}_a1111"  # the curve that the web UI means by this label, where it is not ours
            found["schedule"] = theirs if not ours and theirs in COMPATIBLE_SCHEDULES else name
    if given.get("Tiling") in ("True", "False"):
        found["tiling"] = given.pop("Tiling") == "True"
    if "Size" in given and re.fullmatch(r"\d+x\d+", given["Size"]):
        found["width"], found["height"] = map(int, given.pop("Size").split("x"))
    for key, name, kind in (("Steps", "steps", int), ("CFG scale", "scale", float), ("Seed", "seed", int),
                            ("Clip skip", "clip_skip", int), ("Model", "model", str), ("CLIP prompt", "tags", str),
                            ("ELLA negative", "negative_mode", str), ("Guidance", "guidance", str),
                            ("Reuse", "reuse", str)):
        if key in given:
            found[name] = kind(given.pop(key))
    if ours and "Refiner" in given:
        found |= {"refiner": given.pop("Refiner"), "refiner_at": float(given.pop("Refiner switch at"))}
    found |= hires_options.read(given)
    for label, each in PICTURE.items() if ours else ():
        if label in given:
            value = given.pop(label)
            found[each.name] = _kind_of(each)(value)
    for label, name in DOORS.items() if ours else ():
        if label in given:
            found[name] = tuple(json.loads(given.pop(label)))
    if ours:
        found["prompt"] = f" {found['prompt']}".removesuffix(_loras(found.get("lora", ()))).removeprefix(" ")
        given = {key: value for key, value in given.items()
                 if key not in ("Lora hashes", "TI hashes") and not key.startswith("ControlNet ")}
    else:
        for key in ("Lora hashes", "TI hashes"):
            pairs = [pair.rpartition(": ")[::2] for pair in given.pop(key, "").split(", ") if ": " in pair]
            found["hashes"] = (*found.get("hashes", ()), *(f"{name}={short}" for name, short in pairs))
            if key == "TI hashes":
                found["embedding"] = tuple(name for name, _ in pairs)
    if "CFG scale" not in text and found.get("guidance"):
        found["scale"] = None
    left_out = [f"{key}: {value}" for key, value in given.items()]
    for name in ("prompt", "negative"):
        found[name], add_ons = without(found[name], understood=name == "prompt")
        left_out += add_ons
    return found, left_out


def said(value: object) -> str:
    """An option as text: a switch, noise levels, a picture that is no file."""
    if isinstance(value, Image.Image):
        return f"a picture of {value.width}x{value.height} that is no file"
    if callable(value):
        return hires_options.upscaler_said(value)
    if isinstance(value, tuple):
        return ",".join(map(repr, value))
    return "on" if value is True else str(value)


def _kind_of(each: Field[Any]) -> Callable[[str], Any]:
    if isinstance(each.default, bool):
        return lambda value: value == "on"
    kind: Callable[[str], Any] = each.metadata.get("type", str if each.default is None else type(each.default))
    return kind


def _quoted(value: str) -> str:
    """A value that holds a separator is written as a JSON string, as the web UI does."""
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",\n:") else value


def _unquoted(value: str) -> str:
    if value.startswith('"') and value.endswith('"'):
        try:
            return str(json.loads(value))
        except json.JSONDecodeError:
            pass
    return value.strip()
