"""Fewer evaluations' worth of work: what changes little from one noise level to the next is worked out for several.

DeepCache (Ma et al. 2023, arXiv 2312.00858): of a UNet, all that lies below one skip is worked out at the first of
`every` neighbouring noise levels and reused at the others, where only the finest layers run. What is reused belongs to
the run, row by row, and is saved and resumed with it; a network keeps nothing.
"""

import math
from typing import Any, Self

from torch import Tensor

from ella_kd.models.around import AroundOne
from ella_kd.models.context import Context
from ella_kd.models.inside import Inside
from ella_kd.models.network import Levels, Patches, check_window, within
from ella_kd.models.unet import UNet


class Reuse(AroundOne):
    """A `models.network.Network` that is worked out in part only at most levels of a run: `Reuse(unet, 3)`.

    every: how many neighbouring levels of the run's schedule share the deep features, 1 for none; branch: the skip
    below which they lie, 0 the finest. uncond: how many share the whole answer about the uncond, 1 for none. sigma_lo <
    sigma <= sigma_hi: where; elsewhere, and outside of runs, it is the network itself. A run's levels are counted from
    the first in the window. Of a level that a method evaluates twice (Heun) or comes back to (restart), the second
    evaluation reuses what is still held of the same group. Where deep features are reused, a ControlNet runs no further
    than they begin. dpm_adaptive and the k-diffusion package's samplers tell no
    levels beforehand: there nothing is reused, nor inside tiles.
    Raises TypeError for a network whose inside is not known, ValueError for numbers that make no sense.
    """

    def __init__(self, network: Any, every: int = 3, uncond: int = 1, branch: int = 0, *, sigma_hi: float = math.inf,
                 sigma_lo: float = 0.0) -> None:
        super().__init__()
        for name, count in (("every", every), ("uncond", uncond)):
            if type(count) is not int or count < 1:
                raise ValueError(f"{name} is how many levels share something, a whole number from 1 on, got {count}")
        check_window(sigma_lo, sigma_hi)
        if every > 1:
            if not isinstance(network, (UNet, Inside)):
                raise TypeError("the features inside of ella_kd's own UNet are reused, with changes or without, got "
                                f"{type(network).__name__}: put other networks around it")
            (network.unet if isinstance(network, Inside) else network).cut(branch)
        self.network, self.every, self.uncond, self.branch = network, every, uncond, branch
        self.sigma_hi, self.sigma_lo = sigma_hi, sigma_lo

    @property
    def how(self) -> tuple[float, ...]:
        """What is reused, and where."""
        return self.every, self.uncond, self.branch, self.sigma_hi, self.sigma_lo

    def of(self, network: Any, *others: Any) -> Self:
        return type(self)(network, self.every, self.uncond, self.branch, sigma_hi=self.sigma_hi,
                          sigma_lo=self.sigma_lo)

    def groups(self, levels: Levels, planned: Levels) -> tuple[int | None, int | None]:
        """Which group of a run's planned levels shares deep features at these ones, and which the uncond's answer; None
        where nothing is shared."""
        if len(levels) != 1 or not self._holds(levels[0]):
            return None, None
        inside = [level for level in planned if self._holds(level)]
        if levels[0] not in inside:
            return None, None
        n = inside.index(levels[0])
        return (n // self.every if self.every > 1 else None), (n // self.uncond if self.uncond > 1 else None)

    def _holds(self, level: float) -> bool:
        return within(level, self.sigma_lo, self.sigma_hi)

    def at(self, levels: Levels) -> Any:
        """The network itself: what is reused is told by a run."""
        return self.network.at(levels)

    def forward(self, x: Tensor, t: Tensor, context: Context | Tensor, patches: Patches = ()) -> Tensor:
        return self.network(x, t, context, patches)
