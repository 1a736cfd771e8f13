"""Encoded prompts to pictures: denoiser, guidance, sampler and decoder put together."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ella_kd.conditioning import Composition, Conditioning, With, as_conditioning
from ella_kd.denoiser import Condition, Denoiser
from ella_kd.guidance import CFG, Guidance
from ella_kd.images import to_images
from ella_kd.models import TextFeatures
from ella_kd.pictures.beside import has_channels
from ella_kd.pictures.hires import Hires
from ella_kd.pictures.options import SHOWN, FromPicture
from ella_kd.pictures.start import slerp
from ella_kd.pictures.starts import Blank, Start
from ella_kd.pipeline import Pipeline
from ella_kd.refining import HandOver, Refiner
from ella_kd.request import SCALE, Request, check_method_options, method_named, seed_number
from ella_kd.samplers import get_sampler, randn
from ella_kd.starting import begin, check_multiples, check_room, repaints

OTHER_WORDS = {"scale": "guidance", "cond_scale": "guidance", "cfg_scale": "guidance", "negative": "uncond",
               "prompt": "cond", "num_inference_steps": "steps", "guidance_scale": "guidance"}
SEEN = 18  # latents beyond an edge that a decoder's convolutions see


@torch.no_grad()
def draw(
    pipeline: Pipeline,
    cond: Condition,
    *,
    uncond: Condition | None = None,
    guidance: Guidance | float = SCALE,
    sampler: str = Request.sampler,
    schedule: str = Request.schedule,
    steps: int = Request.steps,
    width: int | None = None,
    height: int | None = None,
    seeds: int | Sequence[int] = 0,
    noise: Tensor | None = None,
    latents: Tensor | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    refiner: Refiner | None = None,
    hires: Hires | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
    **more: Any,
) -> list[Image.Image]:
    """One picture per seed, in one batch, from encoded prompts: `draw(sd, Regions(...), uncond=sd.encode(""))`.

    cond, uncond, and other conditions by the names the rule asks for: conditionings (`pipeline.encode(prompts)`), T5
    features, or compositions, each of one row or of one per seed. guidance: a rule, or the scale of classifier-free
    guidance (lambda for a sampler in `_cfg_pp`). The rest is as in `generate`, which reads prompts and keeps settings.
    noise [B, C, h, w], fp32 or fp64: a start of unit variance in place of the seeds' own. latents, of that shape: x at
    sigmas[0], as it is. Beside either, one number as seeds is that of the first row. sigmas [n + 1]: the noise levels
    themselves, in place of schedule and steps: `draw(sd, cond, latents=x, sigmas=sigmas[8:])` goes on from x.
    refiner: a system that takes over on the way, `Refiner(pipeline, cond, uncond, at=0.8)`. hires: a second pass over
    what was drawn, enlarged, `Hires((1024, 1024), strength=0.5)`, with noise of its own from the same seeds.
    more: conditions, and the fields of `ella_kd.pictures.options.FromPicture`: `draw(sd, cond, start="room.jpg",
    mask="lamp.png")`; start may be a `pictures.starts.Start` too. A network that sees a picture beside x (inpainting,
    InstructPix2Pix) is shown it.
    Raises ValueError or TypeError for an argument that cannot be met, and ValueError if a network returns NaN.
    """
    asked, begun, conditions = _asked(more)
    refuse_unknown(draw, conditions, OTHER_WORDS, FromPicture.names(), _is_condition)
    sampler, schedule = method_named(sampler, schedule)
    check_method_options(sampler, asked.of_method)
    rule, given = plain_scale(guidance, get_sampler(sampler).cfg_pp), start_given(noise, latents)
    rows = seed_rows(seeds, None if given is None else len(given))
    denoiser = pipeline.denoiser(rule if isinstance(rule, Guidance) else None)
    sigmas = None if sigmas is None else torch.as_tensor(sigmas)
    if begun is None:
        begun = begin(pipeline, asked, schedule, steps, width, height, sigmas, noise=noise, latents=latents)
    elif latents is not None:
        raise ValueError("give a start picture or latents, not both: latents are x at sigmas[0]")
    if noise is not None and noise.shape[1:] != begun.shape:
        raise ValueError(f"the run's latents are {list(begun.shape)} each, the noise given is {list(noise.shape)}")
    if hires is not None:
        if not isinstance(begun, Blank):
            raise ValueError("hires draws over what was drawn from noise: a start picture is enlarged by width, height")
        check_multiples(*hires.size, pipeline.vae.factor)
        check_method_options(hires.sampler or sampler, asked.of_method)
    check_room(pipeline, *(begun.drawn(pipeline.vae.factor) if hires is None else hires.size))
    extra_args: Mapping[str, Condition | None] = {"cond": cond, "uncond": uncond, **conditions}
    shown = refiner is None and not any(map(has_channels, extra_args.values())) and repaints(pipeline)
    extra_args = begun.seen(pipeline, denoiser.inner_model.lift, extra_args, list(asked.shown.values()), rows)
    begun = begun.unkept() if shown else begun
    sigmas, x = begun.sigmas.to(pipeline.device), begun.latents
    if x is None:
        noise = _noise(asked, (len(rows), *begun.shape), rows) if noise is None else noise
        x = begun.x(noise.to(pipeline.device), rows)
    model, extra_args, fresh = _model(pipeline, refiner, rule, get_sampler(sampler).cfg_pp, extra_args, sigmas)
    sample = begun.method(sampler, sigmas, fresh)
    with ExitStack() as at_work:
        for system in [pipeline] if refiner is None else [pipeline, refiner.pipeline]:
            at_work.enter_context(system.at_work("unet", "tsc"))
        x = sample(begun.kept(model, sigmas.device), x.expand(len(rows), -1, -1, -1).to(sigmas.device), sigmas,
                   extra_args=extra_args, callback=callback, disable=not progress, seeds=rows, **asked.of_method)
    if hires is not None:
        more.pop("start", None)
        again = {"uncond": uncond, "guidance": guidance, "sampler": sampler, "refiner": refiner, **more, **hires.said()}
        sigmas = hires.sigmas(pipeline, schedule, steps)
        x, rows = hires.start(pipeline, x, sigmas[0], rows)
        return draw(hires.pipeline(pipeline), again.pop("cond", cond), latents=x, sigmas=sigmas, seeds=rows,
                    callback=callback, progress=progress, **again)
    with pipeline.at_work("vae"):
        images = to_images(decoded(pipeline, x))
    return [begun.back(image) for image in images]


def decoded(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] as pictures [B, 3, H, W]; a panorama's whole way round, so that its edges meet."""
    beyond = min(SEEN, latents.shape[3]) if getattr(pipeline.unet, "wraps", False) else 0
    around = torch.cat([latents[..., -beyond:], latents, latents[..., :beyond]], 3) if beyond else latents
    pictures = pipeline.vae.decode(around.to(pipeline.vae.dtype))
    side = beyond * pipeline.vae.factor
    return pictures[..., side:-side] if beyond else pictures


def _noise(asked: FromPicture, shape: tuple[int, int, int, int], seeds: Sequence[int]) -> Tensor:
    noise = randn(shape, seeds)
    if not asked.variation:
        return noise
    return slerp(noise, randn(shape, [asked.variation_seed] * len(seeds)), asked.variation)


def _model(pipeline: Pipeline, refiner: Refiner | None, rule: Guidance | float, cfg_pp: bool,
           conditions: Mapping[str, Condition | None], sigmas: Tensor) -> tuple[Denoiser, dict[str, Any], list[int]]:
    """What is sampled: the pipeline's denoiser, or with a refiner both of them; what it is called with; the steps that
    begin without what a method remembers."""
    own, args = rule if isinstance(rule, Guidance) else None, guided(pipeline, conditions, rule, cfg_pp)
    model = pipeline.denoiser(own)
    if refiner is None:
        return model, args, []
    refiner.check_latents(pipeline.vae)
    theirs = guided(refiner.pipeline, {"cond": refiner.cond, "uncond": refiner.uncond}, rule, cfg_pp)
    both = HandOver(model, refiner.pipeline.denoiser(own), refiner.sigma(model), theirs)
    return both, args, both.changes(sigmas.tolist())


def guided(pipeline: Pipeline, conditions: Mapping[str, Condition | None], rule: Guidance | float,
           cfg_pp: bool) -> dict[str, Any]:
    """What the pipeline's denoiser is called with: the conditions and, where no rule has it, the scale.

    A network that is told the scale (LCM) guides itself: its conditions say it, and its own scale is 1.
    """
    if isinstance(rule, Guidance):
        return dict(conditions)
    if not getattr(pipeline.unet, "guidance_dim", None) or cfg_pp:
        return {**conditions, "cond_scale": rule}
    told = torch.tensor([float(rule)], device=pipeline.device)
    return {"cond_scale": 1.0, **{name: each and as_conditioning(each).map(lambda leaf: With(leaf, guidance=told))
                                  for name, each in conditions.items()}}


def _asked(more: Mapping[str, Any]) -> tuple[FromPicture, Start | None, dict[str, Any]]:
    """What of a call is about a start picture and the noise, and the rest: conditions."""
    given = {name: value for name, value in more.items() if name in FromPicture.names()}
    rest = {name: value for name, value in more.items() if name not in given}
    begun = given.pop("start") if isinstance(given.get("start"), Start) else None
    allowed = {"eta", "s_noise", "s_churn", "variation", "variation_seed", *SHOWN}
    if begun is not None and (twice := given.keys() - allowed):
        raise ValueError(f"{min(twice)} was said when the beginning was made")
    return FromPicture(**given), begun, rest


def plain_scale(guidance: Guidance | float, cfg_pp: bool) -> Guidance | float:
    """The scale of `CFG(7.0)`, which is the same as 7.0; other rules as they are, and a warning where CFG++ would take
    their scale for lambda."""
    if type(guidance) is CFG and isinstance(guidance.scale, float):
        return guidance.scale
    scale = innermost_scale(guidance) if isinstance(guidance, Guidance) else None
    if cfg_pp and scale is not None and scale > 2:
        warnings.warn(f"with CFG++ the rule's scale is lambda, usually 0 to 1; {guidance} has {scale:g} (a plain "
                      "guidance scale, perhaps?)", stacklevel=4)
    return guidance


def innermost_scale(rule: Guidance) -> float | None:
    """The scale that a nest of rules starts from, if it is one number."""
    while isinstance(base := getattr(rule, "base", None), Guidance):
        rule = base
    found = getattr(rule, "scale", None)
    return float(found) if isinstance(found, (int, float)) else None


def start_given(noise: Tensor | None, latents: Tensor | None) -> Tensor | None:
    """The noise or the latents that a run starts from. ValueError for both or another shape, TypeError for a dtype."""
    if noise is not None and latents is not None:
        raise ValueError("give noise (of unit variance) or latents (x at sigmas[0]), not both")
    name, given = ("noise", noise) if latents is None else ("latents", latents)
    if given is None:
        return None
    if not isinstance(given, Tensor) or given.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be a tensor in float32 or float64, the network inside may be half; got "
                        f"{given.dtype if isinstance(given, Tensor) else type(given).__name__}")
    if given.ndim != 4 or not given.numel():
        raise ValueError(f"{name} must be latents [B, C, h, w], got shape {list(given.shape)}")
    return given


def seed_rows(seeds: int | Sequence[int], rows: int | None = None) -> list[int]:
    """One seed per row; of rows that are given, a single number is the first's, and the next ones follow."""
    if not several(seeds):
        first = seed_number(seeds)
        return [first + i for i in range(rows or 1)]
    assert isinstance(seeds, Iterable)
    values = [seed_number(seed) for seed in seeds]
    if not values:
        raise ValueError("seeds is empty: give one per picture, at least one")
    if rows not in (None, len(values)):
        raise ValueError(f"there are {len(values)} seeds and {rows} rows to start from: give one per row, or one")
    return values


def several(seeds: object) -> bool:
    """Whether they are a sequence or an array of seeds, rather than one."""
    return isinstance(seeds, Iterable) and not isinstance(seeds, str) and getattr(seeds, "ndim", None) != 0


def refuse_unknown(function: Callable[..., Any], given: Mapping[str, Any], other_words: Mapping[str, str],
                   more: Sequence[str], allowed: Callable[[object], bool] = lambda value: False) -> None:
    """TypeError for a keyword that the function does not have and whose value is not allowed there, with the nearest
    that it has; more: what it takes beside its own."""
    names = [name for name, each in inspect.signature(function).parameters.items() if each.kind != each.VAR_KEYWORD]
    names += more
    for name, value in given.items():
        near = [other_words[name]] if name in other_words else get_close_matches(name, names, 3, 0.6)
        if near or not allowed(value):
            advice = f"did you mean {' or '.join(near)}?" if near else f"{function.__name__} takes {', '.join(names)}"
            raise TypeError(f"unknown argument {name}: {advice}")


def _is_condition(value: object) -> bool:
    return isinstance(value, (Conditioning, Composition, TextFeatures, Tensor)) or value is None
