"""The page being served: where it listens, what of the disk it shows, and how it ends."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from ella_kd.app.web import grids, view
from ella_kd.app.web.form import LIMITS, Limits
from ella_kd.app.web.page import Page
from ella_kd.app.web.session import Studio
from ella_kd.pipeline import Pipeline

LOCAL = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Served:
    """A page that is being served."""

    url: str
    studio: Studio
    blocks: gr.Blocks
    cache: tempfile.TemporaryDirectory[str]

    def wait(self) -> None:
        """Until Ctrl-C."""
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            self.close()

    def close(self) -> None:
        self.blocks.close(verbose=False)
        self.cache.cleanup()


def serve(pipeline: Pipeline, *, out: str | Path = "out", models_dir: str | Path | None = None,
          upsample: Callable[[str], str] | None = None, host: str = LOCAL[0], port: int | None = None,
          limits: Limits = LIMITS, batch_size: int = 8, queue: int = 20, block: bool = True) -> Served:
    """Serve the page; `ella_kd.app.web.serve` tells the rest. queue: how many draws may wait. port None: the first
    free one from 7860 on. Nothing but the folder out is read for anyone, and nothing is sent anywhere."""
    studio = Studio(pipeline, out, models_dir, upsample=upsample, limits=limits, batch_size=batch_size)
    cache = tempfile.TemporaryDirectory(prefix="ella_kd-web-")  # gradio's own is shared with all its other pages
    os.environ["GRADIO_TEMP_DIR"] = cache.name
    blocks = Page(studio).blocks().queue(max_size=queue, default_concurrency_limit=8)
    hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL])] if host in LOCAL else []
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    app, url, _ = blocks.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
        theme=theme, css=view.CSS + view.PIXELATED * (pipeline.size < 256), max_file_size="20mb",
        allowed_paths=[str(Path(out).resolve())], ssr_mode=False, enable_monitoring=False, run_history=False,
        mcp_server=False, footer_links=["api", "settings"], app_kwargs={"middleware": hosts})
    folder = StaticFiles(directory=studio.out / grids.FOLDER, html=True, check_dir=False)
    app.router.routes.insert(0, Mount(f"/{grids.FOLDER}", folder))  # before gradio's own, which take any name
    served = Served(url, studio, blocks, cache)
    if block:
        print(f"The page is at {url} (Ctrl-C ends it); pictures go to {out}", flush=True)
        served.wait()
    return served
