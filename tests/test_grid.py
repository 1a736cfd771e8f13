"""`ella-kd grid`: axes read, cells made, each drawn once, a sheet and a page."""

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from ella_kd import Pipeline, cli
from ella_kd.app.axes import read_axis, values_of
from ella_kd.app.batch import status
from ella_kd.app.grid import Grid
from ella_kd.request import Request
from test_batch import drawing as drawing
from test_cli import model

PROMPT = "a red circle on the left"


def data_of(page: Path) -> dict[str, Any]:
    """What the page holds, as a browser would find it."""
    class Scripts(HTMLParser):
        found: dict[str, str] = {}  # noqa: RUF012
        inside = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("img", "b", "link") and not {"src", "href"} & {name for name, _ in attrs}
            self.inside = dict(attrs).get("id") or "" if tag == "script" else ""

        def handle_data(self, data: str) -> None:
            if self.inside:
                self.found[self.inside] = self.found.get(self.inside, "") + data

    parser = Scripts()
    parser.feed(page.read_text())
    found: dict[str, Any] = json.loads(parser.found["data"])
    return found


@pytest.mark.parametrize(("option", "said", "expected"), [
    ("steps", "1-5", [1, 2, 3, 4, 5]),
    ("steps", "5-3", [5, 4, 3]),
    ("scale", "1-10 (+4)", [1.0, 5.0, 9.0]),
    ("scale", "0-0.3 (+0.1)", [0.0, 0.1, 0.2, 0.3]),
    ("scale", "0-1 [5]", [0.0, 0.25, 0.5, 0.75, 1.0]),
    ("scale", "-1-1", [-1.0, 0.0, 1.0]),
    ("seed", "1, 2, ..., 10", [*range(1, 11)]),
    ("seed", "1, 2, ..., 2", [1, 2]),
    ("seed", "7, 1, 3, ..., 8", [7, 1, 3, 5, 7, 8]),
    ("scale", "0.1, 0.2, ..., 0.5", [0.1, 0.2, 0.3, 0.4, 0.5]),
    ("sampler", 'euler, "heun"', ["euler", "heun"]),
    ("tags", '"oil, on canvas", pencil', ["oil, on canvas", "pencil"]),
    ("tags", "a, b || c", ["a, b", "c"]),
    ("prompt", "1-5", ["1-5"]),
    ("eta", "none, 0.5", [None, 0.5]),
    ("freeu", "on, off", [True, False]),
    ("keep_t5", "on", [True]),
    ("steps", 7, [7]),
    ("scale", [1, 2.5], [1, 2.5]),
])
def test_values(option: str, said: Any, expected: list[Any]) -> None:
    assert values_of(option, said) == expected
    assert [type(each) for each in values_of(option, said)] == [type(each) for each in expected]


@pytest.mark.parametrize(("axes", "message"), [
    ({}, "a grid needs axes"),
    ({"smapler": "euler"}, "axis smapler: no option is named 'smapler': did you mean sampler"),
    ({"sampler": "eular"}, "the cell sampler eular: unknown sampler 'eular'"),
    ({"scale": "1, b"}, "axis scale: scale is a number, got 'b'"),
    ({"scale": ""}, "axis scale: it has no values"),
    ({"scale": "1,,2"}, "axis scale: a value is empty"),
    ({"scale": "1-5 (+0)"}, "axis scale: no way leads from 1 to 5 in steps of 0"),
    ({"scale": "0-1 (+1e-9)"}, "expected at most 10000"),
    ({"seed": "1, ..., 3"}, "axis seed: expected two numbers before ..."),
    ({"freeu": "perhaps"}, "axis freeu: freeu is on or off"),
    ({"word": {"replace": "green", "values": "red, blue"}}, "'green', which is to be replaced, is not in the prompt"),
    ({"word": {"replaces": "red"}}, "axis word: unknown key 'replaces'"),
    ({"scale": "1-2", "Scale": {"option": "scale", "values": 3, "title": "scale"}}, "two axes are named scale"),
    ({"seed": "1-9999", "steps": "1-9999"}, "the grid has 99,980,001 cells"),
    ({"style": [{"title": "wide", "widht": 3}]}, "axis style: no option is named 'widht': did you mean width"),
])
def test_a_grid_that_cannot_be_drawn_is_refused(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Grid.read({"prompt": PROMPT, "axes": axes})


def test_cells_are_every_combination_and_each_request_is_drawn_once() -> None:
    grid = Grid.read("""
        title: Everything
        prompt: a red circle on the left
        lora: striped:WEIGHT
        steps: 2
        axes:
          - seed: 1, 2
          - weight: {replace: WEIGHT, values: "0-1 [3]"}
          - colour: {replace: red, values: [red, blue, red]}
          - shape: [{title: plain}, {title: wide, width: 32, CFG scale: 3}]
        matrix: in snow | at night
    """.replace("\n        ", "\n"), models_dir="models/miniature/addons")
    assert [len(axis.values) for axis in grid.axes] == [2, 3, 3, 2, 2, 2] and len(grid.cells) == 144
    [requests] = grid.requests.values()
    assert len(requests) == 96 == len({each.json() for each in requests}), "two colours are the same"
    assert {*grid.cells} == {*range(96)}

    def at(*place: int) -> Request:
        index = 0
        for axis, i in zip(grid.axes, place, strict=True):
            index = index * len(axis.values) + i
        return requests[grid.cells[index]]

    last = at(1, 1, 1, 1, 1, 1)
    assert last == Request(f"{PROMPT.replace('red', 'blue')}, in snow, at night", seed=2, steps=2, width=32, scale=3.0,
                           lora=("striped:0.5",), version="")
    assert at(0, 2, 0, 0, 0, 1).prompt == f"{PROMPT}, at night" and at(0, 2, 0, 0, 0, 0).lora == ("striped:1",)
    assert at(0, 0, 0, 0, 0, 0) is at(0, 0, 2, 0, 0, 0)


def test_what_yaml_takes_for_numbers_of_base_60_is_text() -> None:
    said = "prompt: a\nhires: 2:0.5\naxes:\n  reuse: [1:2, 1:3]\n  scale: [10, 2.5]\n"
    [requests] = Grid.read(said).requests.values()
    assert [(each.hires, each.reuse, each.scale) for each in requests] == [
        ("2:0.5", "1:2", 10), ("2:0.5", "1:2", 2.5), ("2:0.5", "1:3", 10), ("2:0.5", "1:3", 2.5)]
    tiled = Grid.read("prompt: a\ntile: 32:16\naxes:\n  seed: 7\n")
    assert tiled.requests["0"][0].tile == "32:16"
    for name in ("tile", "upscale"):
        with pytest.raises(ValueError, match=f"{name} is a text"):
            Grid.read(f"prompt: a\n{name}: 32\naxes:\n  seed: 7\n")


def test_words_are_replaced_in_every_prompt_of_an_axis_that_has_them() -> None:
    grid = Grid.read({"axes": {"prompt": ["a red circle", "a square"],
                               "word": {"replace": "red", "values": ["red", "blue"]}}})
    [requests] = grid.requests.values()
    assert [requests[i].prompt for i in grid.cells] == ["a red circle", "a blue circle", "a square", "a square"]


def test_an_axis_of_models(tiny_files: dict[str, str], pipeline: Pipeline, tmp_path: Path, drawing: Any) -> None:
    other = shutil.copy(tiny_files["checkpoint"], tmp_path / "other.safetensors")
    files = {name: value for name, value in tiny_files.items() if name != "checkpoint"}
    grid = Grid.read({"prompt": PROMPT, "steps": 1, **files, "device": "cpu",
                      "axes": {"seed": "1-2", "checkpoint": [tiny_files["checkpoint"], str(other)]}})
    assert grid.cells == (0, 2, 1, 3), "one model after the other"
    with pytest.raises(ValueError, match="draw it with ella-kd grid"):
        grid.run(tmp_path / "out", pipeline)
    drawn = drawing(lambda requests: None)
    page = grid.run(tmp_path / "out")
    assert drawn == [[1, 2], [1, 2]]
    lines = (page.parent / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["request"]["model"] for line in lines] == ["sd", "sd", "other", "other"]


def test_the_command_draws_stops_resumes_and_shows(tiny_files: dict[str, str], tmp_path: Path, drawing: Any,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = "</script><b onmouseover=alert(1)>&amp; \u2028"
    Path("look.yaml").write_text(json.dumps({
        "title": hostile, "prompt": "a red circle", "steps": 1, "axes": {
            "seed": "1-3", "word": {"replace": "red", "values": ["red", "blue", hostile]}}}))

    def run(*words: str) -> Result:
        return CliRunner().invoke(cli.main, ["grid", "look.yaml", "--batch", "2", *words, *model(tiny_files)])

    def stop(requests: list[Request]) -> None:
        if len(drawn) == 2:
            raise KeyboardInterrupt

    drawn = drawing(stop)
    assert run().exit_code == 130
    out = tmp_path / "out" / "look"
    assert len(list(out.glob("00000/*.png"))) == 4
    data = data_of(out / "index.html")
    assert data["title"] == hostile and data["axes"][1]["values"] == ["red", "blue", hostile]
    before = {path: path.stat().st_ino for path in out.glob("00000/*.png")}

    drawing(lambda requests: None)
    done = run()
    assert done.exit_code == 0 and len(drawn) == 5, done.output
    assert before.items() <= {path: path.stat().st_ino for path in out.glob("00000/*.png")}.items()
    data = data_of(out / "index.html")
    assert len(data["cells"]) == len(data["pictures"]) == 9
    for cell, (seed, word) in zip(data["cells"], product((1, 2, 3), ("red", "blue", hostile)), strict=True):
        settings = Request.from_picture(out / data["pictures"][cell]["file"])
        assert (settings.seed, settings.prompt) == (seed, f"a {word} circle")
    file = out / data["pictures"][data["cells"][5]]["file"]  # the second seed, the last word
    with Image.open(out / "sheet.png") as sheet, Image.open(file) as picture:
        right, down = sheet.width - 28 - 2 * 256 - 16, sheet.height - 28 - 256
        large = picture.resize((256, 256), Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(sheet)[down : down + 256, right : right + 256], np.asarray(large))
    assert run().exit_code == 0 and len(drawn) == 5
    assert "holds another batch" in run("--scale", "3").output


def test_a_cell_that_fails_is_grey_and_says_why(pipeline: Pipeline, tmp_path: Path, drawing: Any) -> None:
    def fail(requests: list[Request]) -> None:
        if any(request.seed == 2 for request in requests):
            raise ValueError("the network returned NaN")

    drawing(fail)
    told: list[int] = []
    grid = Grid.read({"prompt": PROMPT, "steps": 1, "axes": {"seed": "1-3"}})
    page = grid.run(tmp_path, pipeline, told=told.append)
    assert sum(told) == 3 and status(tmp_path).failed == {1: "ValueError: the network returned NaN"}
    assert data_of(page)["failed"] == {"1": "ValueError: the network returned NaN"}
    with pytest.raises(ValueError, match="the cell width 18: width and height must be multiples of 4"):
        Grid.read({"prompt": PROMPT, "axes": {"width": "18"}}).run(tmp_path / "other", pipeline)
    drawing(lambda requests: None)
    grid.run(tmp_path, pipeline, retry=True)
    assert data_of(page)["failed"] == {} and (tmp_path / "sheet.png").exists()
    assert read_axis("seed", "1-3") == grid.axes[0]


def test_a_sheet_is_no_larger_than_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small pictures too, which are shown enlarged where there is room; of too many there is none."""
    monkeypatch.setattr("ella_kd.app.grid.PIXELS", 2e6)
    for count, there in ((8, True), (40, False)):
        grid = Grid.read({"prompt": PROMPT, "axes": {"seed": f"1-{count}", "scale": f"1-{count}"}})
        work = grid.batch(tmp_path, about={})
        grid.write_sheet(work)
        assert (tmp_path / "sheet.png").exists() == there
        if there:
            with Image.open(tmp_path / "sheet.png") as sheet:
                assert sheet.width * sheet.height < 2.6e6  # texts beside it
            (tmp_path / "sheet.png").unlink()
