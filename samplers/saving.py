"""A paused run in a safetensors file: x, the schedule, the step, the seeds and the method's history, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ella_kd.files import write_safetensors
from ella_kd.samplers.solver import State

FORMAT = "ella_kd run 1"
_X, _STATE = "x", "state."


def save_run(path: str | Path, x: Tensor, state: State) -> None:
    """Writes what `sample` returned, or a Run's x and state. The file appears whole or not at all.

    What is not a tensor (the method and its options, the model, its extra_args, a noise_sampler) is not in it: resume
    with the same ones, or with others to branch. ValueError for a state that no run can go on from, OSError that names
    the file where it cannot be written."""
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
