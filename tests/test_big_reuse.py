"""Reused work belongs to the run: off is the plain network, resumed is unpaused, rows are their own, any wrapper."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd import ELLADenoiser
from ella_kd.conditioning import Constant
from ella_kd.guidance import CFG, PAG, SAG, CFGDenoiser, Guidance, GuidedDenoiser, Interval
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.addons.t2i import T2IAdapter
from ella_kd.models.freeu import FreeU
from ella_kd.models.inside import Inside
from ella_kd.models.network import Deep
from ella_kd.models.reuse import Reuse
from ella_kd.pictures.keep import Keep, Repaint
from ella_kd.pictures.segments import sample_in_segments
from ella_kd.samplers import Run, get_sampler, get_sigmas_karras, load_run, randn, without_history
from tiny import WIDTH, features, noise, randomised, relative, row, tiny_tsc, tiny_unet

SEEDS, SHAPE = [7, 8], (2, 4, 4, 6)
SIGMAS = get_sigmas_karras(6, 0.05, 10.0)
CONDITIONS: dict[str, Any] = {"cond": features(2, 5, seed=1), "uncond": features(3, seed=2)}
UNET, TSC = tiny_unet(), tiny_tsc()
NOISE = randn(SHAPE, SEEDS) * SIGMAS[0]


def model(network: Any, rule: Guidance | None = None) -> Any:
    return GuidedDenoiser(ELLADenoiser(network, TSC), rule or CFG(3.0))


@torch.no_grad()
def drawn(model: Any, name: str = "euler", x: Tensor = NOISE, **args: Any) -> Tensor:
    return get_sampler(name).function(model, x, SIGMAS, extra_args=args or CONDITIONS, disable=True,
                                      seeds=SEEDS[:len(x)])


class Counting(torch.nn.Module):
    """Counts the rows of whole and of partial calls."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = self.part = 0

    def count(self, network: Any, args: Any, kwargs: Any) -> None:
        deep = kwargs.get("deep")
        rows = len(args[0])
        if deep is not None and deep.features is not None:
            self.part += rows
        else:
            self.whole += rows


@torch.no_grad()
def test_features_of_the_same_call_are_the_same_answer() -> None:
    x, t, tokens = noise(*SHAPE), torch.full((2,), 300.0), noise(2, 3, WIDTH)
    for network in (UNET, Inside(UNET, FreeU()).at((1.0,))):
        for branch in range(len(UNET.output_blocks)):
            plain = network(x, t, tokens)
            out, found = network(x, t, tokens, deep=Deep(branch))
            again, _ = network(x, t, tokens, deep=Deep(branch, found))
            assert torch.equal(out, plain) and torch.equal(again, plain)
            other, _ = network(2 * x, t, tokens, deep=Deep(branch, found))
            assert not torch.equal(other, network(2 * x, t, tokens))
    with pytest.raises(ValueError, match="a branch of this UNet"):
        Reuse(UNET, 2, branch=9)


@torch.no_grad()
def test_a_control_runs_no_further_than_the_features() -> None:
    """What is left out of it changes no bit, whatever the branch and the factors of guess mode."""
    net, adapter = randomised(ControlNet.of(UNET, "edges"), 3, 0.1), randomised(T2IAdapter(3, (32, 64)), 5, 0.1)
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    x, t = noise(*SHAPE), torch.full((2,), 300.0)
    cond = Constant(features(3, 3, width=WIDTH)).with_control(net, picture, 0.7, guess="ldm")
    runs: list[int] = []
    with net.middle_block.register_forward_hook(lambda *_: runs.append(len(runs))):
        for seen in (cond(t), cond.with_control(adapter, picture)(t)):
            for branch in range(len(UNET.output_blocks)):
                plain = UNET(x, t, seen)
                _, found = UNET(x, t, seen, deep=Deep(branch))
                runs.clear()
                assert torch.equal(UNET(x, t, seen, deep=Deep(branch, found))[0], plain) and not runs


def test_off_is_off() -> None:
    plain = drawn(model(UNET))
    for network in (Reuse(UNET, 1), Reuse(UNET, 3, 2, sigma_lo=100.0)):
        assert torch.equal(drawn(model(network)), plain)
    found = [get_sampler("dpm_adaptive").function(model(network), NOISE[:1], torch.tensor([2.0, 0.9]), extra_args={
        name: row(each, 0) for name, each in CONDITIONS.items()}, disable=True, seeds=[1])
             for network in (UNET, Reuse(UNET, 3, 2))]
    assert torch.equal(*found)
    assert relative(drawn(model(Reuse(UNET, 3))), plain) > 1e-4


@pytest.mark.parametrize(("every", "uncond", "name", "whole", "part"), [
    (3, 1, "euler", 2 * 2, 4 * 2), (2, 1, "euler", 3 * 2, 3 * 2), (1, 2, "euler", 6 + 3, 0),
    (3, 2, "euler", 2 * 2, 4 + 1), (2, 1, "heun", 3 * 2, 8 * 2)])
def test_how_much_is_worked_out(every: int, uncond: int, name: str, whole: int, part: int) -> None:
    """Rows of whole and partial calls per sample; Heun evaluates a level twice, and both are in one group."""
    counting = Counting()
    handle = UNET.register_forward_pre_hook(counting.count, with_kwargs=True)
    try:
        drawn(model(Reuse(UNET, every, uncond)), name)
    finally:
        handle.remove()
    assert (counting.whole, counting.part) == (2 * whole, 2 * part)


@pytest.mark.parametrize(("name", "rule"), [
    ("dpmpp_2m", CFG(3.0)), ("heun", PAG(CFG(3.0), 2.0, (UNET.places[0],))), ("euler_ancestral_cfg_pp", CFG(0.6)),
    ("dpmpp_2m_sde", Interval(CFG(3.0), 0.2, 3.0)), ("restart", CFG(3.0)), ("euler", SAG(CFG(3.0), 0.75,
                                                                                      place=UNET.places[0]))])
@torch.no_grad()
def test_a_run_is_resumed_bit_for_bit(name: str, rule: Guidance, tmp_path: Path) -> None:
    """At every step, from a file, by a model that was made anew; with a kept picture; without it that is refused."""
    half = torch.zeros(4, 6)
    half[:, 3:] = 1

    def made(network: Any) -> Any:
        how = get_sampler(name)
        return how.walked(Keep(model(network, rule), 0.5 * noise(*SHAPE), Repaint(half)))

    method = get_sampler(name)
    run = Run(method.solver, made(Reuse(UNET, 3, 2)), NOISE, SIGMAS, CONDITIONS, seeds=SEEDS)
    for _ in range(2):
        next(run)
    run.save(tmp_path / "run.safetensors")
    run.advance(len(run))
    x, state = load_run(tmp_path / "run.safetensors")
    assert any(key.startswith("reused.deep.") for key in state)
    again = Run(method.solver, made(Reuse(UNET, 3, 2)), x, None, CONDITIONS, state=state)
    again.advance(len(again))
    assert torch.equal(again.x, run.x) and bool(run.x.isfinite().all())
    forgotten = {key: value for key, value in state.items() if not key.startswith("reused.")}
    other = Run(method.solver, made(Reuse(UNET, 3, 2)), x, None, CONDITIONS, state=forgotten)
    other.advance(len(other))
    assert not torch.equal(other.x, run.x)  # so that the state is what did it
    with pytest.raises(ValueError, match="another reuse"):
        Run(method.solver, made(Reuse(UNET, 2)), x, None, CONDITIONS, state=state)
    with pytest.raises(ValueError, match="reuses of earlier steps"):
        Run(method.solver, lambda x, sigma: x, x, state={**without_history(state), "reused.deep.a.0": x})


@torch.no_grad()
def test_an_interrupted_step_leaves_nothing() -> None:
    network = Reuse(UNET, 2)
    run, whole = (Run(get_sampler("heun").solver, model(network), NOISE, SIGMAS, CONDITIONS, seeds=SEEDS)
                  for _ in range(2))
    next(run)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = UNET.out.register_forward_hook(stopped)
    with pytest.raises(KeyboardInterrupt):
        next(run)
    handle.remove()
    run.advance(len(run))
    whole.advance(len(whole))
    assert torch.equal(run.x, whole.x)


def test_rows_are_their_own_and_calls_may_be_apart() -> None:
    network = Reuse(UNET, 3, 2)
    pair = drawn(model(network), "dpmpp_2m")
    cond = CONDITIONS["cond"]
    alone = get_sampler("dpmpp_2m").function(
        model(network), NOISE[1:], SIGMAS, extra_args={**CONDITIONS, "cond": replace(
            cond, tokens=cond.tokens[1:], mask=None if cond.mask is None else cond.mask[1:])}, disable=True,
        seeds=SEEDS[1:])
    assert relative(alone, pair[1:]) < 1e-4
    apart = GuidedDenoiser(ELLADenoiser(network, TSC), CFG(3.0), together=False)
    assert relative(drawn(apart, "dpmpp_2m"), pair) < 1e-4
    plain = CFGDenoiser(ELLADenoiser(network, TSC))
    assert torch.equal(drawn(plain, "dpmpp_2m", **CONDITIONS, cond_scale=3.0), pair)


def test_segments_reuse_as_much_as_a_run() -> None:
    """Steps that begin anew forget what the method remembers of the steps before, and nothing of the network."""
    calls = list[bool]()
    handle = UNET.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["deep"].features is not None), with_kwargs=True)
    how: dict[str, Any] = {"extra_args": CONDITIONS, "disable": True, "seeds": SEEDS}
    counts = []
    for fresh in ((), range(1, len(SIGMAS) - 1)):
        sample_in_segments("dpmpp_2m", model(Reuse(UNET, 2)), NOISE, SIGMAS, fresh=fresh, **how)
        counts.append((calls.count(False), calls.count(True)))
        calls.clear()
    handle.remove()
    assert counts[0] == counts[1] and counts[0][1] == (len(SIGMAS) - 1) // 2
