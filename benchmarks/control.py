"""What a ControlNet adds to a step, ours beside diffusers': `python -m benchmarks.control`.

Random weights in the shape of Stable Diffusion 1.5, the same tensors on both sides; guided, so two rows a step, both
steered, as the pipelines of diffusers do; the ways take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import process_time
from typing import Any

import click
import torch
from diffusers import ControlNetModel, EulerDiscreteScheduler
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.results import Results, device, writes
from benchmarks.speed.clock import Way, interleave
from benchmarks.speed.ways import as_diffusers, random_weights
from ella_kd import CFGDenoiser, Constant, LDMDenoiser
from ella_kd.models import TextFeatures, UNet
from ella_kd.models.addons.control_files import to_ldm
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.samplers import sample_euler

SCALE, STRENGTH = 7.0, 0.8


def counted(run: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], list[float]]:
    """The same, and the processor seconds of every call: what other work on the machine takes is none of them."""
    seconds: list[float] = []

    def measured() -> Tensor:
        begin = process_time()
        answer = run()
        seconds.append(process_time() - begin)
        return answer

    return measured, seconds


def networks(at: torch.device, dtype: torch.dtype) -> tuple[UNet, ControlNet, Any, Any]:
    """Our UNet and ControlNet, and diffusers' on their tensors."""
    torch.manual_seed(0)
    unet = random_weights(UNet()).requires_grad_(False).to(at, dtype)
    theirs: Any = ControlNetModel(cross_attention_dim=768, attention_head_dim=8)
    random_weights(theirs).requires_grad_(False).to(at, dtype).eval()
    names = to_ldm(theirs.state_dict())
    with torch.device("meta"):
        net = ControlNet(unet.config)
    net.load_state_dict({names[name]: x for name, x in theirs.state_dict().items()}, assign=True)
    return unet, net.requires_grad_(False).eval(), as_diffusers(unet), theirs


def ways(latents: int, steps: int, at: torch.device, dtype: torch.dtype) -> list[Way]:
    """Runs of so many steps, plain and steered, ours and diffusers'."""
    unet, net, theirs, control = networks(at, dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, latents, latents, generator=generator).to(at)
    text = torch.randn(2, 77, 768, generator=generator).to(at, dtype)
    picture = torch.rand(1, 3, 8 * latents, 8 * latents, generator=generator).to(at)
    denoiser = CFGDenoiser(LDMDenoiser(unet))

    def scheduler() -> Any:
        found: Any = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        found.set_timesteps(steps)
        return found

    def ours(steered: bool) -> Callable[[], Tensor]:
        uncond, cond = (Constant(TextFeatures(row)) for row in text.split(1))
        pair: Any = [each.with_control(net, picture, STRENGTH) if steered else each for each in (cond, uncond)]
        args = {"cond": pair[0], "uncond": pair[1], "cond_scale": SCALE}
        sigmas = scheduler().sigmas.to(at)
        return torch.no_grad()(lambda: sample_euler(denoiser, x * sigmas[0], sigmas, extra_args=args, disable=True))

    @torch.no_grad()
    def diffusers(steered: bool) -> Tensor:
        kept, hint = scheduler(), torch.cat([picture, picture]).to(dtype)
        y = x * kept.sigmas[0].to(at)
        for t in kept.timesteps.to(at):
            both = kept.scale_model_input(torch.cat([y, y]), t).to(dtype)
            more: dict[str, Any] = {}
            if steered:
                down, middle = control(both, t, encoder_hidden_states=text, controlnet_cond=hint,
                                       conditioning_scale=STRENGTH, return_dict=False)
                more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            uncond, cond = theirs(both, t, encoder_hidden_states=text, **more).sample.float().chunk(2)
            y = kept.step(uncond + SCALE * (cond - uncond), t, y).prev_sample
        return y

    return [Way("ours, plain", "eager", ours(False)), Way("ours, ControlNet", "eager", ours(True)),
            Way("diffusers, plain", "eager", lambda: diffusers(False)),
            Way("diffusers, ControlNet", "eager", lambda: diffusers(True))]


@click.command(help=__doc__)
@click.option("--latents", default=32, show_default=True, help="Side of the latents, an eighth of the picture's.")
@click.option("--steps", default=3, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]))
@click.option("--device", "at", default="cpu", show_default=True, callback=device)
@writes("control")
def main(results: Results, latents: int, steps: int, rounds: int, dtype: str, at: torch.device) -> None:
    chosen = ways(latents, steps, at, getattr(torch, dtype))
    taken: list[list[float]] = []
    for i, way in enumerate(chosen):
        run, seconds = counted(way.run)
        chosen[i] = replace(way, run=run)
        taken.append(seconds)
    found, _ = interleave(chosen, rounds, at, getattr(torch, dtype), click.echo)
    if at.type != "cpu":
        taken = [[0.0, *each.seconds] for each in found]
    unit = "processor s" if at.type == "cpu" else "s"
    lines = [f"| | plain, {unit} a step | with a ControlNet | ControlNet over plain | the spread of the rounds |",
             "|---|---|---|---|---|"]
    for i in (0, 2):
        plain, steered = taken[i][1:], taken[i + 1][1:]  # without the first, which warms up
        over = sorted(b / a for a, b in zip(plain, steered))
        lines.append(f"| {chosen[i].name.partition(',')[0]} | {median(plain) / steps:.2f} | "
                     f"{median(steered) / steps:.2f} | {median(over):.3f} x | {over[0]:.3f} to {over[-1]:.3f} |")
    apart = max(float((found[i].answer - found[i + 2].answer).norm() / found[i + 2].answer.norm()) for i in (0, 1))
    said = (f"{8 * latents} px, {dtype}, {steps} steps of Euler, two rows, {rounds} rounds; the latents of the two "
            f"differ by {apart:.0e}. {machine()}.")
    results.write_tables({"control": "\n".join(lines), "control measured": said})
    click.echo("\n".join([*lines, "", said]))


if __name__ == "__main__":
    main()
