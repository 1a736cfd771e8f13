"""What each kind of LoRA adds to a weight: its formula, in fp32, from the original weight.

A `Change` is what a file holds for one module. Every formula is written as what is added to W at strength 1, so that
the changes of several files are summed, each made from the original, and their order does not matter.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]  # by their names in a file without the module's: lora_up, alpha, hada_w1_a, ...


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of change: the tensors it needs, those it may have, its rank, and its formula (W, factors, s) -> added.

    s is alpha / rank, or what the file's configuration says instead; it is given where the formula is scaled.
    """

    name: str
    needs: tuple[str, ...]
    formula: Callable[[Tensor, Factors, float], Tensor]
    may: tuple[str, ...] = ()
    rank: Callable[[Factors], int | None] = lambda factors: None


@dataclass(frozen=True, eq=False)
class Change:
    """What a file holds for one module, as it lies there.

    scale: in place of alpha / rank, where a configuration beside the tensors says it (PEFT).
    """

    factors: Factors
    scale: float | None = None

    @property
    def kind(self) -> Kind | None:
        """None: it changes the bias alone, or nothing that is known."""
        return next((kind for kind in KINDS if all(name in self.factors for name in kind.needs)), None)

    @property
    def decomposed(self) -> bool:
        """DoRA: the magnitude is a tensor of its own."""
        return "dora_scale" in self.factors or "magnitude" in self.factors

    @property
    def rank(self) -> int | None:
        return None if self.kind is None else self.kind.rank(self.factors)

    def problems(self) -> list[str]:
        """What is missing or does not belong together."""
        kind = self.kind
        if kind is None:
            if set(self.factors) == {"diff_b"}:
                return []
            almost = max(KINDS, key=lambda each: sum(name in self.factors for name in each.needs))
            lacks = [name for name in almost.needs if name not in self.factors]
            return [f"{', '.join(self.factors)} without {', '.join(lacks)}"]
        known = {*kind.needs, *kind.may, "diff_b"}
        return [f"{name} beside {kind.needs[0]}" for name in self.factors if name not in known]

    def weight(self, w: Tensor) -> Tensor:
        """What is added to the weight w, fp32 or fp64, at strength 1, like w. ValueError where it does not fit."""
        factors = {name: x.to(w) for name, x in self.factors.items()}
        kind = self.kind
        assert kind is not None
        try:
            added = kind.formula(w, factors, self._scale())
            if added.shape[0] == w.shape[0] and added.numel() == w.numel():  # [out, in] and [out, in, 1, 1] are one
                added = added.reshape(w.shape)
                return _dora(w, added, factors) - w if self.decomposed else added
            told = f", which makes {list(added.shape)},"
        except (RuntimeError, IndexError):
            told = ""
        raise ValueError(f"{kind.name} of {self.shapes}{told} for a weight {list(w.shape)}")

    @property
    def shapes(self) -> str:
        return ", ".join(f"{name} {list(x.shape)}" for name, x in self.factors.items() if x.ndim)

    def _scale(self) -> float:
        """alpha / rank. Absent it is 1; a 0 is what trainers write for "the rank"."""
        if self.scale is not None:
            return self.scale
        alpha, rank = self.factors.get("alpha"), self.rank
        number = 0.0 if alpha is None else float(alpha)
        return number / rank if number and rank else 1.0


def _lora(w: Tensor, f: Factors, s: float) -> Tensor:
    up, down = f["lora_up"].flatten(1), f["lora_down"].flatten(1)
    if "lora_mid" not in f:
        return s * (up @ down)
    return s * torch.einsum("r t k l, o r, t i -> o i k l", f["lora_mid"], up, down)  # Tucker, or CP


def _loha(w: Tensor, f: Factors, s: float) -> Tensor:
    """Hadamard product of two low-rank ones, LyCORIS (Yeh et al. 2023, arXiv 2309.14859)."""
    def half(n: int) -> Tensor:
        a, b = f[f"hada_w{n}_a"], f[f"hada_w{n}_b"]
        return torch.einsum("r u k l, r o, u i -> o i k l", f[f"hada_t{n}"], a, b) if f"hada_t{n}" in f else a @ b

    return s * half(1) * half(2)


def _lokr(w: Tensor, f: Factors, s: float) -> Tensor:
    """Kronecker product; scaled only if a factor is low-rank."""
    def factor(n: int) -> Tensor:
        if f"lokr_w{n}" in f:
            return f[f"lokr_w{n}"]
        a, b = f[f"lokr_w{n}_a"], f[f"lokr_w{n}_b"]
        if "lokr_t2" in f and n == 2:
            return torch.einsum("r u k l, r o, u i -> o i k l", f["lokr_t2"], a, b)
        return a @ b.flatten(1)

    w1, w2 = factor(1), factor(2)
    if w2.ndim == 2 and w.ndim == 4:  # the kernel lies in w2's columns
        w2 = w2.reshape(w2.shape[0], -1, *w.shape[2:])
    return s * torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.ndim - 2)), w2.contiguous())


def _full(w: Tensor, f: Factors, s: float) -> Tensor:
    return f["diff"]


def _norm(w: Tensor, f: Factors, s: float) -> Tensor:
    return f["w_norm"]


def _ia3(w: Tensor, f: Factors, s: float) -> Tensor:
    """Every output, or input, times 1 + w (Liu et al. 2022, arXiv 2205.05638)."""
    shape = (1, -1) if bool(f["on_input"]) else (-1, 1)
    return w * f["weight"].reshape(*shape, *(1,) * (w.ndim - 2))


def _glora(w: Tensor, f: Factors, s: float) -> Tensor:
    """W a1 a2 + b1 b2 (Chavan et al. 2023, arXiv 2306.07967); older files have 1 and 2 exchanged."""
    a, aa, b, bb = (f[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    if a.shape[0] != w.shape[1]:
        a, aa, b, bb = aa, a, bb, b
    return s * (torch.einsum("o i ..., i j -> o j ...", w, a @ aa) + (b @ bb).reshape(w.shape))


def _oft(w: Tensor, f: Factors, s: float) -> Tensor:
    """Blocks of outputs rotated, (Qiu et al. 2023, arXiv 2306.07280): W' of a block is R^T W, times rescale."""
    r = _rotations(f, w.shape[0])
    if r.ndim == 3:
        turned = torch.einsum("k n m, k n x -> k m x", r, w.reshape(r.shape[0], r.shape[1], -1))
    else:
        turned = w.flatten(1)
        for i, blocks in enumerate(r):  # BOFT (Liu et al. 2023, arXiv 2311.06243): butterflies of blocks
            b, k = blocks.shape[-1], 2 ** i * blocks.shape[-1] // 2
            mixed = turned.unflatten(0, (-1, 2, k)).transpose(1, 2).reshape(-1, b, turned.shape[1])
            mixed = blocks @ mixed
            turned = mixed.reshape(-1, k, 2, turned.shape[1]).transpose(1, 2).reshape(turned.shape)
    turned = turned.reshape(w.shape)
    return turned * f["rescale"].reshape(-1, *(1,) * (w.ndim - 1)) - w if "rescale" in f else turned - w


def _rotations(f: Factors, outputs: int) -> Tensor:
    """Cayley's (I + Q)(I - Q)^-1 of each block; alpha, above 0, times the outputs is the most that |Q| may be."""
    q = f["oft_blocks"] - f["oft_blocks"].mT
    limit = float(f["alpha"]) * outputs if "alpha" in f else 0.0
    if limit > 0 and (norm := float(q.norm())) > limit:
        q = q * (limit / norm)
    eye = torch.eye(q.shape[-1], device=q.device)
    return torch.linalg.solve(eye - q, eye + q)  # the two commute


def _dora(w: Tensor, added: Tensor, f: Factors) -> Tensor:
    """m V / |V| with V = W + added (Liu et al. 2024, arXiv 2402.09353); the shape of m says whose norm: [out, 1, ..] of
    the outputs, [1, in, ..] of the inputs. PEFT's is of the outputs, [out] or [1, out, 1, 1]."""
    v, ones = w + added, (1,) * (w.ndim - 1)
    if "magnitude" in f:
        m = f["magnitude"].reshape(-1, *ones)
    else:
        m = f["dora_scale"]
        m = m.reshape(-1, *ones) if m.ndim < 2 else m.reshape(*m.shape[:2], *ones[1:])
    over = [n for n in range(w.ndim) if n != (1 if m.shape[0] == 1 and m.shape[1] == w.shape[1] != 1 else 0)]
    return m * v / v.square().sum(over, keepdim=True).sqrt().clamp_min(torch.finfo(v.dtype).tiny)


def _inner(*names: str) -> Callable[[Factors], int | None]:
    """The rank: the first dimension of the first of these tensors that is there."""
    return lambda f: next((int(f[name].shape[0]) for name in names if name in f and f[name].ndim), None)


DORA = ("alpha", "dora_scale", "magnitude")
_FIRST = [("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")]
_SECOND = [("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")]


def _kinds() -> Iterator[Kind]:
    yield Kind("LoRA", ("lora_up", "lora_down"), _lora, ("lora_mid", *DORA), _inner("lora_down"))
    yield Kind("LoHa", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _loha, ("hada_t1", "hada_t2", *DORA),
               _inner("hada_w1_b"))
    for first in _FIRST:
        for second in _SECOND:
            yield Kind("LoKr", (*first, *second), _lokr, ("lokr_t2", *DORA), _inner("lokr_w2_b", "lokr_w1_b"))
    yield Kind("full difference", ("diff",), _full, DORA)
    yield Kind("norm difference", ("w_norm",), _norm, ("b_norm", "alpha"))
    yield Kind("OFT", ("oft_blocks",), _oft, ("rescale", "alpha"))
    yield Kind("IA3", ("weight", "on_input"), _ia3, ("alpha",))
    yield Kind("GLoRA", ("a1.weight", "a2.weight", "b1.weight", "b2.weight"), _glora, ("alpha",),
               lambda f: min(f["a1.weight"].shape[:2]))


KINDS = tuple(_kinds())


def scale_of_peft(alpha: float, rank: int, rank_stabilised: bool) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank
