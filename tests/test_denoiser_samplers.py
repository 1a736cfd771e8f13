"""Every sampler on ELLA: the same timestep for the UNet and the connector, planned or not, ours or k-diffusion's."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd import CFGDenoiser, ELLADenoiser, LDMDenoiser
from ella_kd.models.text import TextFeatures
from ella_kd.samplers import SAMPLERS, get_sigmas_ays, get_sigmas_karras, get_sigmas_normal
from ella_kd.samplers.upstream import k_diffusion
from tiny import PointwiseTSC, PointwiseUNet, features, noise, relative, tiny_tsc, tiny_unet

LOW, HIGH = LDMDenoiser(PointwiseUNet()).sigma_min, LDMDenoiser(PointwiseUNet()).sigma_max
SCHEDULES = {
    "karras": lambda: get_sigmas_karras(6, LOW, HIGH),
    "normal": lambda: get_sigmas_normal(6, LDMDenoiser(PointwiseUNet())),
    "ays": lambda: get_sigmas_ays(10),
    "img2img karras": lambda: get_sigmas_karras(10, LOW, HIGH)[5:],
    "img2img normal": lambda: get_sigmas_normal(10, LDMDenoiser(PointwiseUNet()))[5:],
}
THEIRS = [name for name in SAMPLERS if hasattr(k_diffusion().sampling, f"sample_{name}")]


def same_noise() -> Callable[[Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(11)
    return lambda sigma, sigma_next: torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)


def noise_args(name: str) -> dict[str, Any]:
    return {"noise_sampler": same_noise()} if SAMPLERS[name].stochastic else {}


class Script:
    """The library's ten lines with some networks inside."""

    def __init__(self, unet: Any, tsc: Any, scale: float = 7.0) -> None:
        self.denoiser = CFGDenoiser(ELLADenoiser(unet, tsc))
        self.args = {"cond": features(5, 3), "uncond": features(1, seed=9), "cond_scale": scale}

    def __call__(self, sampler: Callable[..., Tensor], sigmas: Tensor, **options: Any) -> Tensor:
        return sampler(self.denoiser, noise(2, 4, 8, 8, dtype=sigmas.dtype) * sigmas[0], sigmas, extra_args=self.args,
                       disable=True, **options)


class Unplanned(CFGDenoiser):
    def bind(self, x: Tensor, sigmas: Any = None, **extra_args: Any) -> Any:
        return super().bind(x, None, **extra_args)


def seeds(name: str) -> dict[str, Any]:
    return {"seeds": [1, 2]} if SAMPLERS[name].stochastic else {}


def spied(sampler: Callable[..., Tensor], sigmas: Tensor, **options: Any) -> tuple[Tensor, list[Tensor], list[int]]:
    """What is drawn; t of each UNet call, every one checked against the t its tokens were made for; and the
    connector's calls."""
    unet, tsc = PointwiseUNet(), PointwiseTSC()
    out = Script(unet, tsc, scale=0.6)(sampler, sigmas, **options)
    assert out.isfinite().all()
    for t, context in zip(unet.t, unet.context, strict=True):
        assert t.dtype == torch.float32
        assert torch.equal(context[:, 0, 0].float(), t)
    return out, unet.t, tsc.calls


def rotated(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each name with one schedule, all of them in turn: what a schedule changes is sigma, not the sampler."""
    return list(zip(names, cycle(SCHEDULES)))


@pytest.mark.parametrize(("name", "schedule"), rotated(SAMPLERS))
def test_unet_and_connector_see_the_same_timestep_at_every_evaluation(name: str, schedule: str) -> None:
    """And a run that is planned in one connector call is, bit for bit, one that asks as it goes."""
    sigmas, sampler = SCHEDULES[schedule](), SAMPLERS[name]
    planned, seen, calls = spied(sampler.function, sigmas, **seeds(name))
    expected = LDMDenoiser(PointwiseUNet()).sigma_to_t(torch.tensor(sampler.solver.eval_sigmas(sigmas)))
    assert torch.equal(torch.stack([t[0] for t in seen]), expected)
    assert calls == [3 * len(expected.unique())]  # planned: one call, a row for each timestep of each prompt
    script = Script(PointwiseUNet(), PointwiseTSC(), scale=0.6)
    script.denoiser = Unplanned(script.denoiser.inner_model)
    assert torch.equal(planned, script(sampler.function, sigmas, **seeds(name)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "options"), [
    ("dpm_2", {}), ("dpmpp_2s_ancestral", {"eta": 0.0}), ("euler", {"s_churn": 2.0}), ("heun", {"s_churn": 2.0}),
    ("dpm_2", {"s_churn": 2.0})])
def test_also_between_the_sigmas_of_the_schedule_and_above_them(name: str, options: dict[str, float],
                                                                schedule: str) -> None:
    sigmas, sampler = SCHEDULES[schedule](), SAMPLERS[name]
    _, seen, calls = spied(sampler.function, sigmas, **options)
    expected = LDMDenoiser(PointwiseUNet()).sigma_to_t(
        torch.tensor(replace(sampler.solver, **options).eval_sigmas(sigmas)))
    assert torch.equal(torch.stack([t[0] for t in seen]), expected)
    assert calls == [3 * len(expected.unique())]
    on_schedule = LDMDenoiser(PointwiseUNet()).sigma_to_t(sigmas)
    assert len(set(expected.tolist()) - set(on_schedule.tolist())) >= len(sigmas) - 3


@pytest.mark.filterwarnings("ignore:Should have t")  # their Brownian tree's bounds are rounded
@pytest.mark.parametrize(("name", "schedule"), rotated(THEIRS))
def test_so_they_do_with_k_diffusions_own_samplers(name: str, schedule: str) -> None:
    _, seen, calls = spied(getattr(k_diffusion().sampling, f"sample_{name}"), SCHEDULES[schedule]())
    assert calls == [3] * len(seen)  # planned as they come: one call for the three prompts, at every evaluation
    assert len({float(t[0]) for t in seen}) > 4


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
def test_so_they_do_with_k_diffusions_own_that_take_a_range(name: str) -> None:
    unet, tsc = PointwiseUNet(), PointwiseTSC()
    script = Script(unet, tsc, scale=0.6)
    options: dict[str, Any] = {"n": 7} if name == "dpm_fast" else {}
    out = getattr(k_diffusion().sampling, f"sample_{name}")(script.denoiser, noise(2, 4, 8, 8) * 10, 0.05, 10.0,
                                                            extra_args=script.args, disable=True, **options)
    assert out.isfinite().all()
    assert len(unet.t) >= 7
    assert all(torch.equal(c[:, 0, 0], t) for c, t in zip(unet.context, unet.t, strict=True))


@pytest.mark.parametrize(("name", "schedule"), rotated(THEIRS))
@pytest.mark.usefixtures("float64")
def test_k_diffusions_samplers_give_our_answer(name: str, schedule: str) -> None:
    """Theirs ask as they go, ours plan; float64, with real networks for one of them. 1e-6: t is fp32."""
    networks = (tiny_unet().double(), tiny_tsc().double()) if name == "dpmpp_2m" else (PointwiseUNet(), PointwiseTSC())
    script, sigmas = Script(*networks), SCHEDULES[schedule]()
    ours = script(SAMPLERS[name].function, sigmas, **noise_args(name))
    theirs = script(getattr(k_diffusion().sampling, f"sample_{name}"), sigmas, **noise_args(name))
    assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("name", ["heun", "lms", "restart", "dpmpp_2m_sde", "dpm_2_cfg_pp"])
def test_planned_equals_unplanned_with_networks(name: str) -> None:
    script, sigmas = Script(tiny_unet(), tiny_tsc(), scale=0.6), SCHEDULES["img2img normal"]()
    planned = script(SAMPLERS[name].function, sigmas, **seeds(name))
    script.denoiser = Unplanned(script.denoiser.inner_model)
    assert relative(planned, script(SAMPLERS[name].function, sigmas, **seeds(name))) <= 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_readmes_script_with_every_sampler(name: str) -> None:
    prompt, noise_ = "two red cubes left of a blue ball", noise(2, 4, 8, 8)

    def t5(prompt: str) -> TextFeatures:
        return features(len(prompt.split()) + 1)

    denoiser = CFGDenoiser(ELLADenoiser(PointwiseUNet(), PointwiseTSC()))  # type: ignore[arg-type]
    sigmas = get_sigmas_karras(5, denoiser.sigma_min, denoiser.sigma_max)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        latents = SAMPLERS[name].function(denoiser, noise_ * sigmas[0], sigmas,
                                          extra_args={"cond": t5(prompt), "uncond": t5(""), "cond_scale": 7.0})
    assert latents.shape == noise_.shape
    assert latents.isfinite().all()
    assert bool(caught) == SAMPLERS[name].cfg_pp  # there the scale is lambda, and 7 is too much


def test_a_batch_of_prompts_of_different_lengths_equals_single_runs() -> None:
    denoiser = CFGDenoiser(ELLADenoiser(tiny_unet(), tiny_tsc()))
    prompts, start, sigmas = features(7, 1, 3, 5), noise(4, 4, 8, 8), get_sigmas_karras(5, LOW, HIGH)
    sample = SAMPLERS["dpmpp_2m"].function
    args = {"uncond": features(1, seed=9), "cond_scale": 3.0}
    batch = sample(denoiser, start * sigmas[0], sigmas, extra_args={"cond": prompts, **args}, disable=True)
    for i in range(4):
        assert prompts.mask is not None
        one = TextFeatures(prompts.tokens[i:i + 1, prompts.mask[i]])
        alone = sample(denoiser, start[i:i + 1] * sigmas[0], sigmas, extra_args={"cond": one, **args}, disable=True)
        assert relative(batch[i:i + 1], alone) < 1e-5
