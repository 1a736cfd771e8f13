"""What a network is to everything else: `network(x, t, context, patches=()) -> out`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ella_kd.models.context import Context

if TYPE_CHECKING:
    from ella_kd.models.patches import Patch

Patches = Sequence[tuple[int, "Patch | None"]]
"""What rows of a batch do differently in one call: how many rows, and their patch, in the order of the batch."""
Levels = tuple[float, ...]
"""The sigmas of a call, known to the host: one for the whole batch, or one per row."""


@dataclass(frozen=True, eq=False)
class Deep:
    """A UNet's features below the skip of input_blocks[branch]: those of an earlier call, in place of working them out
    again, or None to have them worked out. The call then gives its answer and the features."""

    branch: int
    features: Tensor | None = None


def above(level: float, boundary: float) -> bool:
    """level > boundary, both in fp32: a boundary written 0.1 is hit by the 0.1 of an fp32 run and of an fp64 one."""
    return bool(np.float32(level) > np.float32(boundary))


def check_window(sigma_lo: float, sigma_hi: float) -> None:
    """Raises ValueError unless 0 <= sigma_lo < sigma_hi."""
    if not 0 <= sigma_lo < sigma_hi:
        raise ValueError(f"a window needs 0 <= sigma_lo < sigma_hi, got {sigma_lo} and {sigma_hi}")


def within(level: float, sigma_lo: float, sigma_hi: float) -> bool:
    """sigma_lo < level <= sigma_hi, as `above` compares."""
    return above(level, sigma_lo) and not above(level, sigma_hi)


class Network(Protocol):
    """What predicts eps, v or EDM's F; whoever keeps this composes with every denoiser, rule and sampler.

    Called with x [B, in_channels less the context's channels, h, w] and the context's floats in `dtype`, t [B] fp32
    -> [B, out_channels, h, w]. places: where a patch can act, `()` if nowhere. A Pipeline's is an nn.Module
    too, so that it can be moved, cast and compiled.
    """

    @property
    def in_channels(self) -> int: ...

    @property
    def out_channels(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def places(self) -> tuple[str, ...]: ...

    def at(self, levels: Levels) -> Self:
        """The network for these noise levels: itself, unless it varies with sigma."""
        ...

    def __call__(self, x: Tensor, t: Tensor, context: Context, patches: Patches = ()) -> Tensor: ...


class OfTokens:
    """Anybody's `unet(x, t, tokens)`, or `unet(x, t, tokens, mask)` where a conditioning has a mask, as a Network.

    Its dtype is that of its first floating parameter, or that of x; channels are concatenated to x; it has no places.
    """

    places: tuple[str, ...] = ()

    def __init__(self, unet: Any) -> None:
        if not callable(unet):
            raise TypeError(f"a network is called as unet(x, t, tokens), got {type(unet).__name__}")
        self.unet = unet

    @property
    def in_channels(self) -> int:
        return self._channels("in_channels")

    @property
    def out_channels(self) -> int:
        return self._channels("out_channels")

    @property
    def dtype(self) -> torch.dtype | None:
        parameters: Iterable[Tensor] = getattr(self.unet, "parameters", tuple)()
        return next((p.dtype for p in parameters if p.is_floating_point()), None)

    def at(self, levels: Levels) -> Self:
        return self

    def __call__(self, x: Tensor, t: Tensor, context: Context, patches: Patches = ()) -> Tensor:
        refuse_patches(patches, self.unet)
        refuse_inputs(context, ("channels",), self.unet)
        args = (context.tokens,) if context.mask is None else (context.tokens, context.mask)
        out = self.unet(context.beside_x(x), t, *args)
        if not isinstance(out, Tensor):
            raise TypeError(f"{type(self.unet).__name__} must return a tensor, got {type(out).__name__}: wrap a UNet "
                            "of diffusers in DiffusersUNet")
        return out

    def _channels(self, name: str) -> int:
        """As the network or its config says, else 4, Stable Diffusion's."""
        return int(getattr(self.unet, name, None) or getattr(getattr(self.unet, "config", None), name, None) or 4)


def as_network(unet: Any) -> Any:
    """A Network as it is, anything else that can be called as one of tokens. Raises TypeError if it cannot be called.
    """
    return unet if hasattr(unet, "at") and hasattr(unet, "places") else OfTokens(unet)


def refuse_inputs(context: Context, known: Sequence[str], network: object) -> None:
    """Raises ValueError if the context has an input beside tokens that the network would not see."""
    for own in fields(context)[2:]:
        if own.name not in known and getattr(context, own.name) is not None:
            raise ValueError(f"{type(network).__name__} does not see {own.metadata['what']} ({own.name}): leave it "
                             "out, or use a network that does")


def refuse_patches(patches: Patches, network: object) -> None:
    """Raises ValueError if there are any: the network has no place for them."""
    if any(patch is not None for _, patch in patches):
        raise ValueError(f"this guidance changes what happens inside the UNet, and {type(network).__name__} has no "
                         "patch point: use ella_kd's own UNet")
