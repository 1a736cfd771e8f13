"""Reused work: what it costs in the semantic score of the miniature, and saves in time on SD1.5's shapes.

    python -m benchmarks.reuse --count 100          # the semantic score of two things, and the rows worked out
    python -m benchmarks.reuse --pixels 512         # seconds of a run of SD1.5 with random weights, interleaved
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from statistics import median
from typing import Any

import click
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import score
from benchmarks.machine import machine
from benchmarks.miniature.questions import ask, summary
from benchmarks.miniature.scenes import parse, to_pictures
from ella_kd import LDMDenoiser, Pipeline
from ella_kd.guidance import CFG, Guidance, GuidedDenoiser, Interval
from ella_kd.models import TextFeatures, UNet
from ella_kd.models.network import Deep
from ella_kd.models.reuse import Reuse
from ella_kd.samplers import get_sampler, get_sigmas_karras, randn

# every, uncond, branch: how many noise levels share the deep features, and the uncond's answer
WAYS: dict[str, dict[str, int]] = {
    "plain": {}, "deep features for 2": {"every": 2}, "for 3": {"every": 3}, "for 5": {"every": 5},
    "for 3, below the second skip": {"every": 3, "branch": 1}, "uncond for 2": {"every": 1, "uncond": 2},
    "deep for 2, uncond for 2": {"every": 2, "uncond": 2}, "deep for 3, uncond for 2": {"every": 3, "uncond": 2},
}


def network(unet: nn.Module, way: dict[str, int]) -> Any:
    return Reuse(unet, **way) if way else unet


@contextmanager
def counted(unet: nn.Module) -> Iterator[list[float]]:
    """The rows of whole and of partial calls of a UNet."""
    rows = [0.0, 0.0]

    def count(module: Any, args: Any, kwargs: Any) -> None:
        deep = kwargs.get("deep")
        rows[deep is not None and deep.features is not None] += len(args[0])

    handle = unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@torch.no_grad()
def scores(count: int, things: int, steps: int, sampler: str) -> None:
    sd = Pipeline.miniature(device="cpu")
    wanted = score.held_out(count, things)
    assert sd.t5 is not None
    args = {"cond": sd.encode(score.write_captions(wanted, "dense")), "uncond": sd.encode("")}
    chosen: dict[str, tuple[dict[str, int], Guidance]] = {name: (way, CFG(3.0)) for name, way in WAYS.items()}
    chosen["uncond skipped below sigma 0.3"] = {}, Interval(CFG(3.0), 0.3)
    click.echo("| reused | score | all right | rows worked out whole | in part |\n|---|---|---|---|---|")
    for name, (way, rule) in chosen.items():
        model = replace(sd, unet=network(sd.unet, way)).denoiser(rule)
        sigmas = get_sigmas_karras(steps, model.sigma_min, model.sigma_max)
        x = randn((count, 4, 6, 6), list(range(count))) * sigmas[0]
        with counted(sd.unet) as rows:
            z = get_sampler(sampler).function(model, x, sigmas, extra_args=args, disable=True)
        found = summary([ask(scene, parse(picture)) for scene, picture in zip(
            wanted, to_pictures(sd.vae.decode(z)), strict=True)])
        click.echo(f"| {name} | {found['score']:.1f} | {found['all_right']:.1f} | {rows[0] / count:g} | "
                   f"{rows[1] / count:g} |")
    click.echo(f"\n{sampler}, Karras, {steps} steps, guidance 3, {count} scenes of {things} things; {machine()}")


@torch.no_grad()
def times(pixels: int, steps: int, rounds: int, device: str, names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    unet = UNet().to(device).requires_grad_(False)
    tokens = [TextFeatures(torch.randn(1, 77, 768, device=device)) for _ in range(2)]
    side, seconds = pixels // 8, {name: list[float]() for name in names}
    flops = dict[str, int]()
    for number in range(rounds + 1):  # the first one warms up, and counts
        for name in names:
            model = GuidedDenoiser(LDMDenoiser(network(unet, WAYS[name])), CFG(3.0))
            sigmas = get_sigmas_karras(steps, model.sigma_min, model.sigma_max).to(device)
            x = randn((1, 4, side, side), [1]).to(device) * sigmas[0]
            started = time.perf_counter()
            with nullcontext() if number else FlopCounterMode(display=False) as counter:
                get_sampler("dpmpp_2m").function(model, x, sigmas, disable=True,
                                                 extra_args={"cond": tokens[0], "uncond": tokens[1]}).sum().item()
            if counter is not None:
                flops[name] = counter.get_total_flops()
            if number:
                seconds[name].append(time.perf_counter() - started)
    click.echo("| reused | seconds a run | x plain, median of the rounds | x plain in FLOP |\n|---|---|---|---|")
    for name, found in seconds.items():
        ratio = median(plain / own for plain, own in zip(seconds["plain"], found, strict=True))
        click.echo(f"| {name} | {median(found):.1f} | {ratio:.2f} | {flops['plain'] / flops[name]:.2f} |")
    click.echo(f"\nSD1.5, random weights, {pixels} px, batch 1 and its uncond, {steps} steps of dpmpp_2m, {rounds} "
               f"rounds; {machine()}")


def flops(pixels: int) -> None:
    """Of one row of SD1.5's UNet, worked out whole and above a skip, and what a run saves."""
    with torch.device("meta"):
        unet, t, tokens = UNet(), torch.empty(1), torch.empty(1, 77, 768)
        x = torch.empty(1, 4, pixels // 8, pixels // 8)
    click.echo("| branch | TFLOP whole | in part | x plain, every 2 | every 3 | every 5 |\n|---|---|---|---|---|---|")
    for branch in (0, 1, 2):
        with FlopCounterMode(display=False) as whole:
            _, features = unet(x, t, tokens, deep=Deep(branch))
        with FlopCounterMode(display=False) as part:
            unet(x, t, tokens, deep=Deep(branch, features))
        share = part.get_total_flops() / whole.get_total_flops()
        cells = [f"{n / (1 + (n - 1) * share):.2f}" for n in (2, 3, 5)]
        click.echo(f"| {branch} | {whole.get_total_flops() / 1e12:.2f} | {part.get_total_flops() / 1e12:.2f} | "
                   f"{' | '.join(cells)} |")


@click.command()
@click.option("--count", type=int, default=0, help="Scenes to score.")
@click.option("--things", type=int, default=2)
@click.option("--steps", type=int, default=20)
@click.option("--sampler", default="dpmpp_2m")
@click.option("--pixels", type=int, default=0, help="Time a run of SD1.5 at this size.")
@click.option("--rounds", type=int, default=2)
@click.option("--device", default="cpu", help="meta: count FLOP only.")
@click.option("--way", "names", multiple=True, type=click.Choice(list(WAYS)), default=list(WAYS), help="To time.")
def main(count: int, things: int, steps: int, sampler: str, pixels: int, rounds: int, device: str,
         names: tuple[str, ...]) -> None:
    """Score and time of reused work."""
    if count:
        scores(count, things, steps, sampler)
    if pixels and device == "meta":
        flops(pixels)
    elif pixels:
        times(pixels, steps, rounds, device, names)


if __name__ == "__main__":
    main()
