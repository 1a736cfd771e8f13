"""Textures that meet themselves: networks whose convolutions see the opposite edge beyond an edge, A1111's "tiling"."""

from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ella_kd.models.around import Around
from ella_kd.models.parameters import Recipe, sharing
from ella_kd.models.vae import VAEDownsample
from ella_kd.models.winograd import WinogradConv2d

M = TypeVar("M", bound=nn.Module)


def seamless(network: M) -> M:
    """The same network on a torus: `seamless(unet)`, `seamless(vae)`; a picture drawn by both can be laid side by side.

    A picture moved around its edges comes out moved alike, by whole cells of the coarsest level. The network given
    stays as it is and shares its tensors; of a network made of networks each one is changed. Before or after
    `with_lora` and `fast_on_cpu`. A ControlNet beside it keeps its own edges.
    """
    if isinstance(network, Around):
        return network.each(seamless)
    recipe = Recipe.of(network)
    return replace(recipe, finish=(*recipe.finish, around)).on(around(sharing(network)))


def is_seamless(network: Any) -> bool:
    """Whether something of it is."""
    return isinstance(network, nn.Module) and any(
        isinstance(module, nn.Conv2d) and module.padding_mode == "circular" for module in network.modules())


def around(network: M) -> M:
    """The network itself, every convolution that pads made circular."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and any(p != 0 for p in module.padding):
            module.padding_mode = "circular"
        elif isinstance(module, WinogradConv2d):
            module.around = True
        elif isinstance(module, VAEDownsample):
            module.padding = "circular"
    return network
