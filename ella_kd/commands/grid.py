"""`ella-kd grid`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from tqdm.auto import tqdm

from ella_kd.app.batch import status
from ella_kd.app.grid import SHEET, Grid
from ella_kd.app.loading import WORDS
from ella_kd.commands.batch import STOPPED, TERMINATED, ending_gently, tell
from ella_kd.options import check_folder, model_options, request_options, use_presets
from ella_kd.request import Request


@click.command()
@click.argument("file", metavar="FILE.yaml")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where page and pictures go; a run that was stopped goes on there.  [default: out/FILE]")
@click.option("--retry", is_flag=True, help="Try again what failed.")
@request_options()
@model_options
@click.pass_context
def grid(ctx: click.Context, file: str, out: Path | None, retry: bool, batch: int, **options: Any) -> None:
    """Draw every combination of some axes, and a page to look at them.

    FILE.yaml says what holds for all pictures, by the names of the options, and the axes: any option of a picture or of
    the model, or words that are replaced in the prompt. All cells are checked before anything is drawn, and none is
    drawn twice. The page, DIR/index.html, shows any two to four axes against each other; up to two axes make
    DIR/sheet.png too.

    \b
    Example:
      title: Samplers and scales
      prompt: The scene is set in snow. A red heart sits in the center.
      axes:
        sampler: euler, heun
        scale: 1-7 (+2)
        word: {replace: red, values: "red, blue, green"}
    """
    use_presets(options)
    models_dir = options["models_dir"]
    asked = {each.name: options[each.name] for each in fields(Request) if each.name in options}
    found = Grid.read(Path(file), asked=asked, model={name: options[name] for name in WORDS}, models_dir=models_dir,
                      wildcards=options["wildcards"])
    out = out or Path("out") / Path(file).stem
    work = found.batch(out, batch=batch)
    work.check()
    check_folder(out)
    left = sum(map(work.requests_in, work.open_shards(retry)))
    with ending_gently() as asked_to_stop, tqdm(total=len(work), initial=len(work) - left, unit="picture") as bar:
        try:
            page = found.run(out, batch=batch, models_dir=models_dir, retry=retry, told=bar.update, stop=asked_to_stop)
        except KeyboardInterrupt:
            click.echo(f"stopped: the same command goes on; the page is {out / 'index.html'}", err=True)
            ctx.exit(STOPPED)
    done = status(out)
    tell(done)
    click.echo(click.format_filename(page))
    if (out / SHEET).exists():
        click.echo(click.format_filename(out / SHEET))
    if asked_to_stop():
        ctx.exit(TERMINATED)
    if done.failed:
        ctx.exit(1)
