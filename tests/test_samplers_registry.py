"""One's own sampler, Solver, plain function and schedule: registered by one call, and known everywhere."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from ella_kd import Pipeline, draw
from ella_kd.cli import main
from ella_kd.samplers import (
    SAMPLERS,
    SCHEDULES,
    Run,
    Solver,
    Step,
    get_sampler,
    get_schedule,
    get_sigmas_karras,
    sample,
    sample_euler,
    sample_euler_ancestral,
    sampler,
    schedule,
)
from ella_kd.samplers.solver import State
from ella_kd.samplers.upstream import k_diffusion
from mixtures import Guided, Pointwise, randn

SIGMAS = get_sigmas_karras(5, 0.03, 14.6)


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    before = {*SAMPLERS, *SCHEDULES}
    yield
    for table in (SAMPLERS, SCHEDULES):
        for name in [name for name in table if name not in before]:
            table.pop(name)


@dataclass(frozen=True)
class Share(Solver[float]):
    """Goes that share of the way to D, whatever sigma says: a toy."""

    strength: float = 1.0
    order = 1
    evals = 1

    def between(self, s: float, t: float, n: int) -> Step[float]:
        return Step((s,), self.strength * (s - t) / s)

    def step(self, c: Step[float], x: Tensor, state: Any, evaluate: Any, noise: Any) -> tuple[Tensor, State]:
        return x + c.weights * (evaluate(x, c.evals[0]) - x), {}


def known(name: str, pipeline: Pipeline) -> Tensor:
    """What the sampler of that name makes, seen in the table, the command and a picture."""
    assert get_sampler(name) is SAMPLERS[name]
    assert name in CliRunner().invoke(main, ["samplers"]).output
    cond, uncond = pipeline.encode("a red circle"), pipeline.encode("")
    scale = 0.7 if SAMPLERS[name].cfg_pp else 3.0
    (picture,) = draw(pipeline, cond, uncond=uncond, guidance=scale, sampler=name, steps=3, seeds=[4], progress=False)
    assert picture.size == (16, 16)
    x = randn(2, 3, 4, 4) * 14.6
    args = {"cond_scale": 0.7}
    drawn: Tensor = get_sampler(name).function(Pointwise(), x, SIGMAS, args, None, True, seeds=[1, 2])
    return drawn


def test_a_function_with_a_solver_gets_its_cfg_pp_form(pipeline: Pipeline) -> None:
    @sampler(Share(), "toys")
    def sample_share(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None,
        disable: bool | None = None, strength: float = 1.0, *, seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """A toy (2403.05135)."""
        return sample(Share(strength), model, x, sigmas, extra_args, callback, disable, seeds=seeds)[0]

    euler = sample_euler(Pointwise(), randn(2, 3, 4, 4) * 14.6, SIGMAS, {"cond_scale": 0.7}, disable=True)
    torch.testing.assert_close(known("share", pipeline), euler)
    row, form = SAMPLERS["share"], SAMPLERS["share_cfg_pp"]
    assert (row.order, row.evals, row.stochastic, row.family, form.cfg_pp) == (1, 1, False, "toys", True)
    torch.testing.assert_close(known("share_cfg_pp", pipeline), SAMPLERS["euler_cfg_pp"].function(
        Pointwise(), randn(2, 3, 4, 4) * 14.6, SIGMAS, {"cond_scale": 0.7}, None, True))
    run = Run(get_sampler("share").solver, Pointwise(), randn(2, 3, 4, 4) * 14.6, SIGMAS, {"cond_scale": 0.7})
    assert len(list(run)) == 5
    torch.testing.assert_close(run.x, euler)
    with pytest.raises(ValueError, match=r"'euler' is the name of another \(ella_kd.samplers.euler\)"):
        sampler(Share(), name="euler")(sample_share)


def test_a_solvers_class_alone(pipeline: Pipeline) -> None:
    sampler(name="share", family="toys")(Share)
    half = SAMPLERS["share"].function(Pointwise(), randn(2, 3, 4, 4), SIGMAS, disable=True, strength=0.5)
    assert not torch.equal(half, SAMPLERS["share"].function(Pointwise(), randn(2, 3, 4, 4), SIGMAS, disable=True))
    euler = sample_euler(Pointwise(), randn(2, 3, 4, 4) * 14.6, SIGMAS, {"cond_scale": 0.7}, disable=True)
    torch.testing.assert_close(known("share", pipeline), euler)
    known("share_cfg_pp", pipeline)
    assert SAMPLERS["share"].function.__doc__ == Share.__doc__


def test_a_plain_function_of_k_diffusion_s(pipeline: Pipeline) -> None:
    """It knows no seeds, so its noise sampler is made of them; it has no Solver, so Run and CFG++ are not for it."""
    theirs: Callable[..., Tensor] = k_diffusion().sampling.sample_euler_ancestral
    sampler(name="theirs", family="k-diffusion", evals=1, noise="normal")(theirs)
    row = SAMPLERS["theirs"]
    assert (row.order, row.evals, row.stochastic, "theirs_cfg_pp" in SAMPLERS) == (None, 1, True, False)
    x = randn(2, 3, 4, 4) * 14.6
    ours = sample_euler_ancestral(Pointwise(), x, SIGMAS, {"cond_scale": 0.7}, disable=True, seeds=[1, 2])
    torch.testing.assert_close(known("theirs", pipeline), ours)
    with pytest.raises(ValueError, match="theirs is a plain function without a Solver"):
        Run(row.solver, Pointwise(), x, SIGMAS)


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
def test_what_takes_a_range_takes_a_schedule_s(name: str) -> None:
    row, x = get_sampler(name), randn(2, 3, 4, 4) * 14.6
    ours = row.function(Guided(), x, SIGMAS, None, None, True, seeds=[1, 2], eta=1.0)
    theirs = getattr(k_diffusion().sampling, f"sample_{name}")
    more: tuple[Any, ...] = (5,) if name == "dpm_fast" else ()
    expected = theirs(Guided(), x, float(SIGMAS[-2]), float(SIGMAS[0]), *more, disable=True)
    again = row.function(Guided(), x, SIGMAS, disable=True)
    assert not torch.equal(ours, again)
    if name == "dpm_fast":
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="without a Solver"):
        _ = row.solver


def test_schedules_by_what_they_need_of_a_denoiser(pipeline: Pipeline) -> None:
    @schedule("even in sigma")
    def get_sigmas_even(n: int, sigma_min: float, sigma_max: float, device: str = "cpu") -> Tensor:
        return torch.cat([torch.linspace(sigma_max, sigma_min, n), torch.zeros(1)]).to(device)

    @schedule("the last n of the table")
    def get_sigmas_low(n: int, model: Any) -> Tensor:
        return torch.cat([model.sigmas[:n].flip(0), torch.zeros(1, dtype=model.sigmas.dtype)])

    @schedule("powers of two")
    def get_sigmas_powers(n: int, last: float = 0.1) -> Tensor:
        return torch.tensor([last * 2.0 ** (n - k) for k in range(n)] + [0.0])

    class Denoiser:
        sigmas = torch.linspace(0.1, 9.0, 50)
        sigma_min, sigma_max = 0.1, 9.0

    assert SCHEDULES["even"].sigmas(3, Denoiser()).tolist() == pytest.approx([9.0, 4.55, 0.1, 0.0])
    low = [*Denoiser.sigmas[:2].flip(0).tolist(), 0.0]
    assert SCHEDULES["low"].sigmas(2, Denoiser()).tolist() == pytest.approx(low)
    assert get_schedule("powers").sigmas(2, Denoiser()).tolist() == pytest.approx([0.4, 0.2, 0.0])
    listed = CliRunner().invoke(main, ["samplers"]).output
    assert "powers of two" in listed
    for name in ("even", "powers"):
        assert len(draw(pipeline, pipeline.encode("a"), uncond=pipeline.encode(""), schedule=name, steps=2,
                        progress=False)) == 1
    get_sigmas_even.__name__ = "get_sigmas_karras"
    with pytest.raises(ValueError, match="'karras' is the name of another"):
        schedule("mine")(get_sigmas_even)
