"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): files of words that were learned for CLIP."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from torch import Tensor

from ella_kd.models.files.hashes import sha256
from ella_kd.models.files.kinds import hint, kind_of
from ella_kd.models.files.weights import Weights

WIDTHS = {768: "Stable Diffusion 1.x's", 1024: "Stable Diffusion 2.x's", 1280: "SDXL's second encoder's"}
PAIR = ("clip_l", "clip_g")


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word and its vectors, which stand in place of token embeddings.

    vectors: {"": [n, D]}, or SDXL's pair {"clip_l": [n, 768], "clip_g": [n, 1280]}; at least one, all of them finite.
    Raises ValueError for others.
    """

    name: str
    vectors: Mapping[str, Tensor]
    path: Path | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        what = f"the embedding {self.path or self.name}"
        if not self.name.strip():
            raise ValueError("an embedding needs a name, the word that calls it")
        if set(self.vectors) not in ({""}, set(PAIR)):
            raise ValueError(f"{what} has the vectors {', '.join(self.vectors)}: expected one text encoder's, or "
                             f"{' and '.join(PAIR)} for SDXL")
        rows = {name: x[None] if x.ndim == 1 else x for name, x in self.vectors.items()}
        shapes = {tuple(x.shape) for x in rows.values()}
        if any(len(shape) != 2 or 0 in shape for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
            raise ValueError(f"{what} must hold vectors [n, D], as many for each text encoder, got "
                             f"{', '.join(map(str, map(list, shapes)))}")
        if not all(x.is_floating_point() and bool(x.isfinite().all()) for x in rows.values()):
            raise ValueError(f"{what} must hold finite floating-point numbers")
        object.__setattr__(self, "vectors", {half: rows[half].detach() for half in ("", *PAIR) if half in rows})

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> Self:
        """Read a file; name: the word, None for the file's stem.

        The kinds: `emb_params` in a safetensors file; A1111's .pt, `string_to_param`; diffusers' `{token: vectors}`; a
        bare tensor; SDXL's pair `clip_l`, `clip_g`. Raises as `Weights` does, ValueError for a file of another kind.
        """
        weights = Weights(path)
        return cls(name or weights.path.stem, _vectors(weights), weights.path, weights.metadata)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> Self:
        """What a file of these tensors is: those that lie in a LoRA's file (`LoRA.embeddings`)."""
        return cls(name, _vectors(Weights.of(tensors, name)))

    def __len__(self) -> int:
        """How many tokens the word takes."""
        return len(next(iter(self.vectors.values())))

    @property
    def sha256(self) -> str:
        """That of the file, "" without one."""
        return "" if self.path is None else sha256(self.path)

    @property
    def kind(self) -> str:
        """Whose it is, in words: "Stable Diffusion 2.x's, 1024 wide"."""
        widths = [x.shape[1] for x in self.vectors.values()]
        if len(widths) > 1:
            return f"SDXL's, a pair {' and '.join(map(str, widths))} wide"
        return f"{WIDTHS[widths[0]]}, {widths[0]} wide" if widths[0] in WIDTHS else f"{widths[0]} wide"

    def fitting(self, width: int, *halves: str) -> Tensor:
        """The vectors [n, D] for a text encoder of this width; halves: the keys that it may have.

        Raises ValueError for another model's embedding.
        """
        found = next((self.vectors[half] for half in halves if half in self.vectors), None)
        if found is None or found.shape[1] != width:
            wanted = f"{halves[0]} of the pair, {width} wide" if halves[0] else f"vectors {width} wide"
            raise ValueError(f"the embedding {self.name} is {self.kind}: this model's text encoder takes {wanted}")
        return found

    def described(self) -> dict[str, str]:
        """What `inspect` shows."""
        return {"made for": self.kind, "vectors": str(len(self)),
                "trigger words": self.metadata.get("modelspec.trigger_phrase", "") or self.name}

    def __repr__(self) -> str:
        return f"Embedding({self.name!r}, {len(self)} vectors, {self.kind})"


def _vectors(weights: Weights) -> dict[str, Tensor]:
    other = hint(kind_of(weights), "embedding")
    names = [name for name in weights if not name.startswith("string_to_token")]
    if any(half in names for half in PAIR):
        return {name: weights[name] for name in names if name in PAIR}
    words = [name for name in names if name.startswith("string_to_param")]
    if len(words) > 1:
        raise ValueError(f"{weights.path} holds {len(words)} words: expected an embedding of one")
    found = words or [name for name in names if name == "emb_params"] or names
    if other or len(found) > 1 or len(weights.shapes[found[0]]) not in (1, 2):
        raise ValueError(f"{weights.path} is no textual-inversion embedding"
                         f"{other or f', it holds {len(names)} tensors'}: expected emb_params, string_to_param, clip_l "
                         "and clip_g, or one tensor of vectors [n, D]")
    return {"": weights[found[0]]}
