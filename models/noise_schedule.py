"""The noise levels a diffusion model was trained on: the map between timestep t and sigma."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["eps", "v"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The table of a variance-preserving model, seen as sigmas: `sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod)`.

    alphas_cumprod [N], strictly decreasing inside (0, 1), kept in float64 on the CPU. prediction says what the network
    returns: "eps" or "v". consistency: what it means is x at t = 0, by LCM's boundary condition. Between the table's
    entries log sigma is linear in t, as in k-diffusion's `DiscreteSchedule`.
    Raises ValueError for a table that is not such a sequence (a zero-terminal-SNR table ends in sigma = infinity).
    """

    alphas_cumprod: Tensor
    prediction: PredictionType = "eps"
    consistency: bool = False
    _log_sigmas_on: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)
    sigma_data: ClassVar[float] = 1.0  # the spread of the data that the scalings assume

    def __post_init__(self) -> None:
        table = self.alphas_cumprod.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod must have shape [N] with N >= 2, got {list(table.shape)}")
        if not (bool((table > 0).all()) and bool((table < 1).all()) and bool((table.diff() < 0).all())):
            raise ValueError("alphas_cumprod must decrease strictly inside (0, 1); rescaled zero-SNR tables do not")
        if self.prediction not in get_args(PredictionType):
            raise ValueError(f'prediction must be "eps" or "v", got {self.prediction!r}')
        object.__setattr__(self, "alphas_cumprod", table)

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, n: int = 1000,
                      prediction: PredictionType = "eps") -> "NoiseSchedule":
        """Betas whose square roots are linear in t (LDM's "linear" schedule, diffusers' "scaled_linear")."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, n, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(0), prediction)

    @classmethod
    def sd15(cls, prediction: PredictionType = "eps") -> "NoiseSchedule":
        """The schedule of Stable Diffusion 1.x and 2.x, and of ELLA: sigma from .0292 to 14.6146 in 1000 steps."""
        return cls.scaled_linear(prediction=prediction)

    @classmethod
    def linear(cls, beta_start: float, beta_end: float, n: int = 1000,
               prediction: PredictionType = "eps") -> "NoiseSchedule":
        """Betas linear in t (DDPM; diffusers' "linear")."""
        return cls((1 - torch.linspace(beta_start, beta_end, n, dtype=torch.float64)).cumprod(0), prediction)

    @classmethod
    def sd2_v(cls) -> "NoiseSchedule":
        """Stable Diffusion 2.x at 768: SD1.5's noise levels, v-prediction."""
        return cls.sd15("v")

    @classmethod
    def kolors(cls) -> "NoiseSchedule":
        """Kolors: scaled linear betas to .014 in 1100 steps; sigma to 29.2."""
        return cls.scaled_linear(0.00085, 0.014, 1100)

    @classmethod
    def paints_undo(cls) -> "NoiseSchedule":
        """Paints-UNDO: linear betas from .00085 to .020 in 1000 steps; sigma to 191."""
        return cls.linear(0.00085, 0.020)

    def zero_terminal_snr(self, last: float = 2.0**-24) -> "NoiseSchedule":
        """This schedule with its end moved to (almost) no signal (Lin et al. 2023, 2305.08891, algorithm 1).

        sqrt(alphas_cumprod) is shifted so that its last is 0 and scaled so that its first is kept; the last, which
        would be sigma = infinity, is then `last` (diffusers' 2^-24: sigma 4096). For models trained so; they predict v.
        """
        root = self.alphas_cumprod.sqrt()
        table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        if not 0 < last < float(table[-2]):
            raise ValueError(f"last must lie between 0 and the second smallest, {float(table[-2]):g}, got {last}")
        table[-1] = last
        return replace(self, alphas_cumprod=table)

    @property
    def sigmas(self) -> Tensor:
        """[N] float64, ascending."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @property
    def log_sigmas(self) -> Tensor:
        """[N] float64, ascending."""
        return self._log_sigmas(torch.device("cpu"))

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def sigma_to_t(self, sigma: Tensor, quantize: bool = False) -> Tensor:
        """The timestep of a noise level, fractional; with `quantize` the nearest integer one (nearest in log sigma).

        sigma, any shape and float dtype -> t fp32, same shape, clamped to [0, N - 1] as k-diffusion does. Computed in
        float64 (fp32 on mps) and rounded once, so that the same sigma gives the same bits wherever it is asked. NaN and
        negative sigma give NaN; nothing waits for the device.
        """
        table = self._log_sigmas(sigma.device)
        log_sigma = sigma.to(table.dtype).log()
        low = (torch.searchsorted(table, log_sigma, right=True) - 1).clamp(0, len(table) - 2)
        w = ((log_sigma - table[low]) / (table[low + 1] - table[low])).clamp(0, 1)
        if quantize:
            w = torch.where(w.isnan(), w, (w > 0.5).to(w.dtype))
        return (low + w).float()

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The noise level of a timestep, fractional or not: any shape; t's float dtype is kept (integers give fp32).

        t is clamped to [0, N - 1], as `sigma_to_t` clamps.
        """
        table = self._log_sigmas(t.device)
        exact = t.to(table.dtype).clamp(0, len(table) - 1)
        low = exact.nan_to_num().long().clamp(max=len(table) - 2)
        w = exact - low
        sigma = torch.lerp(table[low], table[low + 1], w).exp()
        return sigma.to(t.dtype if t.is_floating_point() else torch.float32)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in of `denoised = c_skip * x + c_out * network(c_in * x)`, each shaped as sigma.

        eps: x0 = x - sigma * eps. v (Salimans and Ho 2022, arXiv 2202.00512): v = c_in * (noise - sigma * x0).
        """
        c_in = (sigma**2 + 1) ** -0.5
        c_skip, c_out = (c_in**2, -sigma * c_in) if self.prediction == "v" else (torch.ones_like(sigma), -sigma)
        if self.consistency:  # Luo et al. 2023, arXiv 2310.04378, eq. 9, with s = 10 t and sigma_data .5
            s = 10 * self.sigma_to_t(sigma).to(sigma.dtype)
            whole = s**2 + 0.25
            c_skip, c_out = c_skip * s * whole**-0.5 + c_in * 0.25 / whole, c_out * s * whole**-0.5
        return c_skip, c_out, c_in

    def target(self, x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the network should answer at clean latents x plus sigma * noise: eps or v. All broadcast to x."""
        return (noise - sigma * x) * (sigma**2 + 1) ** -0.5 if self.prediction == "v" else noise

    def _log_sigmas(self, device: torch.device) -> Tensor:
        """The table on a device, copied there once: a copy in every step would make the host wait."""
        if device not in self._log_sigmas_on:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._log_sigmas_on[device] = self.sigmas.log().to(device, dtype)
        return self._log_sigmas_on[device]


@dataclass(frozen=True)
class EDMSchedule:
    """Noise levels without a table: t = log(sigma) / 4 at any sigma, as networks in EDM's preconditioning are trained.

    Karras et al. (2022, 2206.00364, table 1, c_noise); the defaults, sigma_data too, are Playground v2.5's.
    It has a NoiseSchedule's attributes; `sigmas` are n levels even in log sigma, for schedules that walk a table.
    prediction: "edm", the F of that table, or "v", its negative (CosXL, with sigma_data 1).
    Raises ValueError unless 0 < sigma_min < sigma_max, sigma_data > 0 and n >= 2.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    n: int = 1000
    prediction: Literal["edm", "v"] = "edm"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"expected 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if not 0 < self.sigma_data < math.inf or self.n < 2:
            raise ValueError(f"expected sigma_data > 0 and n >= 2, got {self.sigma_data} and {self.n}")

    @property
    def log_sigmas(self) -> Tensor:
        """[n] float64, ascending."""
        return torch.linspace(math.log(self.sigma_min), math.log(self.sigma_max), self.n, dtype=torch.float64)

    @property
    def sigmas(self) -> Tensor:
        """[n] float64, ascending."""
        return self.log_sigmas.exp()

    def sigma_to_t(self, sigma: Tensor, quantize: bool = False) -> Tensor:
        """t = log(sigma) / 4, any shape -> fp32, clamped to the range; computed in float64 (fp32 on mps), rounded once.

        NaN and negative sigma give NaN. ValueError with `quantize`: there are no whole timesteps here."""
        if quantize:
            raise ValueError("EDM's t is log(sigma) / 4: there are no whole timesteps to round to")
        log = sigma.to(torch.float32 if sigma.device.type == "mps" else torch.float64).log()
        return (log.clamp(math.log(self.sigma_min), math.log(self.sigma_max)) / 4).float()

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """sigma = exp(4 t), clamped to the range: any shape; t's float dtype is kept (integers give fp32)."""
        exact = t.to(torch.float32 if t.device.type == "mps" else torch.float64)
        sigma = (4 * exact).exp().clamp(self.sigma_min, self.sigma_max)
        return sigma.to(t.dtype if t.is_floating_point() else torch.float32)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in as of a NoiseSchedule, EDM's (table 1): each shaped as sigma."""
        total = sigma**2 + self.sigma_data**2
        sign = -1 if self.prediction == "v" else 1
        return self.sigma_data**2 / total, sign * sigma * self.sigma_data * total**-0.5, total**-0.5

    def target(self, x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the network should answer at clean latents x plus sigma * noise: EDM's F. All broadcast to x."""
        c_skip, c_out, _ = self.scalings(sigma)
        return (x - c_skip * (x + sigma * noise)) / c_out
