"""The page of a grid of four axes and 200 cells, from the file system, in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ella_kd import Pipeline
from ella_kd.app.grid import Grid

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.web
HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def grid() -> Grid:
    return Grid.read({
        "title": HOSTILE, "description": HOSTILE, "steps": 2,
        "prompt": "The scene is set in PLACE. A red heart sits in the center.", "axes": {
            "sampler": "euler, heun, dpmpp_2m, ddim, lms", "scale": "1-5",
            "place": {"replace": "PLACE", "values": ["snow", "a deep forest", "a dark night", HOSTILE]},
            "seed": "1-2"}})


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, wrong = context.new_page(), list[str]()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith("file://") else None)
    yield page
    context.close()
    assert wrong == []


def at(page: Page) -> str:
    found: str = page.evaluate("document.activeElement.dataset.at")
    return found


def loaded(page: Page) -> int:
    found: int = page.locator(".cell img").evaluate_all("all => all.filter(i => i.complete && i.naturalWidth).length")
    return found


def test_200_cells_are_looked_at_and_a_stopped_grid_goes_on(grid: Grid, page: Page, tmp_path: Path) -> None:
    assert len(grid.cells) == 200 and len(grid.axes) == 4
    pipeline, drawn = Pipeline.miniature(device="cpu"), list[int]()
    path = grid.run(tmp_path, pipeline, told=drawn.append, stop=lambda: sum(drawn) >= 40)
    before = {file: file.stat().st_ino for file in tmp_path.glob("0*/*.png")}
    assert 40 <= len(before) < 60

    page.goto(path.as_uri())  # while it is not finished
    page.locator(".cell").nth(24).wait_for()
    page.locator("#size").fill("64")
    assert page.locator("h1").inner_text() == HOSTILE and page.title() == HOSTILE
    assert page.locator(".cell").count() == 25 and loaded(page) < 25
    assert page.locator("#count").inner_text() == "25 of 200 cells, 200 different pictures"

    assert grid.run(tmp_path, pipeline, told=drawn.append) == path and sum(drawn) >= 200
    assert before.items() <= {file: file.stat().st_ino for file in tmp_path.glob("0*/*.png")}.items()
    page.wait_for_function("[...document.querySelectorAll('.cell img')].every(i => i.complete && i.naturalWidth)",
                           timeout=15_000)  # the open page has found the new ones

    page.select_option("#axis-X", label="place")
    page.select_option("#axis-Y", label="seed")
    assert page.locator(".cell").count() == 200
    titles = page.locator("th.over").all_inner_texts()
    assert titles == ["snow", "a deep forest", "a dark night", HOSTILE, "1", "2"]
    page.screenshot(path=tmp_path / "all.png", full_page=True)

    page.locator('[data-at="0.0.0.0"]').focus()
    for key, now in (("ArrowRight", "1.0.0.0"), ("ArrowDown", "1.1.0.0"), ("ArrowLeft", "0.1.0.0"),
                     ("ArrowLeft", "4.1.3.0"), ("ArrowRight", "0.1.0.0"), ("ArrowUp", "0.0.0.0"),
                     ("ArrowUp", "0.4.0.1")):
        page.keyboard.press(key)
        assert at(page) == now, key
    page.keyboard.press("Enter")
    shown = page.locator("#side").inner_text()
    assert page.locator("dialog").is_visible() and re.search(r"scale\s+5\s+place\s+snow\s+seed\s+2", shown), shown
    page.keyboard.press("ArrowRight")
    assert re.search(r"sampler\s+heun", page.locator("#side").inner_text())
    name = page.locator("#picture img").evaluate("image => image.src")
    data = json.loads(page.locator("#data").inner_text() or page.locator("#data").text_content() or "")
    assert name.endswith(data["pictures"][data["cells"][((1 * 5 + 4) * 4 + 0) * 2 + 1]]["file"])

    again = page.url  # all of it is in the address
    page.goto("about:blank")
    page.goto(again)
    assert page.locator("dialog").is_visible() and re.search(r"sampler\s+heun", page.locator("#side").inner_text())
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible() and page.locator(".cell").count() == 200

    page.select_option("#axis-Y", label="none")
    page.get_by_role("button", name="2", exact=True).click()  # the tab of the second seed
    assert page.locator(".cell").count() == 100 and page.locator('[data-at="0.0.0.1"]').count() == 1
    page.locator("summary").click()
    page.locator("#shown").get_by_label("heun").uncheck()
    assert page.locator(".cell").count() == 80 and "hide=0_1" in page.url


def test_a_narrow_screen_and_a_foreign_address(grid: Grid, page: Page, tmp_path: Path) -> None:
    work = grid.batch(tmp_path, about={})
    tmp_path.mkdir(exist_ok=True)
    grid.write_page(work)
    page.set_viewport_size({"width": 380, "height": 700})
    page.goto((tmp_path / "index.html").as_uri() + "#x=99&y=-5&X=0&Y=<b>&at=9.9.9.9&size=1e9&open=2&hide=zz")
    assert page.locator(".cell").count() > 0 and not page.locator("dialog").is_visible()
    assert page.locator("header").evaluate("header => header.offsetWidth") <= 380
