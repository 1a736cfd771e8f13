"""Any combination of conditionings shows each row what that row's prompts say at its sigma, planned or not."""

import torch
from hypothesis import given, settings
from torch import Tensor

from ella_kd import ELLADenoiser
from ella_kd.conditioning import Conditioning, Context, Plan, levels_of
from ella_kd.denoiser import LDMDenoiser
from ella_kd.models.unet import UNet, UNetConfig
from strategies import SIGMAS, Spec, T, build, calls, counting_tsc, images, naive, rows_of
from tiny import WIDTH, noise, randomised, relative, tiny_unet

TSC = counting_tsc()
SCHEDULE = ELLADenoiser(tiny_unet(), TSC).noise_schedule


def decided(conditioning: Conditioning, sigmas: tuple[float, ...]) -> Context:
    sigma = torch.tensor(sigmas)
    return conditioning.at(levels_of(sigma))(SCHEDULE.sigma_to_t(sigma))


def planned(*conditionings: Conditioning) -> list[Conditioning]:
    plan = Plan(torch.tensor(SIGMAS).tolist(), T, T.tolist())
    for conditioning in conditionings:
        conditioning.map(lambda leaf: leaf.planned(plan))
    return [conditioning.map(lambda leaf: leaf.planned(plan)) for conditioning in conditionings]


def shown(context: Context, row: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(context.tokens.shape[:2]) if context.mask is None else context.mask
    weights = mask[row].float()
    return context.tokens[row, weights > 0], weights[weights > 0]


def check(context: Context, spec: Spec, sigmas: tuple[float, ...]) -> None:
    assert len(context.tokens) == len(sigmas)
    assert context.mask is None or context.mask.shape == context.tokens.shape[:2]
    for row, sigma in enumerate(sigmas):
        tokens, weights = shown(context, row)
        expected, expected_weights = naive(spec, row, sigma, SCHEDULE.sigma_to_t(torch.tensor(sigma)), TSC)
        assert tokens.shape == expected.shape
        assert relative(tokens, expected) < 1e-5
        assert torch.equal(weights, expected_weights)
    if spec[0] == "channels":
        assert context.channels is not None
        assert torch.equal(context.channels, images(spec[2]).expand(len(sigmas), -1, -1, -1))
    else:
        assert context.channels is None


@settings(max_examples=100)
@given(calls())
def test_each_row_shows_its_prompts_at_its_sigma(call: tuple[Spec, tuple[float, ...]]) -> None:
    spec, sigmas = call
    conditioning = build(spec, TSC)
    assert conditioning.rows == rows_of(spec)
    TSC.calls = 0
    (ready,) = planned(conditioning)
    assert TSC.calls == 0
    first = decided(ready, sigmas)
    assert TSC.calls <= 1 or len(set(sigmas)) > 1
    check(decided(conditioning, sigmas), spec, sigmas)
    check(first, spec, sigmas)
    check(decided(ready, sigmas), spec, sigmas)  # and once more: use has changed nothing
    check(decided(conditioning, sigmas), spec, sigmas)


@settings(max_examples=60)
@given(calls(2))
def test_pictures_of_one_prompt_show_the_same(call: tuple[Spec, tuple[float, ...]]) -> None:
    """repeat(3), at one sigma for all or at each prompt's own, before the plan and before and after the decision."""
    spec, sigmas = call
    each = tuple(sigma for sigma in sigmas for _ in range(3))
    conditioning = build(spec, TSC)
    if conditioning.rows < len(sigmas):
        conditioning = conditioning.repeat(len(sigmas))
    check_repeated(decided(conditioning.repeat(3), each), decided(conditioning, sigmas))
    check_repeated(decided(planned(conditioning)[0].repeat(3), each), decided(conditioning, sigmas))
    late = conditioning.at(levels_of(torch.tensor(sigmas)))
    late = late if late.rows == len(sigmas) else late.repeat(len(sigmas))
    check_repeated(late.repeat(3)(SCHEDULE.sigma_to_t(torch.tensor(each))), decided(conditioning, sigmas))


def check_repeated(many: Context, few: Context) -> None:
    for row in range(len(many.tokens)):
        for got, expected in zip(shown(many, row), shown(few, row // 3), strict=True):
            assert got.shape == expected.shape
            assert relative(got, expected) < 1e-5


@settings(max_examples=40)
@given(calls(2))
def test_the_network_sees_each_row_as_if_it_were_alone(call: tuple[Spec, tuple[float, ...]]) -> None:
    spec, sigmas = call
    extra = 2 * (spec[0] == "channels")
    unet = randomised(UNet(UNetConfig(4 + extra, 4, 32, (1, 2), 1, (True, True), WIDTH, 2)), 0, 0.1)
    denoiser, x, sigma = LDMDenoiser(unet), noise(len(sigmas), 4, 8, 8) * 3, torch.tensor(sigmas)
    got = denoiser(x, sigma, build(spec, TSC))
    for row, level in enumerate(sigmas):
        t = SCHEDULE.sigma_to_t(sigma[row:row + 1])
        tokens, weights = naive(spec, row, level, t[0], TSC)
        x_in = x[row:row + 1] / (level**2 + 1) ** 0.5
        if extra:
            x_in = torch.cat([x_in, images(spec[2])[row % spec[2]][None]], 1)
        alone = x[row:row + 1] - level * unet(x_in, t, Context(tokens[None], weights[None]))
        assert relative(got[row:row + 1], alone) < 1e-5


@settings(max_examples=30)
@given(calls(2), calls(2))
def test_several_are_planned_together(first: tuple[Spec, tuple[float, ...]],
                                      second: tuple[Spec, tuple[float, ...]]) -> None:
    together = planned(*(build(spec, TSC) for spec, _ in (first, second)))
    for (spec, sigmas), conditioning in zip((first, second), together):
        check(decided(conditioning, sigmas), spec, sigmas)


@settings(max_examples=60)
@given(calls())
def test_use_changes_no_value(call: tuple[Spec, tuple[float, ...]]) -> None:
    spec, sigmas = call
    conditioning = build(spec, TSC)
    tensors = [x for leaf in conditioning.leaves() for x in vars(getattr(leaf, "features", leaf)).values()
               if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors]
    state = dict(vars(conditioning))
    for use in (conditioning, *planned(conditioning), conditioning.repeat(2)):
        few = sigmas if conditioning.rows == len(sigmas) else sigmas[:1]
        decided(use, few * (use.rows // conditioning.rows))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert all(vars(conditioning)[name] is value for name, value in state.items())


def leaves_of(spec: Spec) -> list[Spec]:
    if spec[0] in ("ella", "clip"):
        return [spec]
    inner = spec[1] if isinstance(spec[1][0], tuple) else spec[1:3] if spec[0] == "lerp" else spec[1:2]
    return [leaf for part in inner for leaf in leaves_of(part)]


def test_the_pool_of_sigmas_is_what_plans_are_made_for() -> None:
    assert torch.equal(SCHEDULE.sigma_to_t(torch.tensor(SIGMAS)), T)
