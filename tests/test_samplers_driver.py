"""The driver: callback, pause and resume, batches, NaN reports, no waiting for the device, and bad input."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ella_kd.samplers import (
    DPM2,
    SAMPLERS,
    DPMpp2M,
    DPMpp2SAncestral,
    Euler,
    EulerAncestral,
    Heun,
    Solver,
    get_sigmas_karras,
    sample,
    sample_euler,
    sample_heun,
    without_history,
)
from mixtures import Guided, Pointwise, named, randn
from oracles import events_of

SOLVERS: list[tuple[Solver, bool]] = [
    (Heun(s_churn=3.0), False),
    (DPM2(), False),
    (DPMpp2SAncestral(), False),
    (DPMpp2M(eta=0.5, solver_type="heun"), False),
    (SAMPLERS["restart"].solver, True),
    (DPMpp2M(), True),
]
each_solver = pytest.mark.parametrize(("solver", "cfg_pp"), SOLVERS, ids=named)
SIGMAS = get_sigmas_karras(6, 0.03, 14.6)
ARGS = {"cond_scale": 0.7}


def latents(rows: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows, 3, 5, 3]: a row is no multiple of a vector register, so that a fused tail would show."""
    return randn(rows, 3, 5, 3).to(dtype) * 14.6


@pytest.fixture
def model() -> Pointwise:
    return Pointwise()


def test_state_survives_a_file_and_unnamed_seeds(model: Pointwise, tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole, _ = sample(DPMpp2M(eta=1.0), model, latents(), SIGMAS, ARGS, disable=True)
    torch.manual_seed(3)
    x, state = sample(DPMpp2M(eta=1.0), model, latents(), SIGMAS, ARGS, disable=True, stop=3)
    save_file({"x": x, **state}, tmp_path / "run.safetensors")
    loaded = load_file(tmp_path / "run.safetensors")
    x = loaded.pop("x")
    again, _ = sample(DPMpp2M(eta=1.0), model, x, None, ARGS, disable=True, state=loaded)
    assert torch.equal(again, whole)


def test_planning_covers_the_whole_schedule_after_a_resume(guided: Guided) -> None:
    x, state = sample(DPM2(), guided, latents(), SIGMAS, disable=True, stop=4)
    sample(DPM2(), guided, x, state=state, disable=True)
    first, second = guided.plans
    assert first == second
    assert len(first) == len(DPM2().eval_sigmas(SIGMAS))


@each_solver
def test_planned_equals_unplanned(solver: Solver, cfg_pp: bool, guided: Guided) -> None:
    """Solvers walk the same whether or not the model plans; Guided asserts that each sigma is in its plan."""
    planned, _ = sample(solver, guided, latents(), SIGMAS, ARGS, disable=True, seeds=[1, 2], cfg_pp=cfg_pp)

    class Unplanned:
        def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
            denoised: Tensor = guided(x, sigma, **kwargs)
            return denoised

        def predict(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Any:
            return guided.predict(x, sigma, **kwargs)

    bare, _ = sample(solver, Unplanned(), latents(), SIGMAS, ARGS, disable=True, seeds=[1, 2], cfg_pp=cfg_pp)
    assert len(guided.plans) == 1
    assert torch.equal(planned, bare)


def test_callback_keys_x_before_the_step_and_sigmas(model: Pointwise) -> None:
    records: list[dict[str, Any]] = []
    x = latents()
    sample_euler(model, x, SIGMAS, ARGS, records.append, True)
    assert [list(record) for record in records] == [["x", "i", "sigma", "sigma_hat", "denoised", "nfe"]] * 6
    assert torch.equal(records[0]["x"], x)
    assert [record["i"] for record in records] == list(range(6))
    for i, record in enumerate(records):
        assert record["sigma"].ndim == record["sigma_hat"].ndim == 0
        assert record["sigma"] == record["sigma_hat"] == SIGMAS[i]
        assert torch.equal(record["denoised"], model(record["x"], SIGMAS[i].expand(2), **ARGS))


def test_progress_bar(model: Pointwise, capsys: pytest.CaptureFixture[str]) -> None:
    sample(Euler(), model, latents(), SIGMAS, ARGS, disable=False)
    assert "6/6" in capsys.readouterr().err
    sample(Euler(), model, latents(), SIGMAS, ARGS, disable=True)
    sample(Euler(), model, latents(), SIGMAS, ARGS)  # None: hidden, since this is no terminal
    assert capsys.readouterr().err == ""


class Failing:
    """Denoised is 0, save for two values at the k-th evaluation."""

    def __init__(self, k: int, value: float) -> None:
        self.k, self.value, self.calls = k, value, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        denoised = torch.zeros_like(x)
        if self.calls == self.k:
            denoised[0, 0, 0, :2] = self.value
        self.calls += 1
        return denoised


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_from_the_model_names_step_and_sigma(value: float) -> None:
    message = rf"2 NaN or Inf values at step 2 of 6 \(sigma {float(SIGMAS[2]):g}\)"
    with pytest.raises(ValueError, match=message):
        sample_euler(Failing(2, value), latents(), SIGMAS, disable=True)
    with pytest.raises(ValueError, match=rf"step 1 of 6 \(sigma {float(SIGMAS[2]):g}\)"):  # Heun's second evaluation
        sample_heun(Failing(3, value), latents(), SIGMAS, disable=True)


def test_nan_stops_a_run_that_has_a_callback() -> None:
    model = Failing(2, math.nan)
    steps: list[int] = []
    with pytest.raises(ValueError, match="step 2 of 6"):
        sample_euler(model, latents(), SIGMAS, None, lambda record: steps.append(record["i"]), True)
    assert steps == [0, 1]
    assert model.calls == 3


def test_nan_in_a_paused_run_is_reported_at_the_pause() -> None:
    with pytest.raises(ValueError, match="step 2 of 6"):
        sample(Euler(), Failing(2, math.nan), latents(), SIGMAS, disable=True, stop=3)


def test_the_no_wait_test_sees_what_it_should(model: Pointwise) -> None:
    """k-diffusion's Euler compares sigma tensors on every step; so does a callback that reads."""
    from ella_kd.samplers.upstream import k_diffusion

    def upstream(spy: Any) -> None:
        k_diffusion().sampling.sample_euler(spy, latents(), SIGMAS, ARGS, disable=True)

    assert "__bool__" in events_of(upstream, model)

    def reading(spy: Any) -> None:
        sample_euler(spy, latents(), SIGMAS, ARGS, lambda record: float(record["denoised"].mean()), True)

    assert "_local_scalar_dense" in events_of(reading, model)


def nan_at_1(values: list[float]) -> Tensor:
    return torch.tensor([values[0], math.nan, *values[2:]])


BAD_SIGMAS = [
    (torch.tensor([1.0]), ValueError, "at least 2"),
    (torch.tensor([]), ValueError, "at least 2"),
    (torch.tensor([[2.0, 1.0]]), ValueError, "1-D"),
    (torch.tensor(1.0), ValueError, "1-D"),
    (nan_at_1([3.0, 2.0, 1.0]), ValueError, r"sigmas\[1\] = nan"),
    (torch.tensor([math.inf, 1.0]), ValueError, r"sigmas\[0\] = inf"),
    (torch.tensor([2.0, -1.0]), ValueError, r"sigmas\[1\] = -1"),
    (torch.tensor([2.0, 0.0, 0.0]), ValueError, "only the last sigma may be 0"),
    (torch.tensor([0.0, 1.0]), ValueError, "only the last sigma may be 0"),
    (torch.tensor([3.0, 2.0, 2.0, 1.0]), ValueError, "strictly decreasing"),
    (torch.tensor([3.0, 1.0, 2.0]), ValueError, "strictly decreasing"),
    (torch.tensor([1.0, 2.0, 1.5]), ValueError, "strictly decreasing"),
    (torch.tensor([3, 2, 1]), TypeError, "tensor of floats"),
    ([3.0, 2.0, 1.0], TypeError, "tensor of floats"),
    (None, TypeError, "sigmas is missing"),
    (torch.tensor([1.0, 1e-60], dtype=torch.float64), ValueError, "representable"),
]


@pytest.mark.parametrize(("sigmas", "error", "message"), BAD_SIGMAS, ids=lambda value: str(value)[:40])
def test_bad_schedules(sigmas: Any, error: type[Exception], message: str, model: Pointwise) -> None:
    with pytest.raises(error, match=message):
        sample_euler(model, latents(), sigmas, ARGS, disable=True)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 5, 3), ValueError, r"\[B, C, h, w\], got shape \[3, 5, 3\]"),
        (torch.zeros(1, 1, 3, 5, 3), ValueError, r"\[B, C, h, w\]"),
        (torch.zeros(0, 3, 5, 3), ValueError, r"\[B, C, h, w\]"),
        (torch.zeros(1, 3, 5, 3, dtype=torch.float16), TypeError, "float32 or float64"),
        (torch.zeros(1, 3, 5, 3, dtype=torch.int64), TypeError, "float32 or float64"),
        (torch.full((1, 3, 5, 3), math.nan), ValueError, "before the first step"),
        ([[1.0]], TypeError, "tensor of latents"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_latents(x: Any, error: type[Exception], message: str, model: Pointwise) -> None:
    with pytest.raises(error, match=message):
        sample_euler(model, x, SIGMAS, ARGS, disable=True)


def test_bad_models(model: Pointwise) -> None:
    for returned, message in (
        (lambda x: x[:1], r"denoised like x, \[2, 3, 5, 3\] torch.float32, got \[1, 3, 5, 3\]"),
        (lambda x: x.half(), "got .* torch.float16"),
        (lambda x: None, "got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_euler(lambda x, sigma, f=returned: f(x), latents(), SIGMAS, disable=True)
    with pytest.raises(TypeError, match="model must be callable"):
        sample_euler("unet", latents(), SIGMAS, disable=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="extra_args must be a dict"):
        sample_euler(model, latents(), SIGMAS, [1], disable=True)  # type: ignore[arg-type]


def test_bad_churn_and_solver_type(model: Pointwise) -> None:
    with pytest.raises(ValueError, match="s_churn must be"):
        sample_heun(model, latents(), SIGMAS, ARGS, disable=True, s_churn=-1.0)
    with pytest.raises(ValueError, match="'midpoint' or 'heun', got 'euler'"):
        DPMpp2M(solver_type="euler")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ascending"):
        sample_heun(model, latents(), torch.tensor([0.1, 1.0]), ARGS, disable=True, s_churn=1.0)


def test_bad_resumes(model: Pointwise) -> None:
    x, state = sample(EulerAncestral(), model, latents(), SIGMAS, ARGS, disable=True, seeds=[1, 2], stop=3)

    def resume(**changes: Any) -> None:
        sample(EulerAncestral(), model, x, extra_args=ARGS, disable=True, **{"state": state, **changes})

    with pytest.raises(ValueError, match="its own schedule"):
        resume(sigmas=SIGMAS)
    with pytest.raises(ValueError, match="its own seeds"):
        resume(seeds=[1, 2])
    with pytest.raises(ValueError, match="starts before step 3 cannot stop before step 3"):
        resume(stop=3)
    with pytest.raises(ValueError, match="cannot stop before step 7"):
        resume(stop=7)
    with pytest.raises(ValueError, match="not a run's state"):
        resume(state={"x": x})
    with pytest.raises(ValueError, match="holds no seeds"):
        resume(state={key: value for key, value in state.items() if key != "seeds"})
    for other in (x[:1], x[:, :, :1], x.double(), torch.cat([x, x])):
        with pytest.raises(ValueError, match=r"the state is of a run with x \[2, 3, .* resume with the x"):
            sample(EulerAncestral(), model, other, extra_args=ARGS, disable=True, state=state)
    for step in (torch.tensor(-1), torch.tensor(1.7), 1):
        with pytest.raises(ValueError, match="a tensor of one whole number, 0 or more, got"):
            resume(state={**state, "step": step})


def test_another_method_goes_on_without_the_history(model: Pointwise) -> None:
    x, state = sample(DPMpp2M(), model, latents(), SIGMAS, ARGS, disable=True, stop=3)
    with pytest.raises(ValueError, match=r"history \(denoised_1\) of DPMpp2M\(eta=0.0, .* got DPMpp2M\(eta=1.0"):
        sample(DPMpp2M(eta=1.0), model, x, None, ARGS, disable=True, state=state)
    fresh, _ = sample(DPMpp2M(), model, x, SIGMAS[3:], ARGS, disable=True)
    other, _ = sample(DPMpp2M(solver_type="heun"), model, x, None, ARGS, disable=True, state=without_history(state))
    again, _ = sample(DPMpp2M(solver_type="heun"), model, x, SIGMAS[3:], ARGS, disable=True)
    assert torch.allclose(other, again) and not torch.allclose(other, fresh)


def test_a_noise_sampler_of_another_dtype_leaves_x_its_own(model: Pointwise) -> None:
    out, _ = sample(EulerAncestral(), model, latents(), SIGMAS, ARGS, disable=True,
                    noise_sampler=lambda s, t: torch.ones_like(latents(), dtype=torch.float64))
    assert out.dtype == torch.float32
