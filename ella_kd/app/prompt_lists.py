"""The prompt lists of published benchmarks, and which files each benchmark's own scorer wants to find."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ella_kd.app.dpg_questions import read_questions
from ella_kd.app.sheets import Sheet

DPG_CELLS, GENEVAL_PICTURES, COMPBENCH_PICTURES = 4, 4, 10


def dpg_prompts(source: Path) -> dict[str, str]:
    """DPG-Bench's prompts by their names: from the folder of `NAME.txt` files, or the CSV's item_id and text.

    Raises FileNotFoundError, or ValueError for a folder without prompts and for a file that is empty or not UTF-8.
    """
    if source.is_file():
        return {question.item: question.prompt for question in read_questions(source)}
    if not source.is_dir():
        raise FileNotFoundError(f"no prompts at {source}: expected DPG-Bench's folder of .txt files, or its CSV")
    prompts = {path.stem: _text(path).strip() for path in sorted(source.glob("*.txt"))}
    if not prompts:
        raise ValueError(f"{source} holds no .txt file: expected DPG-Bench's folder of prompts")
    if empty := [name for name, prompt in prompts.items() if not prompt]:
        raise ValueError(f"{source / empty[0]}.txt is empty: expected a prompt")
    return prompts


def dpg_sheets(source: Path, folder: Path, seed: int = 0) -> list[Sheet]:
    """A sheet of four for each prompt, `sheets/NAME.png`: top left, top right, bottom left, bottom right are drawn from
    seed, seed + 1, seed + 2, seed + 3."""
    return [Sheet(folder / "sheets" / f"{_file_name(name)}.png",
                  tuple((prompt, seed + i) for i in range(DPG_CELLS))) for name, prompt in dpg_prompts(source).items()]


def geneval_sheets(source: Path, folder: Path, seed: int = 0) -> list[Sheet]:
    """Four pictures for each line of GenEval's `evaluation_metadata.jsonl`: `00000/samples/0000.png`."""
    return [Sheet(folder / f"{i:05d}" / "samples" / f"{k:04d}.png", ((line["prompt"], seed + k),))
            for i, line in enumerate(geneval_lines(source)) for k in range(GENEVAL_PICTURES)]


def write_geneval_metadata(source: Path, folder: Path) -> None:
    """What GenEval's scorer reads beside the pictures: each line of its list as `00000/metadata.jsonl`."""
    for i, line in enumerate(geneval_lines(source)):
        (folder / f"{i:05d}").mkdir(parents=True, exist_ok=True)
        (folder / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps(line), encoding="utf-8")


def geneval_lines(source: Path) -> list[dict[str, Any]]:
    """Raises FileNotFoundError, or ValueError that names a line that is no JSON object with a prompt."""
    lines = []
    for number, text in enumerate(_lines(source), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
            raise ValueError(f"{source}, line {number}: expected a JSON object with a prompt, got {text[:60]!r}")
        lines.append(line)
    return lines


def compbench_sheets(source: Path, folder: Path, seed: int = 0) -> list[Sheet]:
    """Ten pictures for each line of one of T2I-CompBench's lists: `samples/PROMPT_000000.png`.

    Raises ValueError for a prompt that cannot be a file's name, or that its scorer could not read back from it.
    """
    prompts = list(dict.fromkeys(_lines(source)))
    for prompt in prompts:
        if "_" in prompt:
            raise ValueError(f"T2I-CompBench reads the prompt from the file's name, up to the first _: {prompt[:60]!r}")
    return [Sheet(folder / "samples" / f"{_file_name(f'{prompt}_{k:06d}')}.png", ((prompt, seed + k),))
            for prompt in prompts for k in range(COMPBENCH_PICTURES)]


def _lines(source: Path) -> Sequence[str]:
    if not source.is_file():
        raise FileNotFoundError(f"no list of prompts at {source}")
    lines = [line.strip() for line in _text(source).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{source} holds no prompt: expected one per line")
    return lines


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error


def _file_name(name: str) -> str:
    if not name or name in (".", "..") or {"/", "\\", "\0"} & {*name} or len(name.encode()) > 250:
        raise ValueError(f"a sheet cannot be named {name[:60]!r}: its name becomes a file's")
    return name
