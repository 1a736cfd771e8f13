"""An architecture read off the shapes of a file's tensors."""

from collections.abc import Iterable, Mapping, Sequence

Shape = Sequence[int]
Shapes = Mapping[str, Shape]  # tensor name -> shape


def shape_of(shapes: Shapes, name: str, ndim: int) -> Sequence[int]:
    """A shape that tells the architecture. Raises ValueError if the tensor is missing or not of ndim dimensions."""
    if name not in shapes:
        raise ValueError(f"tensor {name} is missing")
    if len(shapes[name]) != ndim:
        raise ValueError(f"tensor {name} must have {ndim} dimensions, its shape is {list(shapes[name])}")
    return shapes[name]


def count_of(names: Iterable[str], prefix: str) -> int:
    """How many of `prefix.0.*`, `prefix.1.*`, ... there are, without a gap; a hundred (a bad file) are enough."""
    start = len(prefix) + 1
    found = {name[start:].partition(".")[0] for name in names if name.startswith(f"{prefix}.")}
    n = 0
    while n < 100 and str(n) in found:
        n += 1
    return n
