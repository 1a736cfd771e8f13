"""An architecture read off the shapes of a file's tensors."""

from collections.abc import Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]  # tensor name -> shape


def shape_of(shapes: Shapes, name: str, ndim: int) -> Sequence[int]:
    """A shape that tells the architecture. Raises ValueError if the tensor is missing or not of ndim dimensions."""
    if name not in shapes:
        raise ValueError(f"tensor {name} is missing")
    if len(shapes[name]) != ndim:
        raise ValueError(f"tensor {name} must have {ndim} dimensions, its shape is {list(shapes[name])}")
    return shapes[name]


def count_of(shapes: Shapes, prefix: str) -> int:
    """How many of `prefix.0.*`, `prefix.1.*`, ... there are, without a gap."""
    n = 0
    while any(name.startswith(f"{prefix}.{n}.") for name in shapes):
        n += 1
    return n
