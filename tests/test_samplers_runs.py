"""A run step by step: the iterator, its records, files, branches, Ctrl-C, and the warnings' and counts' truth."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ella_kd.samplers import (
    SAMPLERS,
    DPMpp2M,
    Euler,
    EulerAncestral,
    Heun,
    Interrupted,
    Run,
    Sampler,
    get_sigmas_karras,
    load_run,
    sample,
    sample_euler,
    save_run,
    without_history,
)
from ella_kd.samplers.cfg_pp import CFGpp
from mixtures import Guided, Pointwise, randn

SIGMAS = get_sigmas_karras(6, 0.03, 14.6)
ARGS = {"cond_scale": 0.7}
ROWS = [SAMPLERS[name] for name in ("dpmpp_2m_sde", "lms", "sa_solver_pece", "uni_pc", "restart", "heun_cfg_pp")]
each_sampler = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


def latents(rows: int = 2) -> Tensor:
    return randn(rows, 3, 5, 3) * 14.6


def start(row: Sampler, model: Any, **options: Any) -> Run:
    return Run(row.solver, model, latents(), SIGMAS, ARGS, seeds=[7, 8], cfg_pp=row.cfg_pp, **options)


@each_sampler
def test_saved_anywhere_and_resumed_is_the_whole_run_bitwise(row: Sampler, tmp_path: Path) -> None:
    model = Pointwise()
    whole = list(start(row, model))[-1]
    run = start(row, model)
    for _ in run:
        if not len(run):
            break
        run.save(tmp_path / "run.safetensors")
        x, state = load_run(tmp_path / "run.safetensors")
        again = Run(row.solver, model, x, None, ARGS, cfg_pp=row.cfg_pp, state=state)
        *_, last = again
        assert last.keys() == whole.keys()
        for key, value in whole.items():
            assert torch.equal(torch.as_tensor(last[key]), torch.as_tensor(value)), (key, run.step)
        if len(run) == 1:
            final = again.x
    assert torch.equal(run.x, final)
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


def test_callback_counts_evaluations_so_far(guided: Guided) -> None:
    records: list[dict[str, Any]] = []
    sample(Heun(), guided, latents(), SIGMAS, ARGS, records.append, True)
    assert [record["nfe"] for record in records] == [1, 3, 5, 7, 9, 11]
    x, state = sample(Heun(), guided, latents(), SIGMAS, ARGS, disable=True, stop=4)
    sample(Heun(), guided, x, None, ARGS, records.append, True, state=state)
    assert [record["nfe"] for record in records[6:]] == [9, 11]


def test_a_run_branches_without_touching_the_first(guided: Guided) -> None:
    run = Run(DPMpp2M(), guided, latents(), SIGMAS, ARGS)
    next(run), next(run)
    branch = Run(Euler(), guided.cond, run.x, state=without_history(run.state))
    other = [record["denoised"] for record in branch]
    assert len(other) == 4
    *_, _ = run
    whole, _ = sample(DPMpp2M(), guided, latents(), SIGMAS, ARGS, disable=True)
    assert torch.equal(run.x, whole) and not torch.equal(run.x, branch.x)


def test_stop_and_one_step_schedules(guided: Guided) -> None:
    run = Run(EulerAncestral(), guided, latents(), SIGMAS, seeds=[1, 2], stop=2)
    assert len(list(run)) == 2 and run.step == 2 and run.total == 6
    one = Run(EulerAncestral(), guided, latents(), torch.tensor([14.6, 0.0]))
    assert [record["nfe"] for record in one] == [1]


class Stopped:
    """The model of a run whose user presses Ctrl-C in the k-th evaluation."""

    def __init__(self, k: int) -> None:
        self.k, self.model = k, Pointwise()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.k -= 1
        if self.k < 0:
            raise KeyboardInterrupt
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("solver", [Euler(), Heun(s_churn=2.0), DPMpp2M(eta=1.0)], ids=repr)
@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_ctrl_c_leaves_a_state_that_resumes_bitwise(solver: Any, k: int) -> None:
    whole, end = sample(solver, Pointwise(), latents(), SIGMAS, ARGS, disable=True, seeds=[1, 2])
    with pytest.raises(KeyboardInterrupt, match=r"interrupted after \d of 6 steps") as caught:
        sample(solver, Stopped(k), latents(), SIGMAS, ARGS, disable=True, seeds=[1, 2])
    error = caught.value
    assert isinstance(error, Interrupted)
    assert int(error.state["step"]) == (k // 2 if isinstance(solver, Heun) else k)
    x, state = sample(solver, Pointwise(), error.x, None, ARGS, disable=True, state=error.state)
    assert torch.equal(x, whole) and all(torch.equal(state[key], end[key]) for key in end)
    stopped = Stopped(k)
    run = Run(solver, stopped, latents(), SIGMAS, ARGS, seeds=[1, 2])
    with pytest.raises(KeyboardInterrupt):
        list(run)
    stopped.k = 99  # the user lets go of the keys
    *_, _ = run
    assert torch.equal(run.x, whole)


def test_ctrl_c_reaches_the_caller_of_any_sampler() -> None:
    with pytest.raises(Interrupted) as caught:
        sample_euler(Stopped(2), latents(), SIGMAS, ARGS, disable=True)
    x, _ = sample(Euler(), Pointwise(), caught.value.x, None, ARGS, disable=True, state=caught.value.state)
    assert torch.equal(x, sample_euler(Pointwise(), latents(), SIGMAS, ARGS, disable=True))


def test_nothing_is_drawn_or_tracked_for_gradients(guided: Guided) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run = Run(Heun(), guided, latents().requires_grad_(), SIGMAS)
    for record in run:
        assert not record["denoised"].requires_grad and not run.x.requires_grad
    assert torch.equal(before, torch.get_rng_state())


def test_cfg_pp_runs_by_flag_or_by_model(guided: Guided) -> None:
    flag = Run(DPMpp2M(), guided, latents(), SIGMAS, ARGS, cfg_pp=True)
    view = Run(DPMpp2M(), CFGpp(guided), latents(), SIGMAS, ARGS)
    for a, b in zip(flag, view):
        assert torch.equal(a["denoised"], b["denoised"]) and a["w"] == b["w"]
    assert torch.equal(flag.x, view.x)


def test_files_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no saved run at"):
        load_run(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="metadata do not say format"):
        load_run(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no safetensors file")
    with pytest.raises(ValueError, match="is not a saved run"):
        load_run(tmp_path / "text.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "part.safetensors", {"format": "ella_kd run 1"})
    with pytest.raises(ValueError, match="not a whole saved run"):
        load_run(tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="'sigmas' and 'step', got"):
        save_run(tmp_path / "bad.safetensors", torch.zeros(1), {"seeds": torch.zeros(1)})
    (tmp_path / "folder.safetensors").mkdir()
    _, state = sample(Euler(), Pointwise(), latents(), SIGMAS, ARGS, disable=True, stop=2)
    with pytest.raises(OSError, match=r"folder\.safetensors"):
        save_run(tmp_path / "folder.safetensors", latents(), state)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_what_is_saved_may_share_memory_or_be_a_view(tmp_path: Path) -> None:
    x = latents()
    state = {"sigmas": SIGMAS, "step": torch.tensor(2), "old": x, "older": x.transpose(2, 3)}
    save_run(tmp_path / "run.safetensors", x, state)
    loaded, again = load_run(str(tmp_path / "run.safetensors"))
    assert torch.equal(loaded, x) and again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
