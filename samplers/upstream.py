"""The real k-diffusion package: its samplers, schedules and denoisers, by whatever way it can be imported.

`import k_diffusion` fails on many machines, because it pulls in clip, wandb, torchvision and more; its modules
sampling, external and utils need none of those, so they are loaded alone where the whole does not import.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import NoReturn

_PRIVATE = "_ella_kd_k_diffusion"
_MODULES = ("sampling", "external", "utils")
_STAND_IN = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


@dataclass(frozen=True)
class Upstream:
    """k_diffusion.sampling, k_diffusion.external and k_diffusion.utils."""

    sampling: ModuleType
    external: ModuleType
    utils: ModuleType


@functools.cache
def k_diffusion() -> Upstream:
    """The installed k-diffusion's own modules; ModuleNotFoundError says what to install if it is absent."""
    before = set(sys.modules)
    try:
        return Upstream(*(importlib.import_module(f"k_diffusion.{name}") for name in _MODULES))
    except Exception:  # not ImportError alone: a torchvision that does not match torch raises RuntimeError
        for name in set(sys.modules) - before:
            if name == "k_diffusion" or name.startswith("k_diffusion."):
                del sys.modules[name]
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(
            "the k-diffusion package is not installed; try: "
            "pip install --no-deps k-diffusion==0.1.1.post1 && pip install torchdiffeq",
            name="k_diffusion",
        )
    package = ModuleType(_PRIVATE)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[_PRIVATE] = package
    try:
        with _torchvision():
            return Upstream(*(importlib.import_module(f"{_PRIVATE}.{name}") for name in _MODULES))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"k-diffusion is installed but needs {error.name}; try: pip install {error.name}", name=error.name
        ) from error


@contextmanager
def _torchvision() -> Iterator[None]:
    """Stands in for torchvision while k_diffusion.utils is loaded, which wants it for two image helpers; leaves an
    imported torchvision alone."""
    if "torchvision" in sys.modules:
        yield
        return
    modules = {name: ModuleType(name) for name in _STAND_IN}
    modules["torchvision.transforms"].functional = modules["torchvision.transforms.functional"]  # type: ignore[attr-defined]
    for helper in ("to_tensor", "to_pil_image"):
        setattr(modules["torchvision.transforms.functional"], helper, _absent)
    left_over = {name: sys.modules[name] for name in modules if name in sys.modules}  # of an import that failed
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(left_over)


def _absent(*args: object, **kwargs: object) -> NoReturn:
    raise ModuleNotFoundError("this helper of k-diffusion needs torchvision", name="torchvision")
