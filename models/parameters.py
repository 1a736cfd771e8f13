"""Parameters of modules: set to zero, or shared by two."""

import copy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def zero_init(layer: nn.Module) -> nn.Module:
    """The same layer with its parameters at zero: a residual branch that starts as the identity (LDM's zero_module)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def sharing(module: M) -> M:
    """Another module on the same tensors, to be changed or compiled while this one stays as it is."""
    return copy.deepcopy(module, {id(x): x for x in [*module.parameters(), *module.buffers()]})
