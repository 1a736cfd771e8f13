"""`ella-kd inspect`."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from ella_kd.models.files.report import FIRST, Report, report


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="FILE|FOLDER...")
@click.option("--json", "as_json", is_flag=True, help="A list of objects, one for each path.")
@click.option("--sha256", "hashed", is_flag=True, help="Read each file whole for its hash, known or not.")
@click.pass_context
def inspect(ctx: click.Context, paths: tuple[str, ...], as_json: bool, hashed: bool) -> None:
    """Say what files are, without loading them: kind, size, dtypes, prediction, what is missing or extra.

    Ends with code 2 if one of them cannot be read.

    \b
    Examples:
      ella-kd inspect models/*.safetensors
      ella-kd inspect stable-diffusion-v1-5/ --json
    """
    failed, told = False, []
    for path in paths:
        try:
            found = report(Path(path), hashed)
        except (OSError, ValueError) as error:
            failed = True
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            told.append({"path": path, "error": reason})
            lines = [f"cannot be read: {reason}"]
        else:
            told.append(asdict(found))
            lines = _lines(found)
        if not as_json:
            click.echo(click.format_filename(path))
            click.echo("\n".join(f"  {line}" for line in lines))
    if as_json:
        click.echo(json.dumps(told, indent=2))
    if failed:
        ctx.exit(2)


def _lines(found: Report) -> list[str]:
    lines = [found.kind[:1].upper() + found.kind[1:] + (f"; its place is {found.place}" if found.place else "")]
    if found.title or found.known:
        lines.append(", ".join(filter(None, [found.title, found.known and f"by its sha256 {found.known}"])))
    lines += [f"{name}: {network.parameters / 1e6:,.1f} M parameters in {network.tensors} tensors, "
              f"{' and '.join(network.dtypes)}" for name, network in found.networks.items()]
    if found.prediction:
        lines.append(f"predicts {found.prediction} ({found.prediction_known_by}); pictures of {found.resolution}"
                     + "; moving averages too (EMA)" * found.averages)
    if found.sha256:
        lines.append(f"sha256 {found.sha256}")
    lines += [f"{name}: {text}" for name, text in found.told.items()]
    if found.trigger_words and "trigger words" not in found.told:
        lines.append("trigger words: " + ", ".join(found.trigger_words))
    for name in ("missing", "extra"):
        if several := getattr(found, name):
            more = f", and {len(several) - FIRST} more" if len(several) > FIRST else ""
            lines.append(f"{name}: " + ", ".join(line.removeprefix("missing: ") for line in several[:FIRST]) + more)
    return lines
