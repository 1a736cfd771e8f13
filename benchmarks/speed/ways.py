"""The ways to draw that are compared: the same random weights in our UNet and in diffusers', the same noise.

- `ELLA`: ours, the connector planned for the run; fixed mode, 128 T5 tokens, every picture of one prompt
- `ELLA flexible`: ours, a prompt of its own and of another length for every picture
- `constant`: ours, with as many constant tokens as the connector makes
- `published`: diffusers' UNet and DPMSolverMultistepScheduler, and the connector called at every step on the batch of
  uncond and cond, as the code published with ELLA does; fixed mode
- `published flexible`: the same with one call of the connector per row, since its prompts cannot be batched
- `diffusers`: the same with constant tokens and no connector
- `k-diffusion`: k-diffusion's own sample_dpmpp_2m on our denoiser, which nobody plans for

Each in the modes `eager`, `compiled`, and ours on a CPU also `fast`, with fast_on_cpu, and `fast compiled`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor, nn

from benchmarks.speed.clock import Way
from ella_kd import ELLA, CFGDenoiser, Conditioning, Constant, ELLADenoiser, Pipeline
from ella_kd.models import TSC, TextFeatures, UNet, fast_on_cpu
from ella_kd.models.context import pile
from ella_kd.models.parameters import sharing
from ella_kd.samplers import sample_dpmpp_2m
from ella_kd.samplers.upstream import k_diffusion

WAYS = ("ELLA", "ELLA flexible", "constant", "published", "published flexible", "diffusers", "k-diffusion")
MODES = ("eager", "fast", "compiled", "fast compiled")
SCALE, FIXED = 7.0, 128
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """network: miniature or sd15; latents: their side; the UNet sees 2 x batch rows."""

    network: str
    latents: int
    batch: int
    steps: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class Networks:
    """One set of weights: our UNet, diffusers', and the connector."""

    unet: UNet
    theirs: Any  # UNet2DConditionModel
    tsc: TSC


def networks(network: str, dtype: torch.dtype, device: torch.device) -> Networks:
    """The miniature's weights, or random ones in the shape of Stable Diffusion 1.5: speed does not depend on them."""
    if network == "miniature":
        pipeline = Pipeline.miniature()
        assert pipeline.tsc is not None and isinstance(pipeline.unet, UNet)
        unet, tsc = pipeline.unet, pipeline.tsc
    else:
        torch.manual_seed(0)
        unet, tsc = random_weights(UNet()), random_weights(TSC())
    unet, tsc = unet.requires_grad_(False).to(device, dtype), tsc.requires_grad_(False).to(device, dtype)
    return Networks(unet, as_diffusers(unet), tsc)


def random_weights(module: M) -> M:
    """Every matrix drawn so that its output is about as large as its input: fresh networks are half zeros."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return module


def as_diffusers(unet: UNet) -> Any:
    """diffusers' network on the same tensors; its own converter does the renaming, and the load is strict."""
    config = unet.config
    channels = [mult * config.model_channels for mult in config.channel_mult]
    down, up = config.depths
    assert not any(down[-1]) or config.middle_depth in (0, down[-1][0]), "diffusers has one number for both"
    added = {} if config.vector_dim is None else {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": config.vector_dim}
    with torch.device("meta"):
        twin: Any = UNet2DConditionModel(
            in_channels=config.in_channels, out_channels=config.out_channels, block_out_channels=channels,
            layers_per_block=config.num_res_blocks, cross_attention_dim=config.context_dim,
            attention_head_dim=[config.heads(ch) for ch in channels],  # diffusers means the number of heads
            use_linear_projection=config.linear_proj, only_cross_attention=list(config.cross_only),
            num_class_embeds=config.classes, time_cond_proj_dim=config.guidance_dim,
            mid_block_type="UNetMidBlock2DCrossAttn" if config.middle_depth else "UNetMidBlock2D",
            down_block_types=["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in down],
            up_block_types=["CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in reversed(up)],
            transformer_layers_per_block=[*down[:-1], down[-1] if any(down[-1]) else config.middle_depth],
            reverse_transformer_layers_per_block=list(reversed(up)),
            **added,
        )
    weights = {f"model.diffusion_model.{name}": x for name, x in unet.state_dict().items()}
    renamed = convert_ldm_unet_checkpoint(weights, twin.config)
    if config.guidance_dim is not None:  # which that converter does not know
        renamed["time_embedding.cond_proj.weight"] = weights["model.diffusion_model.time_embed.cond_proj.weight"]
    twin.load_state_dict(renamed, assign=True)
    return twin.eval().requires_grad_(False)


def ways(setting: Setting, nets: Networks, names: tuple[str, ...], modes: tuple[str, ...]) -> list[Way]:
    """The chosen ways in the chosen modes."""
    found = []
    on_cpu = setting.device.type == "cpu"
    fast = fast_on_cpu(nets.unet) if on_cpu and any("fast" in mode for mode in modes) else nets.unet
    for mode in modes:
        if "fast" in mode and not on_cpu:
            continue
        ours = fast_on_cpu(nets.tsc) if "fast" in mode else nets.tsc
        ella = ELLADenoiser(sharing(fast if "fast" in mode else nets.unet), ours)
        theirs, tsc = sharing(nets.theirs), sharing(nets.tsc)
        if "compiled" in mode:
            cuda = {"mode": "reduce-overhead"} if setting.device.type == "cuda" else {}
            ella.compile()
            theirs.compile(dynamic=False, **cuda)
            tsc.compile(dynamic=False)
        for name in names:
            if not name.startswith(("published", "diffusers")):
                found.append(Way(name, mode, _ours(name, setting, CFGDenoiser(ella), ours)))
            elif "fast" not in mode:
                found.append(Way(name, mode, _diffusers(name, setting, theirs, tsc)))
    return found


def published_in_fp32(setting: Setting) -> Way:
    """The published way in fp32, whatever the dtype of the others: what they save, and what it costs in precision."""
    setting = replace(setting, dtype=torch.float32)
    nets = networks(setting.network, setting.dtype, setting.device)
    return Way("published", "fp32", _diffusers("published", setting, nets.theirs, nets.tsc))


def _ours(name: str, setting: Setting, denoiser: CFGDenoiser, tsc: TSC) -> Callable[[], Tensor]:
    sample = k_diffusion().sampling.sample_dpmpp_2m if name == "k-diffusion" else sample_dpmpp_2m
    sigmas = scheduler(setting).sigmas.to(setting.device)
    x = noise(setting) * (1 + sigmas[0] ** 2).sqrt()
    prompts: list[Conditioning]
    if name == "constant":
        prompts = [Constant(TextFeatures(tokens)) for tokens in constant_tokens(setting, tsc)]
    else:
        rows = [TextFeatures(row) for row in text(setting, tsc, flexible=name == "ELLA flexible")]
        prompts = [ELLA(tsc, TextFeatures(*pile(part))) for part in (rows[:1], rows[1:])]
    uncond, cond = prompts
    args = {"cond": cond, "uncond": uncond, "cond_scale": SCALE}
    return lambda: sample(denoiser, x, sigmas, extra_args=args, disable=True)


def _diffusers(name: str, setting: Setting, unet: Any, tsc: TSC) -> Callable[[], Tensor]:
    rows = text(setting, tsc, flexible="flexible" in name)
    rows = rows[:1] * setting.batch + (rows[1:] if len(rows) > 2 else rows[1:] * setting.batch)
    features = torch.cat(rows) if name == "published" else rows
    uncond_tokens, cond_tokens = constant_tokens(setting, tsc)
    constant = torch.cat([uncond_tokens] * setting.batch + [cond_tokens] * setting.batch)
    start = noise(setting)

    def tokens(t: Tensor) -> Tensor:
        if name == "diffusers":
            return constant
        if isinstance(features, Tensor):
            return tsc(features, t[None])
        return torch.cat([tsc(row, t[None]) for row in features])

    @torch.no_grad()
    def run() -> Tensor:
        steps, x = scheduler(setting), start
        for t in steps.timesteps.to(setting.device):
            answer = unet(torch.cat([x, x]).to(setting.dtype), t, encoder_hidden_states=tokens(t)).sample.float()
            uncond, cond = answer.chunk(2)
            x = steps.step(uncond + SCALE * (cond - uncond), t, x).prev_sample
        return x

    return run


def scheduler(setting: Setting) -> Any:
    """DPM++ 2M on Stable Diffusion's noise levels, evenly spaced in t."""
    steps: Any = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    steps.set_timesteps(setting.steps)
    return steps


def noise(setting: Setting) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = setting.batch, 4, setting.latents, setting.latents
    return torch.randn(shape, generator=generator).to(setting.device)


def text(setting: Setting, tsc: TSC, flexible: bool) -> list[Tensor]:
    """T5 features of the empty prompt, then of the pictures' prompts: one for all in fixed mode, each [1, L, D]."""
    lengths = [1, *(40 + 5 * i for i in range(setting.batch))] if flexible else [FIXED, FIXED]
    generator = torch.Generator().manual_seed(2)
    made = (torch.randn(1, length, tsc.input_dim, generator=generator) for length in lengths)
    return [x.to(setting.device, setting.dtype) for x in made]


def constant_tokens(setting: Setting, tsc: TSC) -> tuple[Tensor, Tensor]:
    """uncond and cond [1, 64, D], as many as the connector makes: what it says at t = 500."""
    t = torch.tensor([500.0], device=setting.device)
    uncond, cond = (tsc(row, t) for row in text(setting, tsc, flexible=False))
    return uncond, cond
