"""`ella-kd web`, as far as it goes without gradio."""

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ella_kd
import ella_kd.app.web
from ella_kd import Pipeline, cli
from ella_kd.app.web.form import Limits
from ella_kd.commands import web


def test_options_reach_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(web, "find_spec", lambda name: name)
    monkeypatch.setattr(ella_kd.app.web, "serve", lambda pipeline, **options: served.append((pipeline, options)))
    done = CliRunner().invoke(cli.main, ["web", "--port", "7000", "--out", "there", "--models-dir", "models", "--batch",
                                         "2", "--max-side", "64", "--queue", "3", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    [(pipeline, options)] = served
    assert isinstance(pipeline, Pipeline) and pipeline.name == "miniature"
    assert {**options, "out": str(options["out"])} == {
        "host": "127.0.0.1", "port": 7000, "out": "there", "models_dir": "models", "limits": Limits(side=64),
        "queue": 3, "batch_size": 2}


def test_without_gradio_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "find_spec", lambda name: None)
    monkeypatch.setattr(Pipeline, "load", None)  # nothing is read
    done = CliRunner().invoke(cli.main, ["web"])
    assert done.exit_code == 2 and "the page needs gradio: pip install 'ella-kd[web]'" in done.output


def test_three_modules_alone_import_gradio() -> None:
    root = Path(ella_kd.__file__).parent
    found = [path.relative_to(root).as_posix() for path in root.rglob("*.py")
             if re.search(r"^\s*(import|from) (gradio|starlette)", path.read_text(), re.MULTILINE)]
    assert sorted(found) == ["app/web/inputs.py", "app/web/page.py", "app/web/server.py"]
