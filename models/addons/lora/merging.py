"""LoRAs merged into weights: a twin of a network that shares every untouched tensor with it.

W' = round(W + the sum over files of strength * change(W)), in fp32 from the original W, and rounded once to its dtype.
A kind that multiplies weights (DoRA, OFT, IA3, GLoRA) is a change like the others, W' - W of the original W times the
strength, so several files agree in any order. Nothing is ejected: whoever wants the network without LoRAs uses it.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ella_kd.models.addons.lora.formulas import Change
from ella_kd.models.addons.lora.names import Dictionary, Modules
from ella_kd.models.addons.lora.reading import LoRA
from ella_kd.models.addons.lora.strength import Strength
from ella_kd.models.around import Around, innermost
from ella_kd.models.files.kinds import FAMILIES
from ella_kd.models.parameters import Recipe, moved

Given = LoRA | str | Path | tuple[LoRA | str | Path, float | Mapping[str, Any] | Strength]
Pair = tuple[LoRA, Strength]
WORDS = {"unet": "the UNet", "text": "the text encoder", "text_2": "the second text encoder"}


@dataclass(frozen=True, eq=False)
class Applied:
    """What a LoRA changes of one network: the file's name of a module, ours (three where it has q, k, v in one), how
    strongly."""

    lora: LoRA
    strength: Strength
    places: tuple[tuple[str, Modules, float], ...]


def with_lora(target: Any, loras: "Given | Sequence[Given]", *, partial: bool = False) -> Any:
    """A pipeline or a network with LoRAs: `with_lora(sd, [("style.safetensors", 0.8), (lora, 0.5)])`.

    The twin shares every untouched tensor with the target, which stays as it is; merged weights cost nothing a step,
    and their memory once more. A strength is a number, {"unet": 0.8, "text": 0.5}, or a `Strength` with block weights;
    of 0, and of [], the target's own tensors are left. What was merged before is kept, from the original weights (of a
    twin that was moved to another dtype: as they are in that one): lists add up. On a network that is `fast_on_cpu` the
    twin is too; that of a compiled one is not compiled.
    Raises FileNotFoundError, or ValueError naming file and modules that the target has not (partial: a warning).
    """
    if hasattr(target, "with_lora"):
        return target.with_lora(loras, partial=partial)
    if not isinstance(target, nn.Module):
        raise TypeError(f"a LoRA changes a Pipeline or a network, got {type(target).__name__}")
    part = part_of(target)
    return merged({part: target}, as_list(loras), partial=partial)[part]


def as_list(loras: "Given | Sequence[Given]") -> list[Pair]:
    """What a user gives, files read: [("style.safetensors", 0.8), (lora, {"unet": 1, "text": 0}), lora], or one."""
    one = isinstance(loras, LoRA | str | Path) or (
        isinstance(loras, tuple) and len(loras) == 2 and isinstance(loras[1], float | int | Mapping | Strength))
    found = []
    given: Any
    for given in (loras,) if one else loras:  # type: ignore[union-attr]
        lora, strength = given if isinstance(given, tuple) else (given, 1.0)
        if not isinstance(lora, LoRA | str | Path):
            raise TypeError(f"a LoRA is a file or LoRA.load(file), with a strength or without, got {given!r:.80}")
        found.append((lora if isinstance(lora, LoRA) else LoRA.load(lora), Strength.of(strength)))
    return found


def part_of(network: nn.Module) -> str:
    """ "unet", "text" or, with a projection, "text_2". Raises TypeError for a network of another make."""
    names = [name for name, _ in innermost(network).named_parameters()]
    if any(name.startswith("input_blocks.") for name in names):
        return "unet"
    if any("encoder.layers." in name for name in names):
        return "text_2" if any(name.startswith("text_projection.") for name in names) else "text"
    raise TypeError(f"a LoRA changes a UNet of ours or a CLIP text model, got {type(network).__name__}: for diffusers' "
                    "networks use Pipeline.from_diffusers(pipe)")


def merged(networks: Mapping[str, Any], loras: Sequence[Pair], *, partial: bool = False) -> dict[str, Any]:
    """Twins of networks with LoRAs, by part ("unet", "text", "text_2"); what nothing changes is itself.

    A network made of networks has each of them changed. Modules of a file that no network has are refused, or named in
    a warning and left (partial); what it has for a part that is not here is named in a warning.
    Raises ValueError naming the file and the first modules that are unknown or do not fit.
    """
    plain = {part: Recipe.of(innermost(network)).plain for part, network in networks.items()}
    dictionary = Dictionary(plain)
    found: dict[str, list[Applied]] = {part: [] for part in networks}
    for lora, strength in loras:
        for part, places in _places(lora, strength, dictionary, partial).items():
            found[part].append(Applied(lora, strength, tuple(places)))

    def twin(network: Any, part: str) -> Any:
        if isinstance(network, Around):
            return network.each(lambda one: twin(one, part))
        return _twin(getattr(network, "_orig_mod", network), found[part]) if found[part] else network

    return {part: twin(network, part) for part, network in networks.items()}


def _places(lora: LoRA, strength: Strength, dictionary: Dictionary, partial: bool
            ) -> dict[str, list[tuple[str, Modules, float]]]:
    """What a LoRA changes with a strength that is not 0, by part."""
    places: dict[str, list[tuple[str, Modules, float]]] = {}
    unknown, away = [], dict[str, int]()
    for name in lora.changes:
        part, modules = dictionary.find(name)
        if modules:
            if factor := strength.at(part, modules[0]):
                places.setdefault(part, []).append((name, modules, factor))
        elif part and part not in dictionary.tables:
            away[part] = away.get(part, 0) + (strength.at(part, "") != 0)
        else:
            unknown.append(name)
    told = lora.path or lora.name
    if unknown and (not partial or len(unknown) == len(lora.changes)):
        raise ValueError(f"{told} changes modules that this model has not{_made_for(lora)}: {_first(unknown)}"
                         + ("" if partial else "; with partial=True the rest of it is applied"))
    if unknown:
        warnings.warn(f"{told} is applied in part, this model has no {_first(unknown)}", stacklevel=4)
    if left := [f"{n} modules of {WORDS[part]}" for part, n in away.items() if n]:
        warnings.warn(f"{told} is applied without {' and '.join(left)}, which this model has not", stacklevel=4)
    return places


def _twin(network: nn.Module, new: Sequence[Applied]) -> nn.Module:
    """A network with the LoRAs of its recipe and new ones, all merged from the plain weights."""
    recipe = Recipe.of(network)
    plain, like = recipe.plain, next(network.parameters())
    if (first := next(plain.parameters())).device != like.device or first.dtype != like.dtype:
        plain = moved(plain, like.device, like.dtype)  # the twin was moved since
    every: tuple[Applied, ...] = (*recipe.changes, *new)
    wanted: dict[str, list[tuple[Applied, str, Modules, float]]] = {}
    for applied in every:
        for name, modules, strength in applied.places:
            for module in modules:
                wanted.setdefault(module, []).append((applied, name, modules, strength))
    memo: dict[int, Any] = {id(x): x for x in [*plain.parameters(), *plain.buffers()]}
    wrong: dict[LoRA, list[str]] = {}
    for module, changes in wanted.items():
        parts: dict[str, list[Tensor]] = {"weight": [], "bias": []}
        for applied, name, modules, strength in changes:
            try:
                added = _added(applied.lora.changes[name], [plain.get_submodule(each) for each in modules])
            except ValueError as error:
                wrong.setdefault(applied.lora, []).append(f"{name}: {error}")
                continue
            for kind, x in added.items():
                parts[kind].append(strength * x.chunk(len(modules))[modules.index(module)])
        for kind, terms in parts.items():
            if terms and not wrong:
                old = plain.get_parameter(f"{module}.{kind}")
                memo[id(old)] = nn.Parameter((_exact(old) + _sum(terms)).to(old.dtype), old.requires_grad)
    for lora, problems in wrong.items():
        raise ValueError(f"{lora.path or lora.name} does not fit this model{_made_for(lora)}: {_first(problems)}")
    twin = copy.deepcopy(plain, memo)
    for finish in recipe.finish:
        twin = finish(twin)
    return Recipe(plain, every, recipe.finish).on(twin)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """The same in any order: two commute, of more the sum is taken in fp64."""
    if len(terms) < 3 or terms[0].device.type == "mps":
        return sum(terms[1:], terms[0])
    return sum((x.double() for x in terms[1:]), terms[0].double())


def _added(change: Change, owners: Sequence[nn.Module]) -> dict[str, Tensor]:
    """What a change adds at strength 1 to the weight and the bias of a module, or of three whose rows lie in one."""
    found: dict[str, Tensor] = {}
    bias = next((change.factors[name] for name in ("diff_b", "b_norm") if name in change.factors), None)
    if bias is not None:
        old = _rows(owners, "bias")
        if old is None or old.numel() != bias.numel():
            raise ValueError(f"a bias {list(bias.shape)} for {'none' if old is None else list(old.shape)}")
        found["bias"] = bias.to(old).view_as(old)
    if change.kind is not None:
        w = _rows(owners, "weight")
        if w is None:
            raise ValueError("a change of weights for a module without")
        seen = _channels(change, w)
        added = change.weight(w[:, :seen] if seen else w)
        found["weight"] = torch.cat([added, torch.zeros_like(w[:, seen:])], 1) if seen else added
    return found


def _rows(owners: Sequence[nn.Module], kind: str) -> Tensor | None:
    tensors = [getattr(owner, kind, None) for owner in owners]
    if any(x is None for x in tensors):
        return None
    return _exact(tensors[0]) if len(tensors) == 1 else torch.cat([_exact(x) for x in tensors])  # type: ignore[arg-type]


def _exact(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _channels(change: Change, w: Tensor) -> int:
    """Of how many of a first convolution's input channels a change is, where it was made for the 4 of a text-to-image
    UNet and this one sees more (9: inpainting), whose others it leaves; 0: of all."""
    down = next((change.factors[name] for name in ("lora_down", "diff") if name in change.factors), None)
    fits = down is None or down.ndim != 4 or w.ndim != 4 or down.shape[1] != 4 or "lora_mid" in change.factors
    return 0 if fits or w.shape[1] not in (5, 7, 8, 9, 12) else 4


def _made_for(lora: LoRA) -> str:
    return f", it was made for {FAMILIES[lora.family]}" if lora.family in FAMILIES else ""


def _first(names: Sequence[str], n: int = 5) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
