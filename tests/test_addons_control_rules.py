"""Controls and image prompts beside everything else: every rule and patch, networks of networks, samplers, compiled."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from ella_kd import CFG, PAG, CFGDenoiser, ELLADenoiser, Guidance, GuidedDenoiser
from ella_kd.conditioning import as_conditioning
from ella_kd.models import UNet, UNetConfig, fast_on_cpu
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.context import Context
from ella_kd.models.networks import ByRow, BySigma
from ella_kd.models.prompt_to_prompt import SourceAttention
from ella_kd.samplers import sample_dpmpp_2m, sample_euler_cfg_pp
from every_rule import INNER, RULES
from test_addons_control_rows import (
    DENOISER,
    PICTURE,
    SECOND,
    TSC,
    UNET,
    answer,
    controlled,
    image_adapter,
    noise,
    pictured,
    plain,
    prompt,
    several,
)
from tiny import WIDTH, features, planned, randomised, relative, tiny_unet


@torch.no_grad()
def test_patches_and_twins_see_them() -> None:
    """The rows of perturbed attention are steered too, in one call; so is the twin for CPUs."""
    x, sigma = 5 * noise(2, 4, 8, 8), torch.tensor([5.0, 2.0])
    rule = PAG(CFG(3.0), 2.0, UNET.places[:1])
    cond, uncond = several(prompt(2)), prompt(seed=9)
    got = GuidedDenoiser(DENOISER, rule)(x, sigma, cond=cond, uncond=uncond)
    fast = GuidedDenoiser(ELLADenoiser(fast_on_cpu(UNET), TSC), rule)
    assert relative(fast(x, sigma, cond=cond, uncond=uncond), got) < 1e-5
    patch = next(branch.patch for branch in rule.branches if branch.patch is not None)
    context = several(prompt(2)).at((5.0, 2.0))(DENOISER.sigma_to_t(sigma))
    both = Context.stack([context, context])
    out = UNET(x.repeat(2, 1, 1, 1), torch.ones(4), both, patches=((2, None), (2, patch)))
    alone = UNET(x, torch.ones(2), context, patches=((2, patch),))
    assert relative(out[2:], alone) < 1e-5 and relative(out[:2], UNET(x, torch.ones(2), context)) < 1e-5
    unseen = UNET(x, torch.ones(2), Context(context.tokens, context.mask), patches=((2, patch),))
    assert relative(alone, unseen) > 1e-3
    words = SourceAttention(UNET.places)  # which puts cross-attention together by itself
    context = pictured(prompt(2)).at((5.0, 2.0))(DENOISER.sigma_to_t(sigma))
    bare = Context(context.tokens, context.mask)
    blind, seeing = (UNET(x, torch.ones(2), each, patches=((2, words),)) for each in (bare, context))
    assert relative(seeing, blind) > 1e-3
    assert relative(seeing[:1], UNET(x, torch.ones(2), context)[:1]) < 1e-5  # the source's row stays as it is


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES, ids=[f"{type(rule).__name__}{i}" for i, rule in enumerate(RULES)])
def test_every_rule(rule: Guidance) -> None:
    x, sigma = 5 * noise(2, 4, 8, 8), torch.tensor([5.0, 2.0])
    args: dict[str, Any] = {"cond": several(prompt(2)), "uncond": controlled(prompt(seed=9))}
    denoiser = GuidedDenoiser(INNER, rule)
    got = denoiser(x, sigma, **args)
    assert relative(planned(denoiser, x, sigma, **args).denoised, got) < 1e-5
    assert relative(got, denoiser(x, sigma, cond=prompt(2), uncond=prompt(seed=9))) > 1e-3


@torch.no_grad()
def test_networks_of_networks() -> None:
    """One for each row, and one by sigma, each with the controls of its rows; bare features are read and steered."""
    other, x, sigma = tiny_unet(4), 5 * noise(2, 4, 8, 8), torch.tensor([5.0, 2.0])
    args: dict[str, Any] = {"cond": several(as_conditioning(features(3, 4))), "uncond": controlled(prompt(seed=9)),
                            "cond_scale": 3.0}
    first, second = (CFGDenoiser(ELLADenoiser(unet, TSC))(x, sigma, **args) for unet in (UNET, other))
    assert relative(first, answer(several(prompt(2)), x, sigma, controlled(prompt(seed=9)))) < 1e-6
    for network in (ByRow([UNET, other]), BySigma(UNET, other, at=3.0)):
        denoiser = CFGDenoiser(ELLADenoiser(network, TSC))
        got = denoiser(x, sigma, **args)
        assert relative(got, torch.stack([first[0], second[1]])) < 1e-5
        assert relative(planned(denoiser, x, sigma, **args).denoised, got) < 1e-5


@torch.no_grad()
def test_runs_of_samplers_and_cfg_pp() -> None:
    sigmas = torch.tensor([10.0, 5.0, 2.0, 0.7, 0])
    x = 10 * noise(2, 4, 8, 8)
    for sample, scale in ((sample_dpmpp_2m, 4.0), (sample_euler_cfg_pp, 0.7)):
        runs = [sample(CFGDenoiser(DENOISER), x, sigmas, disable=True, extra_args={
            "cond": way(prompt()), "uncond": way(prompt(seed=9)), "cond_scale": scale}) for way in (plain, several)]
        assert all(run.isfinite().all() for run in runs) and relative(runs[1], runs[0]) > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_network_is_steered() -> None:
    """The UNet's graph takes what is added as tensors; another picture or strength compiles nothing more."""
    torch._dynamo.reset()
    unet = randomised(UNet(UNetConfig(4, 4, 32, (1,), 1, (True,), WIDTH, 2)), 0, 0.1)
    net, adapter, denoiser = randomised(ControlNet.of(unet), 3, 0.1), image_adapter(unet), ELLADenoiser(unet, TSC)
    x, sigma = 5 * noise(2, 4, 8, 8), torch.tensor([5.0, 2.0])
    conds = [prompt(2).with_control(net, picture, strength).with_image(adapter, picture, strength)
             for picture, strength in ((PICTURE, 0.7), (SECOND, lambda s: 0.1 * s))]
    wanted = [denoiser(x, sigma, cond) for cond in conds]
    denoiser.compile(backend="eager")
    try:
        assert relative(denoiser(x, sigma, conds[0]), wanted[0]) < 1e-5
        counters.clear()
        assert relative(denoiser(x, sigma, conds[1]), wanted[1]) < 1e-5
        assert not counters["recompiles"] and not counters["stats"]
    finally:
        torch._dynamo.reset()
