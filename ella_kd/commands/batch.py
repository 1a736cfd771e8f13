"""`ella-kd batch`."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import click
from tqdm.auto import tqdm

from ella_kd.app.batch import MANIFEST, SHARD, Batch, Status, lasting, status
from ella_kd.app.estimate import estimate
from ella_kd.app.job_files import Checker, JobFile
from ella_kd.app.loading import WORDS, Models
from ella_kd.options import check_folder, model_options, request_options, use_presets
from ella_kd.request import Request

STOPPED, TERMINATED = 130, 143  # exit codes: by Ctrl-C, by SIGTERM


@click.command()
@click.argument("jobs", metavar="JOBS.jsonl")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR",
              help="Where pictures and manifest go; a run that was stopped goes on there.")
@click.option("--shard", type=click.IntRange(min=1), default=SHARD, show_default=True, metavar="N",
              help="Requests that make a unit of work, a folder of pictures each.")
@click.option("--tar", is_flag=True, help="One tar per shard, in WebDataset's order, in place of a folder.")
@click.option("--retry", is_flag=True, help="Try again what failed.")
@click.option("--dry-run", is_flag=True, help="Check everything, draw one batch, and tell what all of it will take.")
@click.option("--status", "how_far", is_flag=True, help="Tell how far it is.")
@click.option("--verify", type=click.IntRange(min=1), metavar="N",
              help="Draw N finished pictures, chosen at random, again and compare.")
@click.option("--ray", "address", is_flag=False, flag_value="local", metavar="[ADDRESS]",
              help="Draw on a Ray cluster, that of the address (auto, ray://host:10001), or one on this machine.")
@click.option("--ray-cpus", type=float, default=0.5, show_default=True, metavar="N",
              help="CPUs that a worker takes, and the threads of one that draws on them.")
@click.option("--ray-gpus", type=float, metavar="N", help="GPUs that a worker takes.  [default: 1 where there is one]")
@request_options()
@model_options
@click.pass_context
def batch(ctx: click.Context, jobs: str, out: Path, shard: int, tar: bool, retry: bool, dry_run: bool, how_far: bool,
          verify: int | None, address: str | None, ray_cpus: float, ray_gpus: float | None, batch: int,
          **options: Any) -> None:
    """Draw a file of requests, each once, however often the run is stopped.

    JOBS.jsonl holds a JSON object a line: "prompt", and any option of a picture by its name, "seed", "steps",
    "negative", "lora". What a line does not say is said by the options below. All lines are checked before anything is
    drawn.

    Pictures go to DIR/00000/00000017-SEED.png, by the line's number from 0 and the seed; manifest.jsonl names them all,
    with their sha256, and what failed and why. The same command again goes on where the last one ended, be it by
    SIGTERM, after which the batch at work is finished, by kill -9, or for lack of power.

    \b
    Examples:
      ella-kd batch jobs.jsonl --out pictures --steps 30 --batch 16
      ella-kd batch jobs.jsonl --out pictures --steps 30 --batch 16 --status
      ella-kd batch jobs.jsonl --out pictures --steps 30 --batch 16 --ray auto
    """
    if address is not None and find_spec("ray") is None:
        raise click.UsageError("--ray needs Ray: pip install 'ella-kd[batch]'.")
    if how_far:
        tell(status(out))
        return
    use_presets(options)
    models_dir = options["models_dir"]
    check = Checker(models_dir)
    asked = {each.name: options[each.name] for each in fields(Request) if each.name in options}
    requests = JobFile(jobs, check, asked, options["wildcards"])
    models = Models({"": {name: options[name] for name in WORDS}}, {"": check.modes}, {"": check.sizes})
    work = Batch(out, {"": requests}, {"sha256 of the requests": check.sha256, "model": models.facts()[""]},
                 shard=shard, batch=batch, tar=tar, threads=None if address is None else max(1, int(ray_cpus)))
    work.check()
    if dry_run:
        _estimate(work, models, models_dir)
        return
    if verify is not None:
        ctx.exit(_verify(work, verify, models, models_dir))
    check_folder(out)
    left = sum(map(work.requests_in, work.open_shards(retry)))
    with ending_gently() as asked_to_stop, tqdm(total=len(work), initial=len(work) - left, unit="picture") as bar:
        how: dict[str, Any] = {"retry": retry, "told": bar.update, "stop": asked_to_stop, "models_dir": models_dir}
        try:
            if address is None:
                found = work.run(models, **how)
            else:
                from ella_kd.app.cluster import run_on_ray  # the extra [batch]

                found = run_on_ray(work, models, address, cpus=ray_cpus, gpus=ray_gpus, **how)
        except KeyboardInterrupt:
            click.echo(f"stopped: the same command goes on, {status(out).settled:,} of {len(work):,} are settled",
                       err=True)
            ctx.exit(STOPPED)
    tell(found)
    click.echo(click.format_filename(out / MANIFEST))
    if asked_to_stop():
        ctx.exit(TERMINATED)
    if found.failed:
        ctx.exit(1)


@contextmanager
def ending_gently() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came, which in the block does nothing but say so."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def tell(found: Status) -> None:
    click.echo(f"{found.settled:,} of {found.requests:,} requests in {found.shards_done:,} of {found.shards:,} shards: "
               f"{found.pictures:,} pictures" + (f", {len(found.failed):,} failed" if found.failed else ""))
    for index, why in list(found.failed.items())[:5]:
        click.echo(f"  request {index} failed: {' '.join(why.split())[:200]}")
    if found.failed:
        click.echo("  --retry tries them again")
    if found.last is not None and found.settled < found.requests:
        click.echo(f"the last shard was done {lasting(max(0.0, time.time() - found.last))} ago"
                   + (f"; {found.rate:.3g} pictures a second, {lasting(found.left or 0)} to go" if found.rate else ""))


def _estimate(work: Batch, models: Models, models_dir: str | None) -> None:
    found = estimate(work, models, models_dir)
    if found is None:
        click.echo(f"all {len(work):,} requests are settled")
        return
    like = found.like
    click.echo(f"{found.requests:,} of {len(work):,} requests are to be drawn\n"
               f"{found.rate:.3g} pictures a second, {found.batch} at once, {like.width}x{like.height} px, "
               f"{like.steps} steps of {like.sampler}\n"
               f"about {lasting(found.seconds)} on this machine, and {found.size / 1e6:,.3g} MB")


def _verify(work: Batch, count: int, models: Models, models_dir: str | None) -> int:
    """0 if all of them are what they were, but for rounding."""
    wrong = 0
    for each in work.verify(count, models, models_dir=models_dir):
        good = each.whole and each.difference is not None and each.difference <= 3
        said = "missing or damaged" if not each.whole else "the same" if each.difference == 0 else (
            f"differs by {each.difference} of 255")
        click.echo(f"{each.file}  {said}")
        wrong += not good
    return int(wrong > 0)
