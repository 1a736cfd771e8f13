"""Offsets: a file that holds the difference of two networks, to be added to a checkpoint's (IC-Light)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ella_kd.models.files.building import check_dtypes, disagreements, refuse
from ella_kd.models.files.layout import Part

FIRST = "input_blocks.0.0.weight"  # the convolution that sees x, and what is beside it


@dataclass(frozen=True, eq=False)
class Added(Part):
    """A network with another's tensors added to its own as they are read, in fp32."""

    base: Part | None = None
    offset: Part | None = None

    def read(self, name: str) -> Tensor:
        assert self.base is not None and self.offset is not None
        own, more = self.base.read(name).float(), self.offset.read(name).float()
        if own.shape == more.shape:
            return own + more
        wide = torch.zeros_like(more)
        wide[:, : own.shape[1]] = own  # of channels that it does not know the network sees nothing
        return wide + more


def added(base: Part, offset: Part) -> Part:
    """The UNet `base` plus `offset`, which may see more channels: the base's weights for those are 0.

    Raises ValueError naming the first tensors that do not agree, and for weights that are no floats.
    """
    wanted, wide = dict(base.shapes), tuple(offset.shapes.get(FIRST, ()))
    if FIRST in wanted and len(wide) == 4 and wide[1] >= wanted[FIRST][1]:
        wanted[FIRST] = (wanted[FIRST][0], wide[1], *wanted[FIRST][2:])
    refuse(disagreements(wanted, offset.shapes), f"{offset.weights.path} does not fit {base.weights.path}")
    for part in (base, offset):
        check_dtypes(part)
    sources = {name: replace(source, shape=tuple(wanted[name])) for name, source in base.sources.items()}
    return Added(base.name, base.weights, sources, base.prefix, base.config, base, offset)
