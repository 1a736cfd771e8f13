"""A network of a file's shapes, filled with its tensors one by one: straight to device and dtype, about one copy."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ella_kd.models.files.layout import Part
from ella_kd.models.shapes import Shapes

Model = TypeVar("Model", bound=nn.Module)


def build(make: Callable[..., Model], part: Part, told: str, *about: object) -> Model:
    """`make(part, *about)` without numbers, on the meta device. Raises ValueError for shapes of something else."""
    try:
        with torch.device("meta"):
            return make(part, *about)
    except ValueError as error:
        raise ValueError(f"{told}, at {part.prefix or 'the top'}: {error}") from error


def fill(model: Model, part: Part, told: str, dtype: torch.dtype, device: torch.device) -> Model:
    """The network with the file's tensors, in eval mode and without gradients.

    Every tensor must be there, once, with its shape, as finite floats: ValueError names the first that are not.
    """
    names = {plain(name): name for name in model.state_dict()}
    refuse(problems(model, part), told)
    tensors = {names[name]: _read(part, name, dtype, device) for name in part.sources}
    model.load_state_dict(tensors, assign=True)
    for module in model.modules():
        ids: Any = getattr(module, "position_ids", None)
        if ids is not None:  # a buffer that no file needs to hold, so it is still on meta
            module.position_ids = torch.arange(ids.shape[-1], device=device)[None]
    return model.eval().requires_grad_(False)


def plain(name: str) -> str:
    """A CLIP tensor's name without the `text_model.` that some versions of transformers put first."""
    return name.removeprefix("text_model.")


def problems(model: nn.Module, part: Part) -> list[str]:
    """What is missing, misshapen or unexpected among a network's tensors, by the file's names."""
    expected = {plain(name): x.shape for name, x in model.state_dict().items()}
    told = part.spelled([*expected, *part.shapes])
    return disagreements({told[name]: shape for name, shape in expected.items()},
                         {told[name]: shape for name, shape in part.shapes.items()})


def disagreements(expected: Shapes, got: Shapes) -> list[str]:
    found = [f"missing: {name} {list(expected[name])}" for name in expected if name not in got]
    found += [f"misshapen: {name} is {list(got[name])}, must be {list(expected[name])}"
              for name in expected if name in got and tuple(got[name]) != tuple(expected[name])]
    return found + [f"unexpected: {name} {list(got[name])}" for name in got if name not in expected]


def refuse(found: list[str], told: str) -> None:
    """Raise ValueError naming the first tensors that do not agree."""
    if found:
        more = f"\n  and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(f"{told}:\n  " + "\n  ".join(found[:5]) + more)


def check_dtypes(part: Part) -> None:
    """Raises ValueError naming the first tensor that holds no floats, or floats that torch cannot cast."""
    path, dtypes = part.weights.path, part.weights.dtypes
    for source in part.sources.values():
        if not _castable(dtypes[source.name]):
            kind = str(dtypes[source.name]).removeprefix("torch.")
            raise ValueError(f"{path}: the weights {source.name} are {kind}, expected floats; use the float16 or "
                             "float32 version of this model")


def _read(part: Part, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    stored = part.read(name)
    x = stored.to(device, dtype)
    if x.numel() and not all(each.isfinite() for each in x.aminmax()):
        where = f"{part.weights.path}: the weights {part.sources[name].name}"
        if stored.double().isfinite().all():
            raise ValueError(f"{where} do not fit {str(dtype).removeprefix('torch.')}: load this model in float32 or "
                             "bfloat16")
        raise ValueError(f"{where} hold NaN or infinity: the file is damaged or its training failed, fetch another")
    return x


@cache
def _castable(dtype: torch.dtype | None) -> bool:
    if dtype is None or not dtype.is_floating_point:
        return False
    try:
        torch.zeros(1, dtype=dtype).float()
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return True

