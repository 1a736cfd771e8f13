"""Denoisers: a network that was trained on timesteps, seen as `model(x, sigma, cond) -> denoised`.

The contract is k-diffusion's, attributes included. x = x0 + sigma * noise (variance exploding); the network was trained
on x_in = c_in * x and on t, and returns eps or v.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ella_kd.conditioning import ELLA, Composition, Conditioning, Constant, Context, levels_of
from ella_kd.models.noise_schedule import EDMSchedule, NoiseSchedule
from ella_kd.models.text import TextFeatures
from ella_kd.models.tsc import TSC
from ella_kd.models.unet import Patches

Condition = Conditioning | Composition | TextFeatures | Tensor
"""What a script may pass as `cond`; a composition needs a guided denoiser."""


class LDMDenoiser(nn.Module):
    """A latent-diffusion network as a k-diffusion denoiser: `denoiser(x, sigma, cond) -> denoised`.

    inner_model: any `unet(x, t, context)`, and `unet(x, t, context, mask)` where a conditioning has a mask, of any
    dtype. noise_schedule: what it was trained on, and whether it returns eps or v; with an EDMSchedule, which has a
    sigma_data, the network is one in EDM's preconditioning (Playground v2.5). quantize: round t to the nearest
    integer. With constant tokens this equals k-diffusion's `CompVisDenoiser` (eps) and `CompVisVDenoiser` (v).
    """

    def __init__(self, inner_model: nn.Module, noise_schedule: NoiseSchedule | EDMSchedule | None = None,
                 quantize: bool = False) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.noise_schedule = noise_schedule or NoiseSchedule.sd15()
        self.quantize = quantize

    @property
    def sigma_data(self) -> float:
        """The standard deviation of the data that the network's scalings assume; 1 without EDM's preconditioning."""
        return self.noise_schedule.sigma_data if isinstance(self.noise_schedule, EDMSchedule) else 1.0

    @property
    def sigma_min(self) -> float:
        return self.noise_schedule.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.noise_schedule.sigma_max

    @property
    def sigmas(self) -> Tensor:
        """[N] float64, ascending: the noise levels of the timesteps 0 .. N - 1."""
        return self.noise_schedule.sigmas

    @property
    def log_sigmas(self) -> Tensor:
        """[N] float64, ascending."""
        return self.noise_schedule.log_sigmas

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """The timestep of a noise level: any shape -> fp32, clamped to the schedule."""
        return self.noise_schedule.sigma_to_t(sigma, self.quantize if quantize is None else quantize)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The noise level of a timestep: any shape, dtype kept."""
        return self.noise_schedule.t_to_sigma(t)

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """n noise levels evenly spaced in t, or all of them, descending, then 0: [n + 1], default dtype."""
        last = len(self.sigmas) - 1
        t = torch.linspace(last, 0, last + 1 if n is None else n, dtype=torch.float64)
        return torch.cat([self.t_to_sigma(t), t.new_zeros(1)]).to(torch.get_default_dtype())

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in of `denoised = c_skip * x + c_out * network(c_in * x)`, each shaped as sigma.

        eps: x0 = x - sigma * eps. v (Salimans and Ho 2022, arXiv 2202.00512): v = c_in * (noise - sigma * x0).
        EDM: Karras et al. 2022 (arXiv 2206.00364), table 1.
        """
        if isinstance(self.noise_schedule, EDMSchedule):
            return self.noise_schedule.scalings(sigma)
        c_in = (sigma**2 + 1) ** -0.5
        if self.noise_schedule.prediction == "v":
            return c_in**2, -sigma * c_in, c_in
        return torch.ones_like(sigma), -sigma, c_in

    def lift(self, cond: Condition) -> Conditioning:
        """What a script may pass as `cond`, as a conditioning: text features or bare tokens [B, L, D] are constant."""
        if isinstance(cond, Composition):
            raise TypeError(f"{type(cond).__name__} combines several answers of the network: give it to a "
                            "GuidedDenoiser or CFGDenoiser around this one")
        return cond if isinstance(cond, Conditioning) else self._lift_features(_as_features(cond))

    def _lift_features(self, features: TextFeatures) -> Conditioning:
        return Constant(features)

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition, *, level: float | None = None,
                patches: Patches = ()) -> Tensor:
        """x [B, C, h, w] and sigma [B], fp32 or fp64 -> denoised, x's shape and dtype.

        cond: a Conditioning, TextFeatures or tokens [b, L, D], b = 1 or B. A sigma beyond the schedule is clamped to it
        for the network. level: the sigma of all rows as a number, where the caller knows it: a conditioning that
        switches with sigma then need not read it from the device. patches: what rows change in the UNet, (rows, patch)
        in order. Raises ValueError for a wrong shape or dtype, and for a sigma that is not finite and above 0;
        that last on the CPU only: reading it elsewhere would stall the device, so there the row becomes NaN.
        """
        c_skip, c_out, c_in = (c[:, None, None, None] for c in self.get_scalings(_checked(x, sigma)))
        return c_skip * x + c_out * self._network(c_in * x, sigma, cond, level, patches)

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
        s = _checked(x, sigma)[:, None, None, None]
        c_skip, c_out, c_in = self.get_scalings(s)
        if isinstance(self.noise_schedule, EDMSchedule):
            target = (x - c_skip * (x + s * noise)) / c_out
        else:
            target = c_in * (noise - s * x) if self.noise_schedule.prediction == "v" else noise
        return (self._network(c_in * (x + s * noise), sigma, cond) - target).square().flatten(1).mean(1)

    def _network(self, x_in: Tensor, sigma: Tensor, cond: Condition, level: float | None = None,
                 patches: Patches = ()) -> Tensor:
        conditioning = self.lift(cond)
        if conditioning.varies:
            conditioning = conditioning.at(levels_of(sigma, level))
        t = self.sigma_to_t(sigma)
        context = conditioning(t)
        _check_seen(context)
        dtype = next((p.dtype for p in self.inner_model.parameters() if p.is_floating_point()), x_in.dtype)
        seen = x_in if context.channels is None else torch.cat([x_in, context.channels.to(x_in)], 1)
        args = () if context.mask is None else (context.mask,)
        if patches and not hasattr(self.inner_model, "places"):
            raise ValueError("this guidance changes what happens inside the UNet, and "
                             f"{type(self.inner_model).__name__} has no patch point: use ella_kd's own UNet")
        inside = {"patches": patches} if patches else {}  # other people's networks do not know the argument
        return self.inner_model(seen.to(dtype), t, context.tokens.to(dtype), *args, **inside).to(x_in.dtype)

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """The timesteps of a run's sigmas [N], to plan for. Raises ValueError if one is not finite and above 0."""
        return self.sigma_to_t(_positive(sigmas))

    def planned(self, sigmas: Tensor, extra_args: Mapping[str, Any]) -> dict[str, Any]:
        """The sampler's extra_args with `cond` planned for every sigma [N] of the run; call it before the loop.

        `level` is added for the sampler to fill with each evaluation's sigma.
        """
        if "cond" not in extra_args:
            return dict(extra_args)
        return {**extra_args, "cond": self.lift(extra_args["cond"]).planned(self.timesteps(sigmas)), "level": None}


class ELLADenoiser(LDMDenoiser):
    """An LDMDenoiser whose text goes through ELLA's connector, at exactly the timestep that the network is given.

    tsc: the Timestep-Aware Semantic Connector (arXiv 2403.05135). Text features [B, L, D], or a bare tensor, are lifted
    to `ELLA(tsc, features)`; a Conditioning (a plain CLIP prompt, ELLA + CLIP) passes through.
    """

    def __init__(self, inner_model: nn.Module, tsc: TSC, noise_schedule: NoiseSchedule | None = None,
                 quantize: bool = False) -> None:
        super().__init__(inner_model, noise_schedule, quantize)
        self.tsc = tsc

    def _lift_features(self, features: TextFeatures) -> Conditioning:
        return ELLA(self.tsc, features)


def _check_seen(context: Context) -> None:
    """A row without a token to see would be NaN; the mask is read on the CPU only, elsewhere that would wait."""
    mask = context.mask if context.mask is not None and context.mask.device.type == "cpu" else None
    if not context.tokens.shape[1] or (mask is not None and not bool(mask.any(1).all())):
        raise ValueError("the conditioning has a row without a token to see: a closed window without `otherwise` "
                         "belongs beside other tokens, Concat(ella, window(...)), and a mask needs one that is seen")


def _as_features(cond: object) -> TextFeatures:
    if isinstance(cond, TextFeatures):
        return cond
    if isinstance(cond, Tensor):
        return TextFeatures(cond, None)
    raise TypeError("a condition is a Conditioning, text features or a tensor [B, L, D]; got "
                    f"{type(cond).__name__}: encode prompts first, cond=t5(prompt)")


def _checked(x: Tensor, sigma: Tensor) -> Tensor:
    """sigma [B] in x's dtype; what is not a noise level is an error on the CPU and NaN elsewhere."""
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64 [B, C, h, w], got {x.dtype} {list(x.shape)}: keep latents in "
                         "fp32, the network inside may be half")
    if sigma.shape != x.shape[:1]:
        raise ValueError(f"sigma must have shape [{len(x)}], one per sample, got {list(sigma.shape)}")
    if sigma.device.type == "cpu":
        _positive(sigma)
    return torch.where((sigma > 0) & sigma.isfinite(), sigma, torch.nan).to(x.dtype)


def _positive(sigma: Tensor) -> Tensor:
    if not bool(((sigma > 0) & sigma.isfinite()).all()):
        raise ValueError(f"a denoiser needs finite sigmas above 0, got {sigma.tolist()}")
    return sigma
