"""Large pictures from a network of small ones, near and far at once: DemoFusion's local and dilated evaluations.

Du et al. 2023, arXiv 2311.16973, sections 3.2 and 3.4; the loop around them is `ella_kd.pictures.progressive`.
"""

import math
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ella_kd.models.around import AroundOne
from ella_kd.models.context import Context
from ella_kd.models.devices import outliving
from ella_kd.models.network import Patches, as_network
from ella_kd.models.patches import Recorder, in_part
from ella_kd.models.tiled import Tiled

LEAST = 0.01  # of the blur, where the noise is gone


def fading(t: Tensor, timesteps: int = 1000) -> Tensor:
    """(1 + cos(pi (T - t) / T)) / 2: 1 where all is noise, 0 at the picture; shaped as t."""
    return (1 + torch.cos(math.pi * (timesteps - t) / timesteps)) / 2


class Dilated(AroundOne):
    """A network that sees a picture as k x k interleaved ones of every k-th latent, each of the whole scene.

    What it sees is blurred before, so that the small pictures agree, by a Gaussian of 2k - 1 latents whose deviation
    falls from sigma to `LEAST` with the noise, and brought back to its mean and deviation, row by row. The answer
    belongs to what was not blurred. Channels are taken apart with the picture; a hint is seen whole by each of them.
    """

    def __init__(self, network: Any, k: int, sigma: float = 1.0, at_once: int = 4) -> None:
        super().__init__()
        if type(k) is not int or k < 1:
            raise ValueError(f"a picture is taken apart into k x k others, k at least 1, got {k!r}")
        self.network, self.k, self.sigma, self.at_once = as_network(network), k, sigma, at_once

    def of(self, network: Any, *others: Any) -> Self:
        return type(self)(network, self.k, self.sigma, self.at_once)

    def forward(self, x: Tensor, t: Tensor, context: Context | Tensor, patches: Patches = ()) -> Tensor:
        k, seen = self.k, Context.of(context)
        above, before = -x.shape[2] % k, -x.shape[3] % k
        padded = F.pad(x, (before, 0, above, 0))
        blurred = blur(padded, 2 * k - 1, self.sigma * ((1 - LEAST) * fading(t) + LEAST))
        (std, mean), (own_std, own_mean) = (torch.std_mean(z, (1, 2, 3), keepdim=True) for z in (padded, blurred))
        small = _apart((blurred - own_mean) / own_std * std + mean, k)
        channels = None if seen.channels is None else _apart(F.pad(seen.channels, (before, 0, above, 0)), k)
        found: list[Tensor] = []
        maps: list[dict[Recorder, Recorder]] = []
        for i in range(0, k * k, self.at_once):
            n = min(self.at_once, k * k - i)
            contexts = [seen if channels is None else replace(seen, channels=channels[j]) for j in range(i, i + n)]
            own = [in_part(patches) for _ in range(n)]
            out = self.network(torch.cat([*small[i:i + n]]), t.repeat(n), Context.stack(contexts),
                               [patch for part, _ in own for patch in part])
            found += outliving(out).chunk(n)
            maps += [recorders for _, recorders in own]
        for whole in maps[0]:
            received = [F.interpolate(recorders[whole].received, small[0].shape[2:]) for recorders in maps]
            whole.keep(_together(received, k)[:, :, above:, before:])
        return _together(found, k)[:, :, above:, before:]


class LocalAndGlobal(AroundOne):
    """DemoFusion's network for a picture k times as large as the network's own: tiles, and the dilated whole.

    `LocalAndGlobal(unet, 2, size=64)`: (1 - c) * local + c * global with c = `fading(t)`, so the whole scene decides
    while there is noise and the tiles in the end. overlap: half a tile if not given. The published jitter of the tiles
    is left out: it makes the denoised another function at every step.
    """

    def __init__(self, network: Any, k: int, size: int | tuple[int, int] = 64,
                 overlap: int | tuple[int, int] | None = None, sigma: float = 1.0, at_once: int = 4) -> None:
        super().__init__()
        height, width = size if isinstance(size, tuple) else (size, size)
        self.network = as_network(network)
        self.tiled = Tiled(self.network, (height, width), (height // 2, width // 2) if overlap is None else overlap,
                           at_once=at_once)
        self.dilated = Dilated(self.network, k, sigma, at_once)

    def of(self, network: Any, *others: Any) -> Self:
        return type(self)(network, self.dilated.k, self.tiled.tiles.size, self.tiled.tiles.overlap,
                          self.dilated.sigma, self.dilated.at_once)

    def forward(self, x: Tensor, t: Tensor, context: Context | Tensor, patches: Patches = ()) -> Tensor:
        (near, tiles), (far, apart) = in_part(patches), in_part(patches)
        local, whole = self.tiled(x, t, context, near), self.dilated(x, t, context, far)
        share = fading(t).to(local.dtype)[:, None, None, None]
        start = 0
        for rows, patch in patches:
            if isinstance(patch, Recorder):
                one, other = (F.interpolate(own[patch].received, x.shape[2:]) for own in (tiles, apart))
                patch.keep(torch.lerp(one, other, share[start:start + rows]))
            start += rows
        return torch.lerp(local, whole, share)


def blur(x: Tensor, size: int, sigma: Tensor) -> Tensor:
    """x [B, C, h, w] under a Gaussian of size x size latents, zeros around; sigma [B]: each row's deviation."""
    places = torch.arange(size, device=x.device) - (size - 1) / 2
    line = torch.exp(-(places / sigma[:, None].to(torch.promote_types(x.dtype, torch.float32))).square() / 2)
    line = (line / line.sum(1, keepdim=True)).to(x.dtype).repeat_interleave(x.shape[1], 0)  # [B * C, size]
    flat = x.flatten(0, 1)[None]
    flat = F.conv2d(flat, line[:, None, :, None], padding=(size // 2, 0), groups=len(line))
    return F.conv2d(flat, line[:, None, None], padding=(0, size // 2), groups=len(line)).view_as(x)


def _apart(x: Tensor, k: int) -> list[Tensor]:
    return [x[:, :, i::k, j::k] for i in range(k) for j in range(k)]


def _together(parts: list[Tensor], k: int) -> Tensor:
    """What `_apart` took apart."""
    whole = parts[0].new_empty(*parts[0].shape[:2], *(k * side for side in parts[0].shape[2:]))
    for i, part in enumerate(parts):
        whole[:, :, i // k::k, i % k::k] = part
    return whole
