"""Rules that change what is answered, whatever the prompt says: colour, contrast, mirror images.

Each wraps another and acts where sigma_lo < sigma <= sigma_hi: high noise for the whole, low noise for what is seen.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ella_kd.guidance.rule import Answers, Branch, Guidance
from ella_kd.models import AutoencoderKL
from ella_kd.models.devices import upload

Axis = Literal["x", "y"]


@dataclass(frozen=True)
class _Toned(Guidance):
    """A rule whose answer is changed in an interval of noise levels. ValueError for an empty one."""

    base: Guidance

    def __post_init__(self) -> None:
        super().__post_init__()
        lo, hi = self._window
        if not 0 <= lo < hi:
            raise ValueError(f"{type(self).__name__} needs 0 <= sigma_lo < sigma_hi, got {lo} and {hi}")

    @property
    def _window(self) -> tuple[float, float]:
        return self.sigma_lo, self.sigma_hi  # type: ignore[attr-defined]

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.base.branches

    def __call__(self, answers: Answers) -> Tensor:
        denoised, (lo, hi) = self.base(answers), self._window
        sigma = answers.sigma.float()
        return torch.where((sigma > lo) & (sigma <= hi), self._changed(denoised), denoised)

    @abstractmethod
    def _changed(self, denoised: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Shifted(_Toned):
    """The answer with a number added to each channel: colour and brightness in latents (as "Vectorscope CC" does).

    channels: one per latent channel; `towards(vae, red=0.1)` says what they are for a colour. ValueError for another
    count than the latents have, when it is called.
    """

    channels: tuple[float, ...] = ()
    sigma_lo: float = 0.0
    sigma_hi: float = math.inf

    def _changed(self, denoised: Tensor) -> Tensor:
        if len(self.channels) != denoised.shape[1]:
            raise ValueError(f"Shifted needs a number for each of {denoised.shape[1]} channels, got {self.channels}")
        return denoised + upload(torch.tensor(self.channels, dtype=denoised.dtype), denoised.device).view(1, -1, 1, 1)


@dataclass(frozen=True)
class Contrast(_Toned):
    """The answer's channels, each `factor` times as far from its mean. ValueError for a factor below 0."""

    factor: float = 1.1
    sigma_lo: float = 0.0
    sigma_hi: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.factor < math.inf:
            raise ValueError(f"a contrast is a factor of 0 or more, got {self.factor}")

    def _changed(self, denoised: Tensor) -> Tensor:
        return torch.lerp(denoised.mean((2, 3), keepdim=True), denoised, self.factor)


@dataclass(frozen=True)
class Mirrored(_Toned):
    """The mean of the answer and its mirror image: left is right (axis "x"), or above is below ("y").

    With a sigma_lo details may differ between the halves. ValueError for another axis.
    """

    axis: Axis = "x"
    sigma_lo: float = 0.0
    sigma_hi: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis not in get_args(Axis):
            raise ValueError(f"unknown axis {self.axis!r}: choose {', '.join(get_args(Axis))}")

    def _changed(self, denoised: Tensor) -> Tensor:
        return (denoised + denoised.flip(3 if self.axis == "x" else 2)) / 2


@torch.no_grad()
def towards(vae: AutoencoderKL, red: float = 0.0, green: float = 0.0, blue: float = 0.0) -> tuple[float, ...]:
    """The channels that `Shifted` takes for a colour: how far this autoencoder's latents of grey are from those of grey
    with these shares of full range added. Numbers from -1 to 1; ValueError beyond."""
    if not all(abs(share) <= 1 for share in (red, green, blue)):
        raise ValueError(f"shares of full range, from -1 to 1, got {red}, {green}, {blue}")
    side = 8 * vae.factor
    grey = torch.zeros(1, 3, side, side, device=vae.quant_conv.weight.device, dtype=vae.dtype)
    colour = grey + grey.new_tensor([red, green, blue]).view(1, 3, 1, 1)
    found = (vae.encode(colour) - vae.encode(grey)).float().mean((0, 2, 3))
    return tuple(found.tolist())


class Average:
    """A callback that keeps the denoised of a run's last steps: `.mean` [B, C, h, w], smoother than one alone."""

    def __init__(self, last: int) -> None:
        if last < 1:
            raise ValueError(f"an average is of the last steps, 1 or more, got {last}")
        self.last, self.denoised = last, list[Tensor]()

    def __call__(self, record: dict[str, Tensor]) -> None:
        self.denoised = [*self.denoised, record["denoised"]][-self.last :]

    @property
    def mean(self) -> Tensor:
        if not self.denoised:
            raise ValueError("no step was taken yet: give it as callback")
        return torch.stack(self.denoised).mean(0)
