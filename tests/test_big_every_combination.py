"""Sampler x CFG++ x rule x network (as it is, tiles, HiDiffusion, reuse) x mask x ControlNet: one property, in fp64.

Every value of each of these meets every value of each other one in some case; within a kind the methods and rules
take turns, so that every family of samplers and every rule is there.
"""

from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ella_kd import ELLA, ELLADenoiser
from ella_kd.conditioning import Conditioning
from ella_kd.guidance import (
    APG,
    CFG,
    PAG,
    SAG,
    SEG,
    SLG,
    TCFG,
    AutoGuidance,
    CFGZeroStar,
    DynamicThreshold,
    Guidance,
    GuidedDenoiser,
    Interval,
    MimicScale,
    Rescale,
)
from ella_kd.models import UNet, UNetConfig
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.hidiffusion import hidiffusion
from ella_kd.models.inside import Inside
from ella_kd.models.reuse import Reuse
from ella_kd.models.tiled import Tiled
from ella_kd.pictures.keep import Keep, Repaint, Unlock
from ella_kd.samplers import SAMPLERS, Run, get_sampler, get_sigmas_karras, load_run, randn
from every_rule import RULES
from tiny import WIDTH, features, noise, randomised, relative, tiny_tsc

SEEDS, SHAPE = [7, 8], (2, 4, 8, 8)
SIGMAS = {False: get_sigmas_karras(3, 0.05, 10.0).double(), True: torch.tensor([2.3, 2.25]).double()}  # True: own steps
NOISE, PICTURE = randn(SHAPE, SEEDS).double(), noise(*SHAPE, dtype=torch.float64)
HINTS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SHAPED = UNetConfig(4, 4, 32, (1, 1), 1, (1, 1), WIDTH, 2)
UNET, WEAK = (randomised(UNet(SHAPED), seed, 0.1).double() for seed in (0, 4))
TSC = tiny_tsc().double()
STEERING = randomised(ControlNet.of(UNET), 3, 0.1).double()
HALF = torch.zeros(8, 8)
HALF[:, 4:] = 1
OWN = torch.stack([HALF, 1 - HALF])[:, None]  # of each row another half
MASKS: list[Repaint | Unlock] = [Repaint(HALF), Repaint(OWN), Unlock(3 * HALF), Unlock(3 * OWN)]
METHODS = {
    "one step": ["exp_heun_2_x0", "ddim", "heun", "heunpp2", "dpm_2", "euler"],
    "with noise": ["dpmpp_2s_ancestral", "ddpm", "restart", "lcm", "dpm_2_ancestral", "euler_ancestral"],
    "SDE": ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "seeds_2", "exp_heun_2_x0_sde", "er_sde"],
    "multistep": ["dpmpp_2m", "lms", "deis", "ipndm", "ipndm_v", "gradient_estimation"],
    "corrected": ["uni_pc", "uni_pc_bh2", "sa_solver", "sa_solver_pece", "res_multistep", "res_multistep_ancestral"],
    "adaptive": ["dpm_adaptive"],
}
KINDS: dict[str, tuple[type[Guidance], ...]] = {
    "CFG": (CFG,), "bounded": (Interval, Rescale, DynamicThreshold, MimicScale), "projected": (APG, CFGZeroStar, TCFG),
    "two models": (AutoGuidance,), "patched": (PAG, SEG, SLG), "blurred": (SAG,)}
NETWORKS: dict[str, Any] = {
    "plain": UNET, "tiled": Tiled(UNET, (8, 6), (0, 4)), "hidiffusion": Inside(UNET, *hidiffusion(UNET, 8, 8)),
    "reused": Reuse(UNET, 2, 2)}


class Case(NamedTuple):
    method: str
    rule: str
    network: str
    cfg_pp: bool
    masked: bool
    steered: bool

    def pairs(self) -> set[Any]:
        return set(combinations(enumerate(self), 2))


def is_there(case: Case) -> bool:
    """dpm_adaptive judges its steps by the denoised alone, so it has no CFG++ form."""
    return not (case.method == "adaptive" and case.cfg_pp)


def chosen() -> list[Case]:
    """Of each method and rule one case: that with the most pairs which are in none before."""
    found, seen = list[Case](), set[Any]()
    for (i, method), (j, rule) in product(enumerate(METHODS), enumerate(KINDS)):
        network = list(NETWORKS)[(i + j) % len(NETWORKS)]
        ways = [Case(method, rule, network, *more) for more in product((False, True), repeat=3)]
        found.append(max(filter(is_there, ways), key=lambda way: len(way.pairs() - seen)))
        seen |= found[-1].pairs()
    return found


CASES = chosen()


def test_every_pair_is_in_some_case() -> None:
    ways = map(Case._make, product(METHODS, KINDS, NETWORKS, *[(False, True)] * 3))
    wanted = set[Any]().union(*(way.pairs() for way in ways if is_there(way)))
    assert wanted == set[Any]().union(*(case.pairs() for case in CASES))
    names = [name for some in METHODS.values() for name in some]
    assert {row.family for row in SAMPLERS.values()} <= {get_sampler(name).family for name in names}


def model(network: Any, rule: Guidance, rows: slice, mask: Repaint | Unlock | None) -> Any:
    """The denoiser of these rows of the batch."""
    if isinstance(rule, CFG) and isinstance(rule.scale, (list, tuple)):
        rule = CFG(rule.scale[rows])
    if isinstance(rule, AutoGuidance):
        rule = AutoGuidance(CFG(3.0), ELLADenoiser(WEAK, TSC), 1.5)
    guided = GuidedDenoiser(ELLADenoiser(network, TSC), rule)
    if mask is None:
        return guided
    values = mask.values if mask.values.ndim == 2 else mask.values[rows]
    return Keep(guided, PICTURE[rows], type(mask)(values))


def conditions(rows: slice, steered: bool) -> dict[str, Conditioning]:
    """A prompt of each row and, steered, a picture of each."""
    cond: Conditioning = ELLA(TSC, features(2, 5, seed=1), torch.arange(2)[rows])
    return {"cond": cond.with_control(STEERING, HINTS[rows], 0.7) if steered else cond,
            "uncond": ELLA(TSC, features(3, seed=2))}


class Unplanned:
    """A model whose every call stands alone: nobody tells it the levels of the run."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, x: Tensor, sigma: Tensor, **args: Any) -> Tensor:
        return self.model(x, sigma, **args)

    def predict(self, x: Tensor, sigma: Tensor, need_uncond: bool = False, **args: Any) -> Any:
        return self.model.predict(x, sigma, need_uncond, **args)


def resumed(name: str, made: Any, x: Tensor, args: Any, path: Path) -> Tensor:
    """Drawn in two runs, the second from a file."""
    method = get_sampler(name)
    run = Run(method.solver, method.walked(made), x, SIGMAS[False], args, seeds=SEEDS)
    run.advance(2)
    run.save(path / "run.safetensors")
    x, state = load_run(path / "run.safetensors")
    again = Run(method.solver, method.walked(made), x, None, args, state=state)
    again.advance(len(again))
    return again.x


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=["-".join(map(str, case)) for case in CASES])
@torch.no_grad()
def test_every_combination(number: int, case: Case, tmp_path: Path) -> None:
    """Nothing is NaN, kept is kept, the same twice, a row as it is alone, unplanned as planned (reused: as resumed)."""
    turn = number // len(KINDS) + number % len(KINDS)
    names, rules = METHODS[case.method], [rule for rule in RULES if isinstance(rule, KINDS[case.rule])]
    name = names[number % len(names)] + case.cfg_pp * "_cfg_pp"
    rule, mask = rules[turn % len(rules)], MASKS[number % len(MASKS)] if case.masked else None
    adaptive, network = case.method == "adaptive", NETWORKS[case.network]
    sigmas = SIGMAS[adaptive]
    start, both = (PICTURE if case.masked else 0) + sigmas[0] * NOISE, slice(0, 2)

    def drawn(made: Any, rows: slice = both) -> Tensor:
        return get_sampler(name).function(made, start[rows], sigmas, extra_args=conditions(rows, case.steered),
                                          disable=True, seeds=SEEDS[rows])

    made = model(network, rule, both, mask)
    x = drawn(made)
    assert x.dtype == torch.float64 and bool(x.isfinite().all())
    if mask is not None:
        kept = (mask.values == 0).expand(SHAPE)
        assert float((x - PICTURE - sigmas[-1] * NOISE)[kept].abs().max()) < 1e-10
    last = slice(1, 2)
    assert relative(drawn(model(network, rule, last, mask), last), x[last]) < 1e-5
    if number % 3 == 0:
        assert torch.equal(drawn(model(network, rule, both, mask)), x)
    if case.network != "reused":
        assert relative(drawn(Unplanned(made)), x) < 1e-5
    elif adaptive:  # it tells no levels beforehand, so nothing is reused
        assert torch.equal(drawn(model(UNET, rule, both, mask)), x)
    else:
        assert torch.equal(resumed(name, made, start, conditions(both, case.steered), tmp_path), x)


def test_what_there_is_not() -> None:
    with pytest.raises(ValueError, match="dpm_adaptive_cfg_pp"):
        get_sampler("dpm_adaptive_cfg_pp")


@torch.no_grad()
def test_a_map_of_rows_on_both_sides_of_a_threshold() -> None:
    """SAG at sigma 3 and 2, where HiDiffusion ends at 2.28 and has halved the map: each row as it is alone."""
    sigma, rule = torch.tensor([3.0, 2.0]).double(), SAG(CFG(3.0), 0.75, place="middle_block.1")

    def answer(rows: slice) -> Tensor:
        return model(NETWORKS["hidiffusion"], rule, rows, None)(NOISE[rows], sigma[rows], **conditions(rows, False))

    both = answer(slice(0, 2))
    for rows in (slice(0, 1), slice(1, 2)):
        assert relative(both[rows], answer(rows)) < 1e-12


@torch.no_grad()
def test_a_tile_follows_its_part_of_the_picture() -> None:
    x, sigma, cond = NOISE[:1], torch.tensor([3.0]).double(), ELLA(TSC, features(3, seed=1))

    def answer(network: Any, x: Tensor, hint: Tensor) -> Tensor:
        return ELLADenoiser(network, TSC)(x, sigma, cond.with_control(STEERING, hint, 0.7))

    left, right = (answer(UNET, x[..., part], HINTS[:1, ..., 8 * part.start:8 * part.stop])
                   for part in (slice(0, 6), slice(2, 8)))
    mean = torch.cat([left[..., :2], (left[..., 2:] + right[..., :4]) / 2, right[..., 4:]], 3)
    assert relative(answer(NETWORKS["tiled"], x, HINTS[:1]), mean) < 1e-12
