"""Denoisers: a network that was trained on timesteps, seen as `model(x, sigma, cond) -> denoised`.

The contract is k-diffusion's, attributes included. x = x0 + sigma * noise (variance exploding); the network was trained
on x_in = c_in * x and on t, and returns eps or v.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ella_kd.bound import BoundRun, Conditions, check_levels, check_x
from ella_kd.conditioning import ELLA, Conditioning, Constant, Levels, as_conditioning, levels_of
from ella_kd.models.network import as_network
from ella_kd.models.noise_schedule import EDMSchedule, NoiseSchedule
from ella_kd.models.text import TextFeatures
from ella_kd.models.tsc import TSC
from ella_kd.samplers.model import Prediction

Condition = Conditioning | TextFeatures | Tensor
"""What a script may pass as `cond`."""


class Denoiser(nn.Module, ABC):
    """What every denoiser has: k-diffusion's call and attributes, all made of `bind` and of the noise schedule."""

    inner_model: nn.Module

    @property
    @abstractmethod
    def schedule(self) -> NoiseSchedule | EDMSchedule:
        """What the network was trained on."""

    @abstractmethod
    def bind(self, x: Tensor, sigmas: Sequence[float] | Tensor | None = None, *, need_uncond: bool = False,
             **extra_args: Any) -> BoundRun:
        """The denoiser made ready for a run from latents like x: `bound(x, levels, scale=None) -> Prediction`.

        sigmas: every sigma that will be asked for (a last 0 is none of them); None where nobody knows. need_uncond:
        the prediction's uncond is wanted even where the guidance does without (CFG++). extra_args: as of the call.
        Everything that can be is lifted, planned, checked and decided here. Raises what the call raises.
        """

    def predict(self, x: Tensor, sigma: Tensor, need_uncond: bool = False, **extra_args: Any) -> Prediction:
        """The denoised with its two halves: x [B, C, h, w], sigma [B], fp32 or fp64."""
        check_x(x, sigma)
        bound = self.bind(x, None, need_uncond=need_uncond, **extra_args)
        return bound(x, levels_of(sigma.to(x.dtype)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._said()})"

    def _said(self) -> str:
        return type(self.inner_model).__name__

    @property
    def sigma_min(self) -> float:
        return self.schedule.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.schedule.sigma_max

    @property
    def sigmas(self) -> Tensor:
        """[N] float64, ascending: the noise levels of the timesteps 0 .. N - 1."""
        return self.schedule.sigmas

    @property
    def log_sigmas(self) -> Tensor:
        """[N] float64, ascending."""
        return self.schedule.log_sigmas

    @abstractmethod
    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """The timestep of a noise level: any shape -> fp32, clamped to the schedule."""

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The noise level of a timestep: any shape, dtype kept."""
        return self.schedule.t_to_sigma(t)

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """n noise levels evenly spaced in t, or all of them, descending, then 0: [n + 1], default dtype."""
        last = len(self.sigmas) - 1
        t = torch.linspace(last, 0, last + 1 if n is None else n, dtype=torch.float64)
        return torch.cat([self.t_to_sigma(t), t.new_zeros(1)]).to(torch.get_default_dtype())


class LDMDenoiser(Denoiser):
    """A latent-diffusion network as a k-diffusion denoiser: `denoiser(x, sigma, cond) -> denoised`.

    inner_model: a `models.network.Network`, or any `unet(x, t, tokens)`, and `unet(x, t, tokens, mask)` where a
    conditioning has a mask, of any dtype. noise_schedule: what it was trained on, and whether it returns eps or v; with
    an EDMSchedule the network is one in EDM's preconditioning (Playground v2.5). quantize: round t to the nearest
    integer. With constant tokens this equals k-diffusion's `CompVisDenoiser` (eps) and `CompVisVDenoiser` (v).
    """

    def __init__(self, inner_model: nn.Module, noise_schedule: NoiseSchedule | EDMSchedule | None = None,
                 quantize: bool = False) -> None:
        super().__init__()
        if isinstance(inner_model, Denoiser):
            raise TypeError(f"{type(self).__name__} takes a network, called as unet(x, t, tokens), got the denoiser "
                            f"{type(inner_model).__name__}: give it that one's inner_model")
        as_network(inner_model)
        self.inner_model = inner_model
        self.noise_schedule = noise_schedule or NoiseSchedule.sd15()
        self.quantize = quantize

    @property
    def schedule(self) -> NoiseSchedule | EDMSchedule:
        return self.noise_schedule

    @property
    def sigma_data(self) -> float:
        """The standard deviation of the data that the network's scalings assume; 1 without EDM's preconditioning."""
        return self.noise_schedule.sigma_data

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        return self.noise_schedule.sigma_to_t(sigma, self.quantize if quantize is None else quantize)

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in of `denoised = c_skip * x + c_out * network(c_in * x)`, each shaped as sigma."""
        return self.noise_schedule.scalings(sigma)

    def lift(self, cond: Condition) -> Conditioning:
        """What a script may pass as `cond`, as a conditioning: text features or bare tokens [B, L, D] are constant."""
        return as_conditioning(cond).map(lambda leaf: leaf.lifted(self._read))

    def _read(self, features: TextFeatures) -> Conditioning:
        return Constant(features)

    def bind(self, x: Tensor, sigmas: Sequence[float] | Tensor | None = None, *,  # type: ignore[override]
             cond: Condition, need_uncond: bool = False) -> BoundRun:
        """See `Denoiser.bind`. Raises TypeError if an uncond is needed: there is none without a guided denoiser."""
        if need_uncond:
            raise TypeError("CFG++ needs the unconditional denoised: put a CFGDenoiser around this "
                            f"{type(self).__name__}")
        levels = run_levels(sigmas, x)
        run = BoundRun(self, x, levels, {"cond": self.lift(cond)})
        run.prepare(levels[:1])
        return run

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """x [B, C, h, w] and sigma [B], fp32 or fp64 -> denoised, x's shape and dtype.

        cond: a Conditioning, TextFeatures or tokens [b, L, D], b = 1 or B. A sigma beyond the schedule is clamped to it
        for the network. Raises ValueError for a wrong shape or dtype, and for a sigma that is not finite and above 0.
        sigma is read by the host, which waits for a device; a sampler of ours knows it and spares that.
        """
        return self.predict(x, sigma, cond=cond).denoised

    def compile(self, **options: Any) -> None:
        """Compile the network in place with torch.compile, as `nn.Module.compile` does; the first call then takes long.

        One compilation serves every prompt, seed, guidance scale and number of steps: what is compiled is the network
        alone, whose arguments are tensors. Another size, batch, count of tokens, or tokens with a mask where there was
        none, is compiled anew, since static shapes are faster (options: dynamic=True for one slower network for all).
        On a GPU each shape is recorded as a CUDA graph (mode="reduce-overhead"). options: those of torch.compile.
        """
        device = next((p.device.type for p in self.inner_model.parameters()), "cpu")
        chosen = {"dynamic": False, **({"mode": "reduce-overhead"} if device == "cuda" else {}), **options}
        if "options" in chosen:
            chosen.pop("mode", None)  # torch.compile takes one of them
        self.inner_model.compile(**chosen)

    def loss(self, x: Tensor, noise: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """The network's mean squared error per sample [B], in its own units (eps, v, EDM's F), at x + sigma * noise.

        x (clean latents) and noise [B, C, h, w], sigma [B]. Gradients reach the network and the connector.
        """
        check_x(x, sigma)
        levels = check_levels(levels_of(sigma.to(x.dtype)))
        s = sigma[:, None, None, None].to(x.dtype)
        network, t, conditioning = as_network(self.inner_model), self.sigma_to_t(sigma), self.lift(cond)
        dtype = network.dtype or x.dtype
        x_in = self.get_scalings(s)[2] * (x + s * noise)
        out = network.at(levels)(x_in.to(dtype), t, conditioning.at(levels)(t).to(dtype)).to(x.dtype)
        return (out - self.noise_schedule.target(x, noise, s)).square().flatten(1).mean(1)


class ELLADenoiser(LDMDenoiser):
    """An LDMDenoiser whose text goes through ELLA's connector, at exactly the timestep that the network is given.

    tsc: the Timestep-Aware Semantic Connector (arXiv 2403.05135). Text features [B, L, D], or a bare tensor, are lifted
    to `ELLA(tsc, features)`; a Conditioning (a plain CLIP prompt, ELLA + CLIP) passes through.
    """

    def __init__(self, inner_model: nn.Module, tsc: TSC, noise_schedule: NoiseSchedule | EDMSchedule | None = None,
                 quantize: bool = False) -> None:
        super().__init__(inner_model, noise_schedule, quantize)
        self.tsc = tsc

    def _read(self, features: TextFeatures) -> Conditioning:
        return ELLA(self.tsc, features)


def run_levels(sigmas: Sequence[float] | Tensor | None, x: Tensor) -> Levels:
    """A run's distinct sigmas as x's dtype rounds them, without a 0; none for None. ValueError for what is no sigma."""
    if sigmas is None:
        return ()
    values = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").to(x.dtype).tolist()
    return check_levels(tuple(dict.fromkeys(value for value in values if value)))


def lift_all(denoiser: LDMDenoiser, conditions: Mapping[str, Condition | None]) -> Conditions:
    """The conditions that there are, lifted. TypeError for an argument that is none."""
    for name, value in conditions.items():
        if name not in ("cond", "uncond") and not isinstance(value, (Conditioning, TextFeatures, Tensor, type(None))):
            raise TypeError(f"unknown argument {name}: a denoiser takes cond, uncond and other conditions, got "
                            f"{type(value).__name__}; a CFGDenoiser takes cond_scale too")
    return {name: denoiser.lift(condition) for name, condition in conditions.items() if condition is not None}
