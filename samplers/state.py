"""A run's state, a flat dict of tensors: what it begins with, goes on from, and is paused with in a file, bit for bit.

The schedule, the step, the seeds, what x is like, which method it is, and that method's history; and a digest of what
the model is given, its conditions and a picture to keep, without which no run can tell that it goes on with others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ella_kd.files import write_safetensors
from ella_kd.samplers.noise import check_seeds
from ella_kd.samplers.solver import Solver, State

REUSED = "reused."  # begins the keys of what the model keeps of one evaluation for the next ones
GIVEN = "given"  # what the model is given, by its digests
RESERVED = ("sigmas", "step", "seeds", "like", "solver", GIVEN)  # the driver's own keys of a state; the rest is history
FORMAT = "ella_kd run 1"
_X, _STATE = "x", "state."


def save_run(path: str | Path, x: Tensor, state: State) -> None:
    """Writes what `sample` returned, or a Run's x and state. The file appears whole or not at all.

    What is not a tensor (the method and its options, the model, its extra_args, a noise_sampler) is not in it: resume
    with the same ones, or with others to branch (`without_history`). ValueError for a state that no run can go on from,
    OSError that names the file where it cannot be written."""
    missing = {"sigmas", "step"} - state.keys()
    if missing:
        raise ValueError(f"not a run's state: expected the keys 'sigmas' and 'step', got {sorted(state)}")
    tensors = {_X: x, **{_STATE + key: value for key, value in state.items()}}
    copies = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    write_safetensors(path, copies, {"format": FORMAT})


def load_run(path: str | Path, device: torch.device | str = "cpu") -> tuple[Tensor, State]:
    """x on `device`, and the state, from a file that `save_run` wrote: `sample(solver, model, x, state=state)` goes on.

    Raises FileNotFoundError, or ValueError for any other file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no saved run at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"{path} is not a saved run: its metadata do not say format {FORMAT!r}")
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a saved run: {error}") from error
    state = {key.removeprefix(_STATE): value for key, value in tensors.items() if key.startswith(_STATE)}
    if _X not in tensors or not {"sigmas", "step"} <= state.keys():
        raise ValueError(f"{path} is not a whole saved run: it holds {sorted(tensors)}")
    return tensors[_X].to(device), state


def begin(
    solver: Solver, x: Tensor, sigmas: Tensor | None, seeds: Sequence[int] | None, state: State | None
) -> tuple[State, Tensor, int]:
    """The run's state, its whole schedule, and the step it starts at."""
    name = re.sub(r" at 0x[0-9a-f]+", "", repr(solver))  # of a function the address, another in every process
    own = {"like": x.new_empty((0, *x.shape)), "solver": torch.tensor(list(name.encode()), dtype=torch.uint8)}
    if state is None:
        if sigmas is None:
            raise TypeError("sigmas is missing: a run starts from a schedule, or resumes from a state")
        state, start = ({"sigmas": sigmas.detach().clone(), **own} if isinstance(sigmas, Tensor) else {}), 0
    else:
        if "sigmas" not in state or "step" not in state:
            raise ValueError(f"not a run's state: expected the keys 'sigmas' and 'step', got {sorted(state)}")
        if sigmas is not None:
            raise ValueError("a resumed run keeps its own schedule: pass sigmas=None together with state")
        if seeds is not None and "seeds" in state:
            raise ValueError("a resumed run keeps its own seeds: pass seeds=None together with state")
        _check_resumed(state, own)
        state, sigmas, start = {**state, **own}, state["sigmas"], int(state["step"])
    if seeds is not None:
        state["seeds"] = torch.tensor(check_seeds(seeds, len(x)))
    return state, sigmas, start


def without_history(state: State) -> State:
    """A run's state as another method can take it over, or another model: schedule, step and seeds, as after a first
    step."""
    return {key: value for key, value in state.items() if key in RESERVED and key != GIVEN}


def given(digests: Mapping[str, str]) -> Tensor:
    """What the model is given as a state keeps it: uint8, "name=digest" for each."""
    return torch.tensor(list(" ".join(f"{name}={digest}" for name, digest in digests.items()).encode()),
                        dtype=torch.uint8)


def check_given(state: State, digests: Mapping[str, str]) -> None:
    """Raises ValueError for a state of a model that was given something else."""
    before = dict(pair.split("=") for pair in bytes(state[GIVEN].tolist()).decode().split())
    changed = [name for name in {**before, **digests} if before.get(name) != digests.get(name)]
    if changed:
        raise ValueError(
            f"the state is of a run with another {' and another '.join(changed)}: resume with the same, or go on with "
            "this from state=without_history(state)"
        )


def _check_resumed(state: State, own: State) -> None:
    """Raises ValueError for x or a method that is not what the state was made with."""
    before, now = state.get("like", own["like"]), own["like"]
    if before.shape != now.shape or before.dtype != now.dtype:
        raise ValueError(
            f"the state is of a run with x {list(before.shape[1:])} {before.dtype}, got x {list(now.shape[1:])} "
            f"{now.dtype}: resume with the x that came with it"
        )
    step = state["step"]
    if not isinstance(step, Tensor) or step.is_floating_point() or step.numel() != 1 or int(step) < 0:
        raise ValueError(f"a state's step counts the steps done, a tensor of one whole number, 0 or more, got {step}")
    begun, solver = (bytes(s.get("solver", own["solver"]).tolist()).decode() for s in (state, own))
    history = sorted(key for key in state.keys() - set(RESERVED) if not key.startswith(REUSED))
    if history and begun != solver:
        raise ValueError(
            f"the state holds the history ({', '.join(history)}) of {begun}, got {solver}: resume with the same "
            "method, or go on with another from state=without_history(state)"
        )
