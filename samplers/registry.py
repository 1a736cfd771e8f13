"""SAMPLERS and SCHEDULES, every sampler and schedule by name, and the two calls that put one there.

A sampler's file registers it where it stands: `@sampler(Solver(), "family")` above its `sample_NAME` makes its row and
its CFG++ form's. So does anyone's own, which `draw`, the command and `get_sampler` then know.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar, cast

from torch import Tensor

from ella_kd.samplers.cfg_pp import CFGpp, ScaleMode
from ella_kd.samplers.driver import walk
from ella_kd.samplers.model import Callback, Model, NoiseSampler
from ella_kd.samplers.noise import NOISES
from ella_kd.samplers.solver import Solver, Step

__all__ = ["SAMPLERS", "SCHEDULES", "Sampler", "Schedule", "sampler", "schedule"]

Args = Mapping[str, Any] | None
Seeds = Sequence[int] | None
Function = Callable[..., Tensor]
Registered = TypeVar("Registered", bound=Callable[..., Any])
Gain = Callable[[Step[Any]], float]
"""How many times a step adds D - U in a variant of CFG++, where that is not once."""


@dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS. `function` is the public sample_*, `method` the solver with that function's defaults, None for
    a plain function, whose order, evals and noise are those it was registered with."""

    name: str
    function: Function
    method: Solver[Any] | None = None
    family: str = ""
    cfg_pp: bool = False
    order: int | None = None
    evals: int | None = None
    noise: Literal["normal", "brownian"] | None = None
    gain: Gain | None = None

    @property
    def solver(self) -> Solver[Any]:
        """The method, as `Run` takes it; ValueError where there is none."""
        if self.method is None:
            raise ValueError(f"{self.name} is a plain function without a Solver: it runs as a whole, and not in Run")
        return self.method

    @property
    def stochastic(self) -> bool:
        """Whether it adds noise with the default options."""
        return self.noise is not None if self.method is None else bool(self.method.steps((2.0, 1.0))[0].noises)

    def walked(self, model: Model) -> Model | CFGpp:
        """What a `Run` of the method walks on: the model, or its CFG++ form."""
        if not self.cfg_pp:
            return model
        return CFGpp(model) if self.gain is None else CFGpp(model, gain=self.gain)


@dataclass(frozen=True)
class Schedule:
    """A row of SCHEDULES. `function` is the public get_sigmas_*; `sigmas(n, model)` calls it with what it needs of a
    denoiser (sigma_min, sigma_max, sigmas) and returns [n + 1] on the CPU."""

    name: str
    function: Function
    sigmas: Callable[[int, Any], Tensor]
    description: str


SAMPLERS: dict[str, Sampler] = {}
"""Every sampler by name, in the order of the tables, those registered from outside after them."""
SCHEDULES: dict[str, Schedule] = {}
"""Every schedule by name."""
COMPATIBLE_SCHEDULES: dict[str, Schedule] = {}
"""What other programs mean by a name where `SCHEDULES` means something else; not all give n + 1 values, or end in 0."""
RANGE_SAMPLERS: dict[str, Sampler] = {}
"""Those that find their own steps: of a schedule they take the range alone."""


def sampler(
    solver: Solver[Any] | None = None,
    family: str = "",
    *,
    name: str | None = None,
    variants: Mapping[str, Gain] | None = None,
    order: int | None = None,
    evals: int | None = None,
    noise: Literal["normal", "brownian"] | None = None,
    table: dict[str, Sampler] = SAMPLERS,
) -> Callable[[Registered], Registered]:
    """Registers what stands below it: `sample_NAME`, a function of k-diffusion's arguments, or a Solver's class.

    solver: the method with the function's defaults; with it NAME_cfg_pp is made and registered too, and for each of
    `variants`, by name, NAME_VARIANT_cfg_pp, whose steps add D - U so many times. A plain function goes without, and
    says order, evals and the kind of noise if it knows them; where it has no `seeds`, its noise_sampler is made of
    them. ValueError for a name that is taken by another.
    """

    def register(target: Registered) -> Registered:
        method, function = solver, cast(Function, target)
        if isinstance(target, type) and issubclass(target, Solver):
            method = target()
            function = _function_of(method)
        own = name or target.__name__.removeprefix("sample_")
        if method is None:
            _add(table, Sampler(own, _seeded(function, noise), None, family, False, order, evals, noise))
            return target
        row = Sampler(own, function, method, family, False, method.order, method.evals, method.noise)
        _add(table, row)
        for variant, gain in {"": None, **(variants or {})}.items():
            form = f"{own}{variant and '_' + variant}_cfg_pp"
            _add(table, replace(row, name=form, function=_cfg_pp_form(function, form, gain), cfg_pp=True, gain=gain))
        return target

    return register


def schedule(
    description: str,
    sigmas: Callable[[int, Any], Tensor] | None = None,
    table: dict[str, Schedule] = SCHEDULES,
) -> Callable[[Registered], Registered]:
    """Registers `get_sigmas_NAME`, a function of n and of what it needs of a denoiser: sigma_min and sigma_max where
    it has parameters of these names, the denoiser itself where it has another one without a default.

    sigmas(n, model): how it is called, where that is not so. ValueError for a name that is taken by another."""

    def register(function: Registered) -> Registered:
        _, *needed = (name for name, p in inspect.signature(function).parameters.items() if p.default is p.empty)

        def call(n: int, model: Any) -> Tensor:
            return function(n, *(getattr(model, name) if name.startswith("sigma_m") else model for name in needed))

        row = Schedule(function.__name__.removeprefix("get_sigmas_"), function, sigmas or call, description)
        _add(table, row)
        return function

    return register


class CFGppForm(Protocol):
    """What `sampler` makes of sample_NAME: the same arguments, and by keyword only `scale`, what the model's cond_scale
    means, as in `ella_kd.samplers.cfg_pp.CFGpp`."""

    def __call__(self, model: Model, x: Tensor, *args: Any, scale: ScaleMode = "lam", **kwargs: Any) -> Tensor: ...


def cfg_pp_form(function: Function, variant: str = "") -> CFGppForm:
    """The CFG++ form of a registered `sample_NAME`, or one of its variants."""
    name = f"{function.__name__.removeprefix('sample_')}{variant and '_' + variant}_cfg_pp"
    return cast(CFGppForm, SAMPLERS[name].function)


def range_of(sigmas: Tensor) -> tuple[float, float]:
    """The first of a schedule's sigmas and the last above 0."""
    *_, low = (sigma for sigma in sigmas.tolist() if sigma > 0)
    return float(sigmas[0]), low


def _add(table: dict[str, Any], row: Any) -> None:
    """ValueError for a name that another function has; one of the same module and name is the same, defined anew."""
    old = table.get(row.name)
    if old is not None and (old.function.__module__, old.name) != (row.function.__module__, row.name):
        raise ValueError(f"{row.name!r} is the name of another ({old.function.__module__}): choose one of your own")
    table[row.name] = row


def _function_of(solver: Solver[Any]) -> Function:
    """`sample_NAME` of a solver, its options by keyword."""

    def function(
        model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
        disable: bool | None = None, *, noise_sampler: NoiseSampler | None = None, seeds: Seeds = None, **options: Any,
    ) -> Tensor:
        own = replace(solver, **options)
        return walk(own, model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler)

    function.__module__, function.__doc__ = type(solver).__module__, type(solver).__doc__
    return function


def _seeded(function: Function, noise: str | None) -> Function:
    """The function with `seeds`, of which its noise_sampler is made where it has none of its own."""
    accepted = inspect.signature(function).parameters
    if "seeds" in accepted:
        return function

    @functools.wraps(function)
    def seeded(model: Model, x: Tensor, *args: Any, seeds: Seeds = None, **kwargs: Any) -> Tensor:
        if seeds is not None and "noise_sampler" in accepted:
            kwargs.setdefault("noise_sampler", NOISES[noise or "normal"](x, seeds))
        return function(model, x, *args, **kwargs)

    return seeded


def _cfg_pp_form(function: Function, name: str, gain: Gain | None) -> Function:
    """The same method on U, with D - U added once per step, or `gain` times."""
    more: dict[str, Any] = {} if gain is None else {"gain": gain}

    def form(model: Model, *args: Any, scale: ScaleMode = "lam", **kwargs: Any) -> Tensor:
        return function(CFGpp(model, scale, **more), *args, **kwargs)

    signature = inspect.signature(function)
    own = inspect.Parameter("scale", inspect.Parameter.KEYWORD_ONLY, default="lam", annotation="ScaleMode")
    *parameters, last = signature.parameters.values()
    parameters += [own, last] if last.kind is last.VAR_KEYWORD else [last, own]
    form.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    form.__name__ = form.__qualname__ = f"sample_{name}"
    form.__module__ = function.__module__
    form.__annotations__ = {**function.__annotations__, "scale": "ScaleMode"}
    form.__doc__ = (
        f"{(function.__doc__ or '').strip()}\n\n"
        "    With CFG++ (2406.08070): these steps walk on U, and each adds D - U of its first evaluation once"
        f"{'' if gain is None else ' (' + (gain.__doc__ or '').strip() + ')'}.\n"
        "    cond_scale is lambda, or what `scale` says."
    )
    return form
