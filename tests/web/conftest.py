"""The page with the miniature, served once, and a browser that reports whatever it should not do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from web.browser import find
from web.visits import Site, opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("web"))
    site = Site(Path("out"))
    yield site
    site.served.close()
    os.chdir(before)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def wrong() -> list[str]:
    """What a browser should not have done."""
    return []


@pytest.fixture
def context(browser: Browser, site: Site, wrong: list[str]) -> Iterator[BrowserContext]:
    """At its end: no errors in the console, no requests to other hosts, no dialog, nothing still drawn."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})

    def said(dialog: Any) -> None:
        wrong.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def watch(page: Page) -> None:
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", said)

    def asked(request: Any) -> None:
        url = urlsplit(request.url)
        if url.scheme not in ("data", "blob") and url.netloc != urlsplit(site.url).netloc:
            wrong.append(f"asked {request.url}")

    context.on("page", watch)
    context.on("request", asked)
    yield context
    context.close()
    assert wrong == []
    assert site.idle(20), "something is drawn for nobody"


@pytest.fixture
def page(context: BrowserContext, site: Site) -> Page:
    return opened(context, site)
