"""What every network around other networks has in common."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from ella_kd.models.network import Levels


class Around(nn.Module):
    """A `models.network.Network` made of others, `networks`, which all have one kind of inputs and outputs.

    A subclass has them, and makes the same of other ones: `of(*networks)`. So LoRAs, changes inside of UNets and
    faster convolutions reach every UNet in it, however deep (`each`).
    """

    networks: Any

    def of(self, network: Any, *others: Any) -> Self:
        """The same around other networks."""
        raise NotImplementedError

    def each(self, f: Callable[[Any], Any]) -> Self:
        """The same around f(network), f called once for each network that comes more than once."""
        found: dict[int, Any] = {}
        for network in self.networks:
            if id(network) not in found:
                found[id(network)] = f(network)
        return self.of(*(found[id(network)] for network in self.networks))

    @property
    def in_channels(self) -> int:
        return self.networks[0].in_channels

    @property
    def out_channels(self) -> int:
        return self.networks[0].out_channels

    @property
    def dtype(self) -> torch.dtype:
        return self.networks[0].dtype

    @property
    def places(self) -> tuple[str, ...]:
        """Where a patch can act in all of them."""
        first, *rest = (network.places for network in self.networks)
        return tuple(place for place in first if all(place in other for other in rest))

    @property
    def config(self) -> Any:
        return self.networks[0].config

    @property
    def vector_dim(self) -> int | None:
        return getattr(self.networks[0], "vector_dim", None)

    @property
    def guidance_dim(self) -> int | None:
        return getattr(self.networks[0], "guidance_dim", None)

    @property
    def wraps(self) -> bool:
        """Whether the picture's right edge goes on at its left one (`Tiled`)."""
        return any(getattr(network, "wraps", False) for network in self.networks)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile each network in place: what is called is one of them."""
        for network in {id(network): network for network in self.networks}.values():
            network.compile(*args, **options)


class AroundOne(Around):
    """One `network`, called in another way than it is."""

    network: Any

    @property
    def networks(self) -> tuple[Any, ...]:
        return (self.network,)

    def at(self, levels: Levels) -> Any:
        network = self.network.at(levels)
        return self if network is self.network else self.of(network)


def innermost(network: Any) -> Any:
    """The first of the networks that a network is made of, or itself; what torch.compile has wrapped."""
    while isinstance(network, Around):
        network = network.networks[0]
    return getattr(network, "_orig_mod", network)
