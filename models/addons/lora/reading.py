"""LoRA files of every spelling as one value: per module its tensors, and what the header says."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ella_kd.models.addons.lora.formulas import Change, scale_of_peft
from ella_kd.models.files.building import refuse
from ella_kd.models.files.hashes import sha256
from ella_kd.models.files.kinds import hint, kind_of
from ella_kd.models.files.layout import json_in
from ella_kd.models.files.weights import Weights

# How a file says which of a module's tensors one is: its name's end -> our word.
_ENDS = [(re.compile(rf"^(?P<module>.+?){end}$"), word) for end, word in (
    (r"(?:[._]lora|\.lora_linear_layer)[._](?P<word>up|down|mid)\.weight", "lora_{}"),  # kohya's, older diffusers'
    (r"\.lora_(?P<word>[AB])(?:\.[\w-]+)?\.weight", "lora_{}"),  # PEFT's, with an adapter's name or without
    (r"\.lora_magnitude_vector(?:\.[\w-]+)?", "magnitude"),
    (r"\.(?P<word>(?:hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)))(?:\.\w+)?", "{}"),
    (r"\.(?P<word>alpha|dora_scale|diff|diff_b|w_norm|b_norm|oft_blocks|rescale|on_input)", "{}"),
    (r"\.(?P<word>[ab][12]\.weight)", "{}"),
    (r"\.weight", "weight"))]
_PEFT = {"A": "down", "B": "up"}
BUNDLED = "bundle_emb."  # A1111: embeddings inside a LoRA's file
_TEXT = re.compile(r"^(?:base_model[._]model[._])?(?:lora_)?(te\d?_|text_encoder(?:_2)?[._])|(^|_|\.)text_model[_.]|"
                   r"resblocks[_.]|encoder[_.]layers[_.]")


@dataclass(frozen=True, eq=False)
class LoRA:
    """What a file changes, for any network that has its modules: `LoRA.load("style.safetensors")`.

    changes: by the module's name as the file spells it. embeddings: textual inversions that lie in the file, by name,
    each the tensors that a file of its own would hold; nothing of them is a change of weights.
    """

    name: str
    changes: Mapping[str, Change] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    path: Path | None = field(default=None, repr=False)
    embeddings: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> "LoRA":
        """Read a file of kohya's, diffusers', PEFT's, LyCORIS' or LDM's spelling, or a folder of diffusers' or PEFT's.

        name: what it is called, None for the file's stem. PEFT's alpha is in the file's metadata, or in the
        adapter_config.json of a folder or beside an adapter_model file; without either its scale is 1.
        Raises FileNotFoundError, or ValueError naming the first tensors that are no LoRA's, incomplete or not finite.
        """
        path = Path(path)
        if path.is_dir():
            path = _in_folder(path)
        weights = Weights(path)
        config = json_in(path.parent / "adapter_config.json") if path.stem == "adapter_model" else {}
        usual = path.parent.name if path.stem in ("adapter_model", "pytorch_lora_weights") else path.stem
        return cls.of(weights, name or usual, weights.metadata, path, config)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str = "LoRA", metadata: Mapping[str, str] | None = None,
           path: Path | None = None, config: Mapping[str, Any] | None = None) -> "LoRA":
        """A LoRA of tensors in memory; config: PEFT's adapter_config.json. Raises ValueError as `load` does."""
        told = f"{path or name} is no LoRA that is known"
        if isinstance(tensors, Weights) and (other := kind_of(tensors)).what and other.place != "lora":
            told += hint(other)
        found: dict[str, dict[str, Tensor]] = {}
        embeddings: dict[str, dict[str, Tensor]] = {}
        wrong: list[str] = []
        for key, x in tensors.items():
            if x.is_floating_point() and not x.isfinite().all():
                wrong.append(f"not finite: {key}")
            if key.startswith(BUNDLED):
                bundled, _, rest = key.removeprefix(BUNDLED).partition(".")
                embeddings.setdefault(bundled, {})[rest] = x
                continue
            module, word = _read(key)
            if word is None or word in found.setdefault(module, {}):
                wrong.append(f"{'unexpected' if word is None else 'twice'}: {key} {list(x.shape)}")
            else:
                found[module][word] = x
        peft = _PeftScales(config or {}, metadata or {})
        changes = {module: Change(factors, None if "alpha" in factors else peft.of(module, factors))
                   for module, factors in found.items() if factors}
        if not wrong:
            wrong = [f"incomplete: {module} has {problem}" for module, change in changes.items()
                     for problem in change.problems()]
        if not wrong and not changes:
            wrong = ["it holds no tensors"]
        refuse(wrong, told)
        return cls(name, changes, dict(metadata or {}), path, embeddings)

    @cached_property
    def sha256(self) -> str:
        """Of the file, "" if it was made in memory. Computed once."""
        return "" if self.path is None else sha256(self.path)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its changes are, the most frequent first: ("LoRA",), ("DoRA", "norm difference")."""
        names = Counter("DoRA" if change.decomposed else change.kind.name if change.kind else "bias difference"
                        for change in self.changes.values())
        return tuple(name for name, _ in names.most_common())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending."""
        return tuple(sorted({rank for change in self.changes.values() if (rank := change.rank)}))

    @property
    def modules(self) -> dict[str, int]:
        """How many modules it changes, of the UNet and of the text encoders, by their names alone."""
        text = sum(bool(_TEXT.search(name)) for name in self.changes)
        return {"unet": len(self.changes) - text, "text": text}

    @property
    def family(self) -> str:
        """A key of `models.files.kinds.FAMILIES` by its header or by the width of the text that it sees; "" unknown."""
        said = f"{self.metadata.get('modelspec.architecture', '')} {self.metadata.get('ss_base_model_version', '')}"
        for pattern, family in ((r"xl-v1-refiner", "refiner"), (r"sdxl|diffusion-xl", "sdxl"),
                                (r"sd_v2|diffusion-v2", "sd2"), (r"sd_v1|diffusion-v1", "sd1")):
            if re.search(pattern, said):
                return family
        widths = {int(change.factors["lora_down"].shape[1]) for name, change in self.changes.items()
                  if "lora_down" in change.factors and re.search(r"attn2[._](processor[._])?to_k$", name)}
        if any(re.search(r"te2_|text_encoder_2", name) for name in self.changes):
            return "sdxl"
        known = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "refiner"}
        return known.get(widths.pop(), "") if len(widths) == 1 else ""

    @property
    def trigger(self) -> str:
        """The words that call it, as ModelSpec's header has them; "" if it says none."""
        return self.metadata.get("modelspec.trigger_phrase", "").strip()

    @property
    def tags(self) -> tuple[str, ...]:
        """What its training pictures were tagged with most often, at most twenty, as kohya's header counts them."""
        try:
            folders = json.loads(self.metadata.get("ss_tag_frequency", "{}"))
            counts: Counter[str] = Counter()
            for folder in folders.values():
                counts.update({tag.strip(): int(n) for tag, n in folder.items()})
        except (ValueError, AttributeError, TypeError, RecursionError):  # a header that somebody else wrote
            return ()
        return tuple(tag for tag, _ in counts.most_common(20) if tag)

    def described(self) -> dict[str, str]:
        """What `inspect` shows: kind, rank, base, modules, trigger words, tags, embeddings; without what is unknown."""
        ranks = self.ranks
        told = {"kind": ", ".join(self.kinds),
                "rank": "" if not ranks else f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
                "base": self.family,
                "modules": ", ".join(f"{n} of the {'UNet' if part == 'unet' else 'text encoder'}"
                                     for part, n in self.modules.items() if n),
                "trigger words": self.trigger, "most frequent tags": ", ".join(self.tags[:10]),
                "embeddings": ", ".join(self.embeddings)}
        return {key: text for key, text in told.items() if text}


class _PeftScales:
    """What PEFT's configuration says in place of alphas: adapter_config.json, or diffusers' copy in the header."""

    def __init__(self, config: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        self.parts: dict[str, Mapping[str, Any]] = {"": config} if config else {}
        try:
            said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except (ValueError, RecursionError):
            said = {}
        for key, value in said.items() if isinstance(said, dict) else ():
            part, _, name = key.partition(".")
            self.parts.setdefault(part, {})[name] = value  # type: ignore[index]

    def of(self, module: str, factors: Mapping[str, Tensor]) -> float | None:
        """The scale of one module; None if nothing is said."""
        plain = module.removeprefix("base_model.model.")
        config = next((said for part, said in self.parts.items() if plain.startswith(f"{part}.")),
                      self.parts.get(""))
        if config is None:
            return None
        plain = plain.partition(".")[2] if config is not self.parts.get("") else plain
        alpha = _of_module(config.get("alpha_pattern"), plain) or config.get("lora_alpha", config.get("alpha"))
        rank = int(factors["lora_down"].shape[0]) if "lora_down" in factors else (
            _of_module(config.get("rank_pattern"), plain) or config.get("r"))
        if type(alpha) not in (int, float) or type(rank) is not int or rank < 1:
            return None
        return scale_of_peft(alpha, rank, bool(config.get("use_rslora")))


def _of_module(pattern: Any, module: str) -> Any:
    """What a pattern says of a module: its keys are ends of names, or regular expressions of them."""
    for key, value in pattern.items() if isinstance(pattern, dict) else ():
        try:
            if re.fullmatch(rf"(.*\.)?({key.removeprefix('^')})", module):
                return value
        except re.error:
            continue
    return None


def _read(key: str) -> tuple[str, str | None]:
    """A tensor's module, and which of its tensors it is; None if no kind of LoRA has it."""
    for pattern, word in _ENDS:
        if found := pattern.fullmatch(key):
            part = found.groupdict().get("word") or ""
            return found["module"], word.format(_PEFT.get(part, part))
    return key, None


def _in_folder(folder: Path) -> Path:
    for stem in ("pytorch_lora_weights", "adapter_model"):
        for suffix in (".safetensors", ".bin"):
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    raise FileNotFoundError(f"no LoRA in the folder {folder}: expected pytorch_lora_weights.safetensors or "
                            "adapter_model.safetensors")
