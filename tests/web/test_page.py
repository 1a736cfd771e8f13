"""The page in a browser: what a visitor does with it, and what nobody can do with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ella_kd import cli
from ella_kd.request import Request
from web.visits import SLOW, Site, opened

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

pytestmark = pytest.mark.web

EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>${alert(3)}{{constructor.constructor('alert(4)')()}}"


def put(page: Page, **values: Any) -> None:
    """Type values into inputs by their ids."""
    for name, value in values.items():
        page.locator(f"#{name} textarea, #{name} input:not([type=range])").first.fill(str(value))


def draw(page: Page, **values: Any) -> list[str]:
    """Press the button and wait; the captions of the pictures."""
    put(page, **values)
    page.evaluate("document.querySelector('#status .ella-status').dataset.old = true")
    page.click("#draw-button")
    page.wait_for_function("() => / done in /.test(document.querySelector('#status .ella-status:not([data-old])')"
                           "?.innerText)", timeout=SLOW)
    return captions(page)


def captions(page: Page) -> list[str]:
    page.wait_for_selector("#gallery img")
    return [text.strip() for text in page.locator("#gallery .caption-label").all_inner_texts()]


def drawing(page: Page, **values: Any) -> None:
    """Press the button and wait for the first steps."""
    put(page, **values)
    page.click("#draw-button")
    page.wait_for_function("() => /step [0-9]+ of/.test(document.querySelector('#status').innerText)", timeout=SLOW)


def newest(site: Site, before: set[Path]) -> Path:
    [path] = site.pictures() - before
    return path


def test_the_first_picture(page: Page, site: Site) -> None:
    before = site.pictures()
    assert "21 T5 tokens" in page.inner_text("#tokens")
    put(page, prompt="A blue ring rests in the center.")
    page.wait_for_function("() => /^[0-9] T5/.test(document.querySelector('#tokens').innerText)")
    assert draw(page, seed=7, steps=5) == ["seed 7"]
    path = newest(site, before)
    assert path.name.endswith("-7-a-blue-ring-rests-in-the-center.png")
    request = Request.from_picture(path)
    assert (request.steps, request.seed, request.scale, request.mode) == (5, 7, 3.0, "flexible")
    assert page.input_value("#text textarea") == request.parameters()
    put(page, seed=-1)
    page.click("#reuse")
    page.wait_for_function("() => document.querySelector('#seed input').value === '7'")
    page.click("#dice")
    page.wait_for_function("() => document.querySelector('#seed input').value === '-1'")
    page.reload()
    page.wait_for_selector("#draw-button")


def test_a_preview_shows_while_it_draws_and_cancel_stops(page: Page, site: Site) -> None:
    before = site.pictures()
    drawing(page, steps=200, seed=1)
    assert page.locator("#status img[alt=preview]").count() == 1
    assert page.locator("#status img").evaluate("image => image.naturalWidth") == 6
    page.wait_for_function("() => / left/.test(document.querySelector('#status').innerText)")
    page.click("#cancel")
    page.wait_for_function("() => /Stopped/.test(document.querySelector('#status').innerText)")
    assert site.idle(5) and site.pictures() == before
    assert draw(page, steps=3) == ["seed 1"]
    assert len(site.pictures() - before) == 1


def test_compare_shows_three_ways_from_one_seed(page: Page, site: Site) -> None:
    page.get_by_label("compare", exact=True).click()
    found = draw(page, steps=4, seed=5)
    assert found == ["plain SD, seed 5", "ELLA fixed, seed 5", "ELLA flexible, seed 5"]
    page.locator("#gallery button:has(img)").nth(2).click()
    page.wait_for_function("() => /ELLA: flexible/.test(document.querySelector('#text textarea').value)")


def dropped(page: Page, path: Path) -> str:
    page.get_by_role("tab", name="Settings of a picture").click()
    page.set_input_files("#dropped input[type=file]", str(path))
    page.wait_for_function("() => document.querySelector('#found textarea').value + "
                           "document.querySelector('#notes textarea').value")
    return page.input_value("#notes textarea")


def filled(page: Page) -> None:
    page.click("#fill")
    page.wait_for_selector("#draw-button", state="visible")


def test_a_dropped_picture_of_the_command_is_drawn_again_to_the_byte(page: Page, site: Site) -> None:
    done = CliRunner().invoke(cli.main, [
        "generate", "A green cross stands at the top right.", "--negative", "snow", "--seed", "11", "--steps", "6",
        "--sampler", "euler_ancestral_cfg_pp", "--scale", "0.6", "--lora", "azure:0.5", "--tiling", "--out", "theirs",
        "--models-dir", str(site.studio.models_dir), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    [theirs] = Path("theirs").iterdir()
    assert dropped(page, theirs) == ""
    before = site.pictures()
    filled(page)
    assert page.is_visible("#lam") and not page.is_visible("#scale")
    assert draw(page) == ["seed 11"]
    assert newest(site, before).read_bytes() == theirs.read_bytes()


def test_a_picture_of_the_other_web_ui_fills_the_form(page: Page, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "a (red:1.2) heart\nNegative prompt: snow\nSteps: 28, Sampler: DPM++ 2M SDE Karras, "
                  "CFG scale: 6.5, Seed: 123, Size: 48x48, Model: other")
    Image.new("RGB", (48, 48)).save(tmp_path / "a1111.png", pnginfo=info)
    assert "it was drawn by other, and this is miniature" in dropped(page, tmp_path / "a1111.png")
    filled(page)
    page.wait_for_function("() => document.querySelector('#seed input').value === '123'")
    assert page.input_value("#sampler input") == "dpmpp_2m_sde"
    assert page.is_checked("#mode input[value=clip]")
    page.click("#more-box > button")
    assert page.input_value("#more textarea") == "syntax: on"


def test_a_page_that_is_reloaded_while_it_draws_draws_for_nobody(page: Page, site: Site, wrong: list[str]) -> None:
    before = site.pictures()
    drawing(page, steps=200)
    page.reload()
    page.wait_for_selector("#draw-button")
    assert site.idle(15) and site.pictures() == before
    wrong[:] = [each for each in wrong if "AbortError" not in each and "errored out" not in each]  # of the old page
    assert draw(page, steps=3, seed=4) == ["seed 4"]


def test_a_browser_that_is_gone_leaves_no_drawing(context: BrowserContext, page: Page, site: Site) -> None:
    drawing(page, steps=200)
    page.close()
    assert site.idle(20)


def test_two_tabs_wait_for_each_other_and_get_their_own(context: BrowserContext, page: Page, site: Site) -> None:
    other = opened(context, site)
    page.bring_to_front()  # a tab behind another is looked at rarely
    drawing(page, steps=200, seed=21)
    other.bring_to_front()
    put(other, steps=3, seed=22)
    other.click("#draw-button")
    other.wait_for_function("() => /queue: 1/.test(document.querySelector('#status').parentElement.innerText)")
    for tab, seed in ((page, 21), (other, 22)):
        tab.bring_to_front()
        tab.wait_for_function("() => / done in /.test(document.querySelector('#status').innerText)")
        assert captions(tab) == [f"seed {seed}"]


def test_a_prompt_of_ten_thousand_letters(page: Page, site: Site) -> None:
    before = site.pictures()
    prompt = ("A red heart sits in the center. " * 400)[:10_000]
    draw(page, prompt=prompt, steps=2)
    assert Request.from_picture(newest(site, before)).prompt == prompt
    put(page, prompt="a" * 20_001)
    page.click("#draw-button")
    page.wait_for_function("() => /prompt may have 20000 letters, got 20001/.test("
                           "document.querySelector('#status').innerText)")


def test_a_script_in_a_prompt_is_text(page: Page, site: Site) -> None:
    draw(page, prompt=EVIL, steps=2, negative=EVIL)
    assert page.input_value("#text textarea").startswith(EVIL)
    put(page, guidance=EVIL)  # which an error repeats
    page.click("#draw-button")
    page.wait_for_selector("#status [role=alert]")
    assert EVIL[:80] in page.inner_text("#status")
    page.click("#longer")
    page.wait_for_function("() => / It is night.$/.test(document.querySelector('#prompt textarea').value)")


def test_a_script_in_a_pictures_metadata_is_text(page: Page, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", f"{EVIL}\nSteps: 2, Sampler: Euler, CFG scale: 3, Seed: 1, Model: {EVIL}, "
                  "Version: ella_kd 0, ELLA LoRA: x")
    Image.new("RGB", (48, 48)).save(tmp_path / "<b>evil.png", pnginfo=info)
    notes = dropped(page, tmp_path / "<b>evil.png")
    assert EVIL[:20] in notes and EVIL in page.input_value("#found textarea")
    filled(page)
    page.wait_for_function("() => document.querySelector('#seed input').value === '1'")
    assert page.input_value("#prompt textarea") == EVIL
    draw(page)


def test_a_start_picture_is_painted_on_and_drawn_over(page: Page, site: Site, tmp_path: Path) -> None:
    Image.new("RGB", (48, 48), "#2040c0").save(tmp_path / "start.png")
    before = site.pictures()
    page.click("#start-box > button")
    page.wait_for_selector("#start canvas")
    page.wait_for_timeout(1000)
    page.set_input_files("#start input[type=file]", str(tmp_path / "start.png"))
    page.wait_for_function("() => /[0-9]%/.test(document.querySelector('#start').innerText)")
    page.wait_for_timeout(1000)
    draw(page, steps=4, seed=2)
    whole = Request.from_picture(newest(site, before))
    assert isinstance(whole.start, str) and whole.mask is None
    with Image.open(whole.start) as image:
        assert image.size == (48, 48) and image.convert("RGB").getpixel((9, 9)) == (32, 64, 192)
    page.locator("#start").scroll_into_view_if_needed()
    box = page.locator("#start canvas").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2 - 20, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2, steps=6)
    page.mouse.up()
    page.wait_for_timeout(500)
    before = site.pictures()
    draw(page)
    path = newest(site, before)
    request = Request.from_picture(path)
    assert isinstance(request.mask, str)
    with Image.open(request.mask) as mask, Image.open(path) as drawn:
        assert mask.getpixel((24, 24)) == 255 and mask.getpixel((1, 1)) == 0
        assert drawn.getpixel((1, 1)) == (32, 64, 192)


def test_add_ons_of_the_folder_are_offered_and_worn(page: Page, site: Site) -> None:
    before = site.pictures()
    page.click("#addons-box > button")
    page.click("#lora-name input")
    page.get_by_role("option", name="striped").click()
    page.click("#wear")
    page.wait_for_function("() => document.querySelector('#lora textarea').value === 'striped:1'")
    draw(page, steps=2)
    request = Request.from_picture(newest(site, before))
    assert request.lora == ("striped:1",) and request.hashes[0].startswith("striped=")


def test_a_grid_runs_stops_goes_on_and_is_looked_at(context: BrowserContext, page: Page, site: Site) -> None:
    page.get_by_role("tab", name="Grid").click()
    put(page, **{"grid-text": "checkpoint: /etc/passwd\nprompt: a\naxes:\n  steps: 1-3"})
    page.click("#grid-run")
    page.wait_for_selector("#grid-status [role=alert]")
    assert "checkpoint names another model" in page.inner_text("#grid-status")
    put(page, **{"grid-text": f"title: '{EVIL.replace(chr(39), '')}'\nprompt: A red heart sits in the center.\n"
                 "steps: 4\naxes:\n  sampler: euler, heun\n  scale: 1-3\n  schedule: karras, ays\n"
                 "  seed: 1-2\n"})
    page.click("#grid-run")
    page.wait_for_function("() => /[1-9][0-9]* of 24 pictures/.test(document.querySelector('#grid-status').innerText)")
    page.click("#grid-stop")
    page.wait_for_function("() => /Stopped/.test(document.querySelector('#grid-status').innerText)")
    assert site.idle(10)  # it stops after its batch
    [folder] = (site.out / "grids").glob("img*")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert 0 < len(before) < 24
    page.click("#grid-run")
    page.wait_for_function("() => /[1-9][0-9]* of 24 pictures/.test(document.querySelector('#grid-status').innerText)")
    page.get_by_role("tab", name="Draw").click()
    assert draw(page, steps=2, seed=1) == ["seed 1"]  # between two batches of the grid
    page.get_by_role("tab", name="Grid").click()
    page.wait_for_function("() => /24 of 24 pictures/.test(document.querySelector('#grid-status').innerText)",
                           timeout=4 * SLOW)
    assert len([*folder.rglob("*.png")]) == 24
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}.items()
    with context.expect_page() as opened_page:
        page.click("#grid-status a")
    grid = opened_page.value
    grid.wait_for_selector(".cell img")
    grid.wait_for_function("[...document.querySelectorAll('.cell img')].every(i => i.complete && i.naturalWidth)")


def test_it_fits_every_screen(page: Page, request: pytest.FixtureRequest) -> None:
    page.get_by_label("compare", exact=True).click()
    draw(page, steps=3, seed=1)
    shots = request.config.rootpath / "out" / "web"
    shots.mkdir(parents=True, exist_ok=True)
    for width, dark in ((360, False), (820, False), (1280, True), (1920, False)):
        page.set_viewport_size({"width": width, "height": 900})
        if dark != page.evaluate("document.body.classList.contains('dark')"):
            page.click("#dark")
        assert page.evaluate("document.body.classList.contains('dark')") == dark
        for inside in ("body", "#drawn", "#options"):
            assert page.locator(inside).evaluate("each => each.scrollWidth <= window.innerWidth"), (inside, width)
        edges = [page.locator("#gallery img").nth(i).bounding_box() for i in range(3)]
        assert all(edge and edge["x"] >= 0 and edge["x"] + edge["width"] <= width for edge in edges)
        page.screenshot(path=shots / f"{width}{'-dark' * dark}.png", full_page=True)
    for name in ("start", "addons", "more"):
        page.click(f"#{name}-box > button")
    page.set_viewport_size({"width": 360, "height": 900})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.screenshot(path=shots / "360-open.png", full_page=True)
