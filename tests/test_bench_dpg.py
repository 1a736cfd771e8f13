"""`ella-kd bench`: prompts to sheets, sheets to answers, answers to scores."""

import json
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from ella_kd import Pipeline, cli, generate, jobs
from ella_kd.app import dpg_report
from ella_kd.app.dpg_answers import ask, find_sheets
from ella_kd.app.dpg_judges import ChatVQA
from ella_kd.app.prompt_lists import compbench_sheets, dpg_prompts
from ella_kd.drawing import draw
from test_bench_dpg_score import ROWS, SAID, rows, write_csv

Run = Callable[..., Result]
CELLS = {"A": (250, 0, 0), "B": (0, 250, 0), "C": (0, 0, 250), "D": (250, 250, 0)}  # in the sheets' order


@pytest.fixture
def run(tiny_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `ella-kd bench ...` in an empty folder; what draws gets the tiny model and two steps."""
    monkeypatch.chdir(tmp_path)
    model = [word for name, value in tiny_files.items() for word in (f"--{name.replace('_', '-')}", value)]

    def run(*words: str) -> Result:
        extra = [*model, "--device", "cpu", *([] if "--steps" in words else ["--steps", "2"])]
        return CliRunner().invoke(cli.main, ["bench", *words, *(extra if "generate" in words else [])])

    return run


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in (("COCOval1", "a red circle\n"), ("partiprompts97", "a blue square on the left"), ("2", "a")):
        (folder / f"{name}.txt").write_text(text)
    return folder


def quarters(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        pixels = np.asarray(image, int)
    height, width = (side // 2 for side in pixels.shape[:2])
    return [pixels[y : y + height, x : x + width] for y in (0, height) for x in (0, width)]


def test_sheets_of_four_are_drawn_once_under_the_prompts_names(run: Run, prompts: Path, pipeline: Pipeline,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []

    def spy(*args: Any, seeds: list[int], **options: Any) -> Any:
        drawn.append(seeds)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*args, seeds=seeds, **options)

    monkeypatch.setattr(jobs, "draw", spy)
    words = ("dpg", "generate", str(prompts), "--seed", "5", "--batch", "3", "--width", "24")
    stopped = run(*words)
    assert stopped.exit_code == 130
    assert "stopped: 1 of 3 are saved in out/dpg; the same command goes on" in stopped.stderr
    sheets = Path("out/dpg/sheets")
    [first] = sheets.iterdir()
    before = first.stat().st_mtime_ns, first.read_bytes()
    done = run(*words)
    assert done.exit_code == 0 and "out/dpg: 3 files, 2 of them new" in done.output
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before
    assert drawn == [[5, 6, 7], [8, 5, 6], [7, 8, 5], [5, 6, 7], [8, 5, 6], [7, 8]]
    assert sorted(path.name for path in sheets.iterdir()) == ["2.png", "COCOval1.png", "partiprompts97.png"]
    expected = generate(pipeline, "a blue square on the left", seeds=5, count=4, steps=2, width=24)
    for cell, picture in zip(quarters(sheets / "partiprompts97.png"), expected, strict=True):
        assert np.abs(cell - np.asarray(picture.image, int)).max() <= 1
    with Image.open(sheets / "partiprompts97.png") as image:
        told = json.loads(image.info["ella_kd_sheet"])
    assert [(cell["prompt"], cell["seed"], cell["width"], cell["model"]) for cell in told] == [
        ("a blue square on the left", seed, 24, "sd") for seed in (5, 6, 7, 8)]


def test_a_folder_of_sheets_is_of_one_run(run: Run, prompts: Path) -> None:
    words = ("dpg", "generate", str(prompts), "--batch", "4")
    assert run(*words).exit_code == 0
    sheet = Path("out/dpg/sheets/COCOval1.png")
    whole = sheet.read_bytes()
    for more, message in ((["--steps", "3"], "was started with steps 2, and this is 3: ask for the same or choose"),
                          (["--seed", "1"], "was started with seed 0, and this is 1"),
                          (["--dtype", "bfloat16"], "was started with dtype None, and this is 'bfloat16'")):
        refused = run(*words, *more)
        assert refused.exit_code == 2 and message in refused.stderr
    sheet.write_bytes(whole[:-20])  # what another program's crash may leave
    again = run(*words)
    assert "3 files, 1 of them new" in again.output and sheet.read_bytes() == whole
    (prompts / "COCOval1.txt").write_text("a circle")
    assert "COCOval1.png shows another prompt or other seeds" in run(*words).stderr
    Image.new("RGB", (32, 32)).save(sheet)
    assert "COCOval1.png was not drawn here" in run(*words).stderr


def test_prompts_come_from_the_folder_or_from_the_csv(prompts: Path, tmp_path: Path) -> None:
    assert dpg_prompts(prompts) == {"2": "a", "COCOval1": "a red circle",
                                    "partiprompts97": "a blue square on the left"}
    assert dpg_prompts(write_csv(tmp_path / "q.csv", ROWS)) == {
        name: f'a picture of {name}, "said"' for name in ("first", "a", "b")}
    (prompts / "2.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"2\.txt is empty"):
        dpg_prompts(prompts)
    with pytest.raises(FileNotFoundError, match="no prompts at"):
        dpg_prompts(tmp_path / "none")


def test_the_layouts_of_geneval_and_compbench(run: Run, tmp_path: Path, pipeline: Pipeline) -> None:
    line = {"tag": "two_object", "include": [{"class": "cat", "count": 1}], "prompt": "a red circle"}
    (tmp_path / "meta.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(line) + "\n")
    for _ in range(2):
        assert run("geneval", "generate", "meta.jsonl").exit_code == 0
    found = Path("out/geneval")
    assert sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()) == sorted([
        "settings.json", *(f"{i:05d}/{name}" for i in range(2)
                           for name in ("metadata.jsonl", *(f"samples/{k:04d}.png" for k in range(4))))])
    assert json.loads((found / "00001/metadata.jsonl").read_text()) == line
    with Image.open(found / "00001/samples/0002.png") as image:
        [expected] = generate(pipeline, "a red circle", seeds=2, steps=2)
        assert np.abs(np.asarray(image, int) - np.asarray(expected.image, int)).max() <= 1
    (tmp_path / "color_val.txt").write_text("a red circle.\na red circle.\n")
    assert run("compbench", "generate", "color_val.txt").exit_code == 0
    assert sorted(path.name for path in Path("out/compbench/samples").iterdir()) == [
        f"a red circle._{k:06d}.png" for k in range(10)]
    for wrong, message in (("a_b", "up to the first _"), ("a/b", "cannot be named 'a/b")):
        (tmp_path / "list.txt").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            compbench_sheets(tmp_path / "list.txt", tmp_path)
    (tmp_path / "meta.jsonl").write_text("{}\n")
    assert "meta.jsonl, line 1: expected a JSON object with a prompt" in run("geneval", "generate", "meta.jsonl").stderr


@pytest.fixture
def sheets(tmp_path: Path) -> Path:
    """A sheet of four colours for each item of ROWS, and the CSV."""
    folder = tmp_path / "run" / "sheets"
    folder.mkdir(parents=True)
    sheet = Image.new("RGB", (16, 12))
    for i, colour in enumerate(CELLS.values()):
        sheet.paste(colour, (i % 2 * 8, i // 2 * 6, i % 2 * 8 + 8, i // 2 * 6 + 6))
    for name in SAID:
        sheet.save(folder / f"{name}.png")
    write_csv(tmp_path / "q.csv", ROWS)
    return folder


class Fake:
    """Looks answers up by a cell's colour and the question, and remembers what it was asked."""

    name = "fake"

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def __call__(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        return [self.answer(picture, question) for picture, question in zip(pictures, questions, strict=True)]

    def answer(self, picture: Image.Image, question: str) -> str:
        assert picture.mode == "RGB" and len(set(picture.get_flattened_data())) == 1
        cell = [*CELLS.values()].index(picture.getpixel((0, 0)))  # type: ignore[arg-type]
        item, number = question.removesuffix("?").split()
        self.asked.append((item, cell))
        return {"y": "yes", "n": "no"}[SAID[item][cell][int(number) - 1]]


def test_every_question_is_asked_once_about_every_cell(sheets: Path, tmp_path: Path) -> None:
    paths, judge, file = find_sheets(sheets), Fake(), tmp_path / "answers.jsonl"

    def stopped(pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        if len(judge.asked) >= 10:
            raise KeyboardInterrupt
        return judge(pictures, questions)

    with pytest.raises(KeyboardInterrupt):
        ask(paths, rows(ROWS), stopped, "fake", file, batch_size=5)
    with open(file, "a") as kept:
        kept.write('{"item": "a", "ce')  # killed while it wrote
    found = ask(paths, rows(ROWS), judge, "fake", file, batch_size=5)
    assert len(judge.asked) == len(found.answers) == 4 * len(ROWS) and not found.unreadable
    assert ask(paths, rows(ROWS), judge, "fake", file).answers == found.answers
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(judge.asked) == len(lines) == 28
    assert {**lines[0], "picture": ""} == {"item": "a", "cell": 0, "id": 1, "answer": "yes", "judge": "fake",
                                           "question": "a 1?", "picture": ""}
    ask(paths, rows(ROWS), judge, "another", file)
    assert len(judge.asked) == 56
    with Image.open(paths["b"]) as image:
        image.transpose(Image.Transpose.ROTATE_180).save(paths["b"])  # drawn anew
    ask(paths, rows(ROWS), judge, "fake", file)
    assert judge.asked[56:] == [("b", 3), ("b", 2), ("b", 1), ("b", 0)]
    with pytest.raises(ValueError, match="asked 8 questions and gave 1 answers"):
        ask(paths, rows(ROWS), lambda pictures, questions: ["yes"], "short", file)
    with pytest.raises(ValueError, match="or a probability of yes from 0 to 1, got 2"):
        ask(paths, rows(ROWS), lambda pictures, questions: [2.0] * len(questions), "wide", file)


def test_sheets_that_cannot_be_cut_are_named_or_black(sheets: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 6), CELLS["A"]).save(sheets / "b.png")
    (sheets / "a.png").write_bytes((sheets / "a.png").read_bytes()[:60])
    (sheets / "notes.txt").write_text("not a picture")
    paths = find_sheets(sheets)
    sizes: list[int] = []

    def dark(pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str | float]:
        sizes.extend(pixels for picture in pictures for pixels in (picture.width, picture.height))
        return [float(picture.getpixel((0, 0)) == (0, 0, 0)) for picture in pictures]

    found = ask(paths, rows(ROWS), dark, "dark", tmp_path / "answers.jsonl", size=(8, 6))
    assert found.unreadable == {"a": "it is not a whole picture",
                                "b": "it is 16x6, and four cells of 8x6 are 16x12"}
    found = ask(paths, rows(ROWS), dark, "dark", tmp_path / "answers.jsonl", size=(8, 6), black=True)
    assert [found.answers["b", cell, 1] for cell in range(4)] == [0, 0, 1, 1]
    assert {*sizes} == {8, 6}
    found = ask(paths, rows(ROWS), dark, "dark", tmp_path / "answers.jsonl", size=(4, 3), black=True)
    assert {*sizes} == {8, 6, 4, 3}  # cut otherwise, asked again
    found = ask(paths, rows(ROWS), dark, "dark", tmp_path / "answers.jsonl", size=(8, 6))
    assert "b" in found.unreadable and ("b", 0, 1) not in found.answers
    (sheets / "b.webp").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.png and b\.webp are both a sheet of b"):
        find_sheets(sheets)


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]], list[int]]]:
    """An OpenAI-compatible endpoint that answers as Fake does: its URL, what it was sent, failures to come first."""
    judge, sent, failures = Fake(), list[dict[str, Any]](), list[int]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent.append({"path": self.path, "key": self.headers["Authorization"], **body})
            code = failures.pop() if failures else 200
            shown, said = body["messages"][0]["content"]
            data = b64decode(shown["image_url"]["url"].removeprefix("data:image/png;base64,"))
            question = said["text"].removesuffix(" Answer with yes or no only.")
            answer = judge.answer(Image.open(BytesIO(data)), question).capitalize() + "."
            reply = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(reply if code == 200 else {"error": "no\n such model"}).encode())

        def log_message(self, *args: object) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}/v1", sent, failures
    found.shutdown()
    found.server_close()
    thread.join()


def test_a_chat_model_is_the_judge_of_a_whole_run(run: Run, sheets: Path, monkeypatch: pytest.MonkeyPatch,
                                                  server: tuple[str, list[dict[str, Any]], list[int]]) -> None:
    url, sent, _ = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    words = ("dpg", "score", "run/sheets", "--csv", "q.csv", "--chat", url, "--chat-model", "qwen")
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "| **average** | 46.88 | 60.42 |" in done.output and "| judge: qwen |" in done.output
    assert "| entity - whole | 0.00 | 75.00 |" in done.output
    assert len(sent) == 28 and {(one["path"], one["key"], one["model"]) for one in sent} == {
        ("/v1/chat/completions", "Bearer secret", "qwen")}
    scores = Path("run/scores")
    assert sorted(path.name for path in scores.iterdir()) == [
        "answers.jsonl", "scores.json", "scores.md", "scores.png"]
    assert "secret" not in (scores / "answers.jsonl").read_text()
    first = json.loads((scores / "scores.json").read_text())
    assert first["items"] == {"first": 0.875, "a": 0.4375, "b": 0.5} and first["prompts"] == first["of"] == 3
    assert run(*words, "--no-plot").exit_code == 0 and len(sent) == 28  # nothing is asked again

    table = ("dpg", "score", "--answers", "run/scores/answers.jsonl", "--csv", "q.csv", "--no-plot")
    assert "| **average** | 46.88 | 62.50 |" in run(*table, "--zeroing", "dsg", "--out", "dsg").output
    assert json.loads(Path("dsg/scores.json").read_text())["judge"] == "qwen"
    assert run(*table).exit_code == 0 and json.loads((scores / "scores.json").read_text()) == first

    (sheets / "b.png").unlink()
    refused = run(*words)
    assert refused.exit_code == 2
    assert "1 prompts have no score, b: no sheet: draw or ask for what is missing, or score without" in refused.stderr
    Image.new("RGB", (16, 6)).save(sheets / "first.png")
    refused = run(*words, "--partial")
    assert "Without a score: 2: b (no sheet); first (it is 16x6, and four cells of 8x6 are 16x12)" in refused.output


def test_a_server_that_is_busy_is_asked_again_and_one_that_refuses_is_not(
        server: tuple[str, list[dict[str, Any]], list[int]]) -> None:
    url, sent, failures = server
    judge = ChatVQA(url, "qwen", key="", wait=0.001)
    red = [Image.new("RGB", (4, 4), CELLS["A"])]
    failures += [503, 429]
    assert judge(red, ["a 2?"]) == ["No."] and len(sent) == 3 and sent[0]["key"] is None
    failures += [404]
    with pytest.raises(ValueError, match="refused a question: 404 "):
        judge(red, ["a 2?"])
    assert len(sent) == 4
    failures += [500] * 4
    with pytest.raises(ConnectionError, match="did not answer 4 times: 500"):
        judge(red, ["a 2?"])
    with pytest.raises(ConnectionError, match=r"did not answer 1 times: .*refused"):
        ChatVQA("http://127.0.0.1:9", "qwen", tries=1)(red, ["a 2?"])
    with pytest.raises(ValueError, match="begins with http:// or https://, got 'file:///etc"):
        ChatVQA("file:///etc/passwd", "qwen")


@pytest.mark.parametrize(("words", "message"), [
    ([], "give a folder of sheets, or --answers"),
    (["run/sheets", "--answers", "a.jsonl"], "give a folder of sheets, or --answers"),
    (["nowhere"], "no folder of sheets at nowhere"),
    (["run"], "run holds no sheets: expected pictures named like the prompts"),
    (["run/sheets", "--chat", "http://localhost/v1"], "a chat model needs both --chat, its URL, and --chat-model"),
    (["run/sheets", "--vqa", "run"], "no VQA model 'run': expected a folder or an id on the Hugging Face hub"),
    (["--answers", "nowhere.jsonl"], "no answers at nowhere.jsonl"),
    (["run/sheets", "--zeroing", "none"], "'none' is not one of 'dpg', 'dsg'"),
])
def test_mistakes_are_one_line(run: Run, sheets: Path, words: list[str], message: str) -> None:
    done = run("dpg", "score", *words, "--csv", "q.csv", "--no-plot")
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_plot_without_matplotlib_is_refused_before_anything_is_asked(run: Run, sheets: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib, or leave it out with --no-plot"):
        dpg_report.pyplot()
    assert "the plot needs matplotlib" in run("dpg", "score", "run/sheets", "--csv", "q.csv").stderr
    assert not Path("run/scores").exists()
