"""`ella-kd web`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ella_kd.options import load, model_options


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
              help="Who may come: this machine alone, or 0.0.0.0 for whoever reaches it.")
@click.option("--port", type=click.IntRange(1, 65535), help="[default: the first that is free from 7860 on]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, metavar="DIR",
              help="Where the pictures go, in a folder per day.")
@click.option("--models-dir", metavar="DIR",
              help="The folder of the add-ons that the page offers: flat, or A1111's or ComfyUI's.")
@click.option("--max-side", type=click.IntRange(min=8), default=2048, show_default=True, metavar="PX",
              help="The larger side of what may be asked for.")
@click.option("--queue", type=click.IntRange(min=1), default=20, show_default=True,
              help="How many draws may wait.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Pictures drawn at once.")
@model_options
def web(host: str, port: int | None, out: Path, models_dir: str | None, max_side: int, queue: int, batch: int,
        **options: Any) -> None:
    """Serve a page that draws, at http://127.0.0.1:7860.

    Needs gradio: pip install 'ella_kd[web]'. Nothing is shared and nothing is sent anywhere; only the folder of
    pictures is readable through the page.

    \b
    Examples:
      ella-kd web
      ella-kd web --model ella-sd15 --models-dir stable-diffusion-webui/models --out pictures
    """
    if find_spec("gradio") is None:
        raise click.UsageError("the page needs gradio: pip install 'ella-kd[web]'.")
    from ella_kd.app.web import serve
    from ella_kd.app.web.form import Limits

    serve(load(options, []), out=out, models_dir=models_dir, host=host, port=port, limits=Limits(side=max_side),
          queue=queue, batch_size=batch)
