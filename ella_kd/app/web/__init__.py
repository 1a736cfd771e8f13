"""The web page: what is asked (`form`), how it is drawn (`session`, `preview`), and the page around both (`page`,
`inputs`), which `server` serves."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ella_kd.app.web.server import Served
    from ella_kd.pipeline import Pipeline


def serve(pipeline: "Pipeline", *, out: str | Path = "out", **options: Any) -> "Served":
    """Serve the page until Ctrl-C; with block=False the page goes on in the background: `.url`, `.close()`.

    out: where pictures go, in a folder per day. options: those of `ella_kd.app.web.server.serve`: models_dir, upsample,
    a function from a short prompt to a long one, host, port, limits, batch_size, queue, block.
    Raises ModuleNotFoundError without gradio, OSError for a port that is taken.
    """
    try:
        from ella_kd.app.web.server import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ModuleNotFoundError("the page needs gradio: pip install 'ella_kd[web]'", name="gradio") from error
    return serve(pipeline, out=out, **options)
