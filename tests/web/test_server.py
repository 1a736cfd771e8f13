"""The server without a browser: the API, its documentation, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ella_kd.request import Request
from web.visits import Site

pytestmark = pytest.mark.web
GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "web.md"


def get(site: Site, path: str, **headers: str) -> Any:
    import httpx

    return httpx.get(site.url + path, headers=headers, timeout=30)


def test_nothing_outside_the_output_folder_is_read(site: Site, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("42 is the code")
    Path("beside.txt").write_text("42 is the code")  # in the folder where the server runs
    Path("out/seen.txt").write_text("seen")
    for path in ("/etc/passwd", tmp_path / "secret.txt", Path("beside.txt").resolve(), Path("out/../beside.txt"),
                 Path("out").resolve() / ".." / "beside.txt"):
        answer = get(site, f"gradio_api/file={path}")
        assert answer.status_code in (403, 404), path
        assert "42" not in answer.text and "root:" not in answer.text
    assert get(site, f"gradio_api/file={Path('out/seen.txt').resolve()}").text == "seen"


def test_a_page_of_another_site_that_was_pointed_here_is_refused(site: Site) -> None:
    assert get(site, "config").status_code == 200
    assert get(site, "config", Host="evil.example").status_code == 400


def test_the_api_is_documented_and_the_guides_client_draws(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    info = get(site, "gradio_api/info").json()["named_endpoints"]
    assert list(info) == ["/draw"]
    names = [each["parameter_name"] for each in info["/draw"]["parameters"]]
    assert names[:5] == ["prompt", "negative", "mode", "sampler", "schedule"]
    [script] = re.findall(r"```py\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    done: dict[str, Any] = {}
    exec(script.replace("http://127.0.0.1:7860", site.url), done)
    request = Request.from_picture(done["pictures"][0]["picture"])
    assert (request.seed, request.steps) == (1, 20)
    assert done["pictures"][0]["parameters"] == request.parameters()


def free_within(site: Site, seconds: float) -> bool:
    """Whether the model is nobody's by then."""
    if found := site.studio.drawing.acquire(timeout=seconds):
        site.studio.drawing.release()
    return found


def begun(site: Site) -> None:
    end = time.monotonic() + 60
    while not site.studio.drawing.locked():
        assert time.monotonic() < end, "nothing is drawn"
        time.sleep(0.02)


def test_a_job_that_is_cancelled_and_a_client_that_dies_free_the_model(site: Site) -> None:
    from gradio_client import Client

    before = site.pictures()
    job = Client(site.url, verbose=False).submit(prompt="a", steps=200, count=16, api_name="/draw")
    begun(site)
    assert job.cancel() and free_within(site, 2)
    words = "prompt='a', steps=200, count=16, api_name='/draw'"
    with subprocess.Popen([sys.executable, "-c", "from gradio_client import Client\n"
                           f"Client({site.url!r}, verbose=False).predict({words})"]) as client:
        begun(site)
        time.sleep(0.5)
        client.kill()
    assert free_within(site, 10) and site.pictures() == before


def test_cfg_pp_has_a_lambda_of_its_own(site: Site) -> None:
    from gradio_client import Client

    [found] = Client(site.url, verbose=False).predict(prompt="a", steps=2, sampler="euler_cfg_pp", api_name="/draw")
    assert Request.from_picture(found["picture"]).scale == 0.6


@pytest.mark.parametrize(("given", "message"), [
    ({"steps": 10**9}, "steps must be a whole number from 1 to 200, got 1000000000"),
    ({"steps": "many"}, "steps must be a whole number"),
    ({"width": 100_000}, "width must be a whole number from 1 to 2048"),
    ({"width": 50}, "width and height must be multiples of 8"),
    ({"prompt": "a <lora:/etc/passwd:1>"}, "no lora '/etc/passwd' here: there is azure, striped"),
    ({"more": "start: /etc/passwd"}, "more options are lines"),
    ({"scale": "x"}, "scale must be a number"),
])
def test_bad_values_come_back_as_a_sentence(site: Site, given: dict[str, Any], message: str,
                                            capfd: pytest.CaptureFixture[str]) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(site.url, verbose=False)
    with pytest.raises(AppError, match=re.escape(message)):
        client.predict(**{"prompt": "a", **given}, api_name="/draw")
    assert "Traceback" not in capfd.readouterr().err


def test_a_grids_folder_is_served_and_nothing_beside_it(site: Site) -> None:
    folder = site.out / "grids" / "some"
    folder.mkdir(parents=True)
    (folder / "index.html").write_text("a page")
    assert get(site, "grids/some/index.html").text == "a page"
    for path in ("grids/../beside.txt", "grids/%2e%2e/seen.txt", "grids/some/..%2f..%2f..%2fbeside.txt", "grids/"):
        assert get(site, path).status_code == 404, path
