"""The page being served, and a tab that shows it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ella_kd import Pipeline
from ella_kd.app.web import serve
from ella_kd.app.web.session import THREAD
from ella_kd.pipeline import MINIATURE

if TYPE_CHECKING:  # installed for make test-web alone
    from playwright.sync_api import BrowserContext, Page

SLOW = 20_000  # milliseconds that a busy machine may take


class Site:
    """The page being served: its address, its folder, and the studio behind it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.served = serve(Pipeline.miniature(device="cpu"), out=out, models_dir=MINIATURE / "addons", block=False,
                            upsample=lambda prompt: f"{prompt} It is night.")
        self.url, self.studio = self.served.url, self.served.studio

    def pictures(self) -> set[Path]:
        return set(self.out.glob("*-*-*/*.png"))

    def idle(self, seconds: float) -> bool:
        """Whether nothing is drawn, at the latest then."""
        end = time.monotonic() + seconds
        while any(each.name == THREAD for each in threading.enumerate()):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


def opened(context: BrowserContext, site: Site, query: str = "") -> Page:
    page = context.new_page()
    page.set_default_timeout(SLOW)
    page.goto(site.url + query)
    page.wait_for_selector("#draw-button")
    return page
