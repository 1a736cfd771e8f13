"""Parameters of modules: set to zero, shared by two, moved; and what a network with other weights was made of."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def zero_init(layer: nn.Module) -> nn.Module:
    """The same layer with its parameters at zero: a residual branch that starts as the identity (LDM's zero_module)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def sharing(module: M) -> M:
    """Another module on the same tensors, to be changed or compiled while this one stays as it is."""
    return copy.deepcopy(module, {id(x): x for x in [*module.parameters(), *module.buffers()]})


def moved(module: M, device: str | torch.device | None, dtype: torch.dtype | None) -> M:
    """A copy of the module there; tensors that need no change are shared, which stays below two copies in memory."""
    def there(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

    memo: dict[int, Any] = {id(x): nn.Parameter(there(x.data), x.requires_grad) for x in module.parameters()}
    memo |= {id(x): there(x) for x in module.buffers()}
    return copy.deepcopy(module, memo)


@dataclass(frozen=True, eq=False)
class Recipe:
    """What a network was made of: plain weights, changes of them, and what was then done for speed.

    Networks are made of networks by twins, none of which is changed; each twin keeps this, so that changes are always
    made of the plain weights, and `with_lora` and `fast_on_cpu` commute.
    """

    plain: nn.Module
    changes: tuple[Any, ...] = ()
    finish: tuple[Callable[[Any], Any], ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recipe":
        return self

    def on(self, twin: M) -> M:
        """The twin, which keeps this recipe; it is no module or parameter of it."""
        vars(twin)["recipe"] = self
        return twin

    @classmethod
    def of(cls, module: nn.Module) -> "Recipe":
        """A network's own, or that of a plain one."""
        return vars(module).get("recipe") or cls(module)
