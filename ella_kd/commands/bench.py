"""`ella-kd bench`."""

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from tqdm.auto import tqdm

from ella_kd.app import dpg_report, prompt_lists
from ella_kd.app.dpg_answers import ask, find_sheets, read_answers
from ella_kd.app.dpg_judges import BLIP, ChatVQA, Judge, TransformersVQA
from ella_kd.app.dpg_questions import by_item, read_questions
from ella_kd.app.dpg_score import CELLS, ZEROINGS, Zeroing
from ella_kd.app.sheets import Sheet, draw_sheets, is_drawn, open_folder, settings_of
from ella_kd.options import FILES, Command, check_folder, load, model_options, request_options
from ella_kd.prompts import expand_wildcards
from ella_kd.request import seed_number


@click.group()
def bench() -> None:
    """Draw the prompts of published benchmarks, and score DPG-Bench."""


@bench.group()
def dpg() -> None:
    """DPG-Bench (arXiv 2403.05135): dense prompts, four pictures each, and yes-or-no questions about them."""


@bench.group()
def geneval() -> None:
    """GenEval (arXiv 2310.11513): its prompts in, its folders out; its own code scores them."""


@bench.group()
def compbench() -> None:
    """T2I-CompBench (arXiv 2307.06350): its prompts in, its names out; its own code scores them."""


def drawing(default: str) -> Any:
    """What the three commands that draw have in common: where to, from which seed, and every option of generate."""
    def add(command: Command) -> Command:
        options: list[Command] = [
            click.option("--out", type=click.Path(path_type=Path), default=Path("out") / default, show_default=True,
                         metavar="DIR", help="Where the pictures go; what is there is kept, and not drawn again."),
            click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                         help="Of each prompt's first picture; the next take seed + 1, ..."),
            request_options(), model_options,
        ]
        for option in reversed(options):
            command = option(command)
        return command

    return add


@dpg.command()
@click.argument("prompts", type=click.Path(path_type=Path))
@drawing("dpg")
def generate(prompts: Path, out: Path, seed: int, **options: Any) -> None:
    """Draw four pictures of every prompt on a sheet of 2 x 2, sheets/NAME.png.

    PROMPTS is the published folder of .txt files, or the CSV of questions, which has the prompts too. The same command
    goes on where it was stopped; another with other settings is refused. A sheet says how its pictures were made.

    \b
    Example:
      ella-kd bench dpg generate dpg_bench/prompts --model ella-sd15 --out runs/ella
      ella-kd bench dpg score runs/ella/sheets --csv dpg_bench/dpg_bench.csv
    """
    _draw(prompt_lists.dpg_sheets(prompts, out, seed), out, seed, options)


@geneval.command("generate")
@click.argument("prompts", type=click.Path(path_type=Path))
@drawing("geneval")
def generate_geneval(prompts: Path, out: Path, seed: int, **options: Any) -> None:
    """Draw four pictures of every prompt, 00000/samples/0000.png with 00000/metadata.jsonl, as GenEval's own
    evaluate_images.py reads them.

    PROMPTS is GenEval's evaluation_metadata.jsonl.

    \b
    Example:
      ella-kd bench geneval generate geneval/prompts/evaluation_metadata.jsonl --out runs/geneval
    """
    _draw(prompt_lists.geneval_sheets(prompts, out, seed), out, seed, options)
    prompt_lists.write_geneval_metadata(prompts, out)


@compbench.command("generate")
@click.argument("prompts", type=click.Path(path_type=Path))
@drawing("compbench")
def generate_compbench(prompts: Path, out: Path, seed: int, **options: Any) -> None:
    """Draw ten pictures of every prompt, samples/PROMPT_000000.png, as T2I-CompBench's own scripts read them.

    PROMPTS is one of its lists, color_val.txt and so on; give each a folder of its own.

    \b
    Example:
      ella-kd bench compbench generate T2I-CompBench/examples/dataset/color_val.txt --out runs/color
    """
    _draw(prompt_lists.compbench_sheets(prompts, out, seed), out, seed, options)


def _draw(sheets: Sequence[Sheet], out: Path, seed: int, options: dict[str, Any]) -> None:
    """Draws what is not there yet of some sheets."""
    from ella_kd.cli import Stopped, check  # it knows this file

    folder, batch = options["wildcards"], options.pop("batch")
    asked, rule = check(list(dict.fromkeys(prompt for sheet in sheets for prompt, _ in sheet.cells)), seed, options)
    seed_number(max(seed for sheet in sheets for _, seed in sheet.cells))
    if folder:
        sheets = [replace(sheet, cells=tuple((expand_wildcards(prompt, folder, own), own)
                                             for prompt, own in sheet.cells)) for sheet in sheets]
    check_folder(out)
    named = {name: options[name] for name in ("model", *FILES, "offset", "prediction", "dtype", "wildcards")}
    open_folder(out, settings_of(asked, seed=seed, **named))
    left = [sheet for sheet in sheets if not is_drawn(sheet)]
    if left:
        modes = {"--mode " + options["mode"]: options["mode"], "--tags": options["tags"] and "clip",
                 f"--negative-mode {options['negative_mode']}": options["negative_mode"]}
        pipeline, there = load(options, modes.items()), len(sheets) - len(left)
        try:
            with tqdm(total=len(sheets), initial=there, unit="sheet") as bar, closing(
                    draw_sheets(pipeline, left, asked, guidance=rule, models_dir=options["models_dir"],
                                batch_size=batch)) as drawn:
                for _ in drawn:
                    there += 1
                    bar.update()
        except KeyboardInterrupt as error:
            raise Stopped(f"stopped: {there} of {len(sheets)} are saved in {out}; the same command goes on") from error
    click.echo(f"{click.format_filename(out)}: {len(sheets)} files, {len(left)} of them new")


@dpg.command("score")
@click.argument("sheets", required=False, type=click.Path(path_type=Path))
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), required=True, metavar="FILE",
              help="The questions: dpg_bench.csv.")
@click.option("--vqa", metavar="ID", default=BLIP, show_default=True,
              help="The judge: a visual-question-answering model of transformers (BLIP, ViLT), on the hub or a folder.")
@click.option("--chat", metavar="URL", help="A judge behind an OpenAI-compatible endpoint: http://localhost:8000/v1; "
                                            "its key is the environment's OPENAI_API_KEY.")
@click.option("--chat-model", metavar="NAME", help="The chat model's name there.")
@click.option("--answers", type=click.Path(path_type=Path), metavar="FILE",
              help="Answers on file in place of sheets and a judge: JSONL with item, cell (0 to 3), id, answer.")
@click.option("--judge", metavar="NAME", help="Whose answers, if the file holds those of several.")
@click.option("--cells", type=click.IntRange(1, CELLS), default=CELLS, show_default=True,
              help="How many of a sheet's pictures count, in reading order.")
@click.option("--cell-size", type=click.IntRange(min=1), metavar="PX",
              help="The side of a cell.  [default: half of what most sheets measure]")
@click.option("--black-cells", is_flag=True,
              help="Judge a cell beyond a sheet's edge as black, as the published script does, instead of naming it.")
@click.option("--zeroing", type=click.Choice(ZEROINGS), default="dpg", show_default=True,
              help="How far a no reaches. dpg: to children of children; dsg: to children.")
@click.option("--partial", is_flag=True, help="Score without prompts that lack a sheet or an answer, and name them.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where answers and scores go.  [default: scores, beside SHEETS; the folder of --answers]")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Questions asked at once.")
@click.option("--device", metavar="NAME", help="Of --vqa.  [default: cuda if there is one, else cpu]")
@click.option("--plot/--no-plot", default=True, show_default=True, help="Draw scores.png, which needs matplotlib.")
def score(sheets: Path | None, csv_file: Path, vqa: str, chat: str | None, chat_model: str | None,
          answers: Path | None, judge: str | None, cells: int, cell_size: int | None, black_cells: bool,
          zeroing: Zeroing, partial: bool, out: Path | None, batch: int, device: str | None, plot: bool) -> None:
    """Ask a judge about every picture of SHEETS, and add up what it says.

    Writes answers.jsonl, in which every answer is kept as it comes: the same command goes on where it was stopped, and
    other settings score the same answers anew. Then scores.json, scores.md and scores.png: the arithmetic as it is
    published, with its faults, and as it is meant, by category, with bootstrap intervals over prompts. A name is all
    that tells judges apart: numbers of different ones cannot be compared, nor with papers, whose judge is mPLUG-large.

    \b
    Examples:
      ella-kd bench dpg score runs/ella/sheets --csv dpg_bench.csv
      ella-kd bench dpg score runs/ella/sheets --csv dpg_bench.csv --chat http://localhost:8000/v1 --chat-model qwen
      ella-kd bench dpg score --answers runs/ella/scores/answers.jsonl --csv dpg_bench.csv --zeroing dsg
    """
    questions = read_questions(csv_file)
    if (sheets is None) == (answers is None):
        raise ValueError("give a folder of sheets, or --answers, a file of answers")
    if plot:
        dpg_report.pyplot()
    missing: dict[str, str] = {}
    if answers is not None:
        folder = out or answers.parent
        name, found = read_answers(answers, judge)
        names = sorted({item for item, *_ in found})
    else:
        assert sheets is not None
        folder = out or sheets.resolve().parent / "scores"
        paths = find_sheets(sheets)
        names, missing = list(paths), {item: "no sheet" for item in by_item(questions) if item not in paths}
        _refuse(missing, partial)
        check_folder(folder)
        who = _judge(vqa, chat, chat_model, device)
        name = judge or who.name  # type: ignore[attr-defined]
        asked = _ask(who, name, paths, questions, folder / "answers.jsonl", cells=cells, black=black_cells,
                     size=cell_size and (cell_size, cell_size), batch_size=batch)
        found, missing = asked.answers, missing | {item: asked.unreadable[item] for item in asked.unreadable}
    result = dpg_report.report(questions, found, names, judge=name, cells=cells, zeroing=zeroing, missing=missing)
    _refuse(result["missing"], partial)
    check_folder(folder)
    written = dpg_report.write(result, folder, plot)
    click.echo(dpg_report.markdown(result))
    click.echo("\n".join(click.format_filename(path) for path in written))


def _judge(vqa: str, chat: str | None, chat_model: str | None, device: str | None) -> Judge:
    if (chat is None) != (chat_model is None):
        raise ValueError("a chat model needs both --chat, its URL, and --chat-model, its name there")
    return TransformersVQA(vqa, device=device) if chat is None or chat_model is None else ChatVQA(chat, chat_model)


def _ask(judge: Judge, name: str, paths: dict[str, Path], questions: Any, file: Path, **how: Any) -> Any:
    from ella_kd.cli import Stopped

    items = by_item(questions)
    total = how["cells"] * sum(len(items.get(item, ())) for item in paths)
    with tqdm(total=total, unit="answer", file=sys.stderr) as bar:
        try:
            return ask(paths, questions, judge, name, file, progress=bar.update, **how)
        except KeyboardInterrupt as error:
            raise Stopped(f"stopped: {bar.n} of {total} answers are kept in {file}; the same command goes on"
                          ) from error


def _refuse(missing: dict[str, str], partial: bool) -> None:
    if missing and not partial:
        few = "; ".join(f"{item}: {reason}" for item, reason in list(missing.items())[:3])
        raise ValueError(f"{len(missing)} prompts have no score, {few}{'; ...' * (len(missing) > 3)}: draw or ask for "
                         "what is missing, or score without them, --partial")
