"""Networks made of networks: one for each window of noise levels, one for each row of a batch.

    early = BySigma(with_lora(unet, [(style, 1.0)]), unet, at=5.0)          # the LoRA above sigma 5 alone
    rows = ByRow([with_lora(unet, [(style, s)]) for s in (0.0, 0.5, 1.0)])  # three pictures of three strengths

Each keeps the protocol of `models.network.Network`, so it stands wherever a UNet does: `replace(sd, unet=rows)`. Twins
of one network share what no LoRA has touched, so that each costs no more than its own weights.
"""

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ella_kd.models.around import Around
from ella_kd.models.context import Context
from ella_kd.models.devices import outliving, upload
from ella_kd.models.network import Levels, Patches, above
from ella_kd.models.patches import Recorder, in_part

ALIKE = ("in_channels", "out_channels", "dtype", "vector_dim", "guidance_dim")


class Several(Around):
    """What is made of networks of equal inputs, outputs and dtype.

    networks: in their order, one may come more than once. Raises ValueError for none, or for networks that differ,
    TypeError for what is no Network.
    """

    def __init__(self, networks: Sequence[Any]) -> None:
        super().__init__()
        if not networks:
            raise ValueError(f"{type(self).__name__} needs a network at least")
        for network in networks:
            if not isinstance(network, nn.Module) or not hasattr(network, "at") or not hasattr(network, "places"):
                raise TypeError(f"{type(self).__name__} is made of networks, such as a UNet of ours, got "
                                f"{type(network).__name__}: wrap a UNet of diffusers in DiffusersUNet")
        for name in ALIKE:
            values = [getattr(network, name, None) for network in networks]
            if len(set(values)) > 1:
                raise ValueError(f"the networks of one {type(self).__name__} take and give the same, their {name} is "
                                 f"{', '.join(map(str, values))}")
        self.networks: Any = nn.ModuleList(networks)


class BySigma(Several):
    """One network after another as the noise falls: `BySigma(high, low, at=5.0)`, as `Switch` is of conditions.

    at: the sigmas between the networks, falling, one less than there are networks: the first one holds above at[0], the
    next for at[1] < sigma <= at[0], and so on; `BySigma(unet, twin, unet, at=(10.0, 2.0))` is a window. Rows of one
    call at several sigmas each get theirs. Raises ValueError for boundaries that do not fall, and as `Several` does.
    """

    def __init__(self, *networks: Any, at: float | Sequence[float]) -> None:
        super().__init__(networks)
        self.boundaries = (float(at),) if isinstance(at, (int, float)) else tuple(map(float, at))
        falling = all(a > b for a, b in pairwise((math.inf, *self.boundaries, -math.inf)))
        if len(self.boundaries) != len(networks) - 1 or not falling:
            raise ValueError(f"{len(networks)} networks by sigma need {len(networks) - 1} falling sigmas between them, "
                             f"got {list(self.boundaries)}")

    def of(self, network: Any, *others: Any) -> Self:
        return type(self)(network, *others, at=self.boundaries)

    def at(self, levels: Levels) -> Any:
        """The network that holds; of one level per row, where several do, a `ByRow` of them."""
        which = [sum(not above(level, boundary) for boundary in self.boundaries) for level in levels]
        if len(set(which)) == 1:
            return self.networks[which[0]].at(levels)
        return ByRow([self.networks[i] for i in which]).at(levels)

    def forward(self, x: Tensor, t: Tensor, context: Context, patches: Patches = ()) -> Tensor:
        raise ValueError("a network by sigma is decided by sigma, and t does not tell it: call network.at((sigma,))(x, "
                         "t, context), as a denoiser does")


class ByRow(Several):
    """One network for each row of a batch: `ByRow([a, b, b])` for three pictures; rows of one network go together.

    A call has the rows of the batch once for each of its answers (cond, uncond), one answer after another. What is
    told of a row by a text encoder is not in the UNet: where a LoRA changes CLIP too, encode each row by the pipeline
    that has it and put the rows in one condition,

        twins = [sd.with_lora((style, s)) for s in (0.0, 0.5, 1.0)]
        cond = Stack(*(twin.encode(prompt, "clip") for twin in twins))
        draw(replace(sd, unet=ByRow([twin.unet for twin in twins])), cond, uncond=..., seeds=[7, 7, 7])

    A patch that looks from one row at another needs both in one network. Raises ValueError for a batch of another size,
    and as `Several` does.
    """

    def of(self, network: Any, *others: Any) -> Self:
        return type(self)((network, *others))

    def at(self, levels: Levels) -> Any:
        if len(levels) not in (1, len(self.networks)):
            raise ValueError(f"a network by row was made for {len(self.networks)} rows, got {len(levels)}")
        if len(levels) == 1:
            return self._now(self.each(lambda network: network.at(levels)))
        return self._now(self.of(*(network.at((level,)) for network, level in zip(self.networks, levels))))

    def _now(self, found: Self) -> Self:
        return self if all(a is b for a, b in zip(found.networks, self.networks)) else found

    def forward(self, x: Tensor, t: Tensor, context: Context | Tensor, patches: Patches = ()) -> Tensor:
        own, seen = len(self.networks), Context.of(context)
        if len(x) % own:
            raise ValueError(f"a network by row was made for {own} rows, and was called with {len(x)}")
        each = [patch for count, patch in patches for _ in range(count)]
        rows: dict[int, list[int]] = {}
        for row in range(len(x)):
            rows.setdefault(id(self.networks[row % own]), []).append(row)
        if len(rows) == 1:
            return self.networks[0](x, t, seen, patches)
        parts: list[Tensor] = []
        maps: dict[Recorder, Tensor] = {}
        for wanted in rows.values():
            index = upload(torch.tensor(wanted), x.device)
            runs = groupby(each[row] for row in wanted) if each else ()
            some, recorders = in_part([(len(list(run)), patch) for patch, run in runs])
            answer = self.networks[wanted[0] % own](x[index], t[index], seen.take(wanted), some)
            parts.append(outliving(answer))
            for whole, part in recorders.items():
                watched = [row for row, patch in enumerate(each) if patch is whole]
                received = F.interpolate(part.received, x.shape[2:])  # networks may differ in the sizes of their maps
                found = maps.setdefault(whole, received.new_zeros(len(watched), 1, *x.shape[2:]))
                here = torch.tensor([watched.index(row) for row in wanted if each[row] is whole])
                found[upload(here, x.device)] = received
        for whole, found in maps.items():
            whole.keep(found)
        order = [row for wanted in rows.values() for row in wanted]
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
        return torch.cat(parts)[upload(back, x.device)]
