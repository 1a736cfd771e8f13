"""Step schedules over a range of sigmas: n + 1 strictly decreasing values, the last of them 0, for any n from 1.

They are computed in float64 and rounded once to torch's default dtype, as k-diffusion's are of that dtype. Those that
walk a model's timesteps are in `ella_kd.samplers.timestep_schedules`.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ella_kd.samplers.registry import schedule

__all__ = [
    "get_sigmas_ays", "get_sigmas_ays_sdxl", "get_sigmas_exponential", "get_sigmas_gits", "get_sigmas_karras",
    "get_sigmas_kl_optimal", "get_sigmas_laplace", "get_sigmas_linear_quadratic", "get_sigmas_polyexponential",
    "get_sigmas_vp",
]

AYS_SD15 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
GITS_SD15 = (14.615, 4.617, 2.507, 1.236, 0.702, 0.402, 0.240, 0.156, 0.104, 0.094, 0.029)

Values = np.ndarray[Any, np.dtype[np.float64]]


@schedule("even in sigma^(1/7), Karras et al. 2022")
def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """The schedule of Karras et al. (2022, 2206.00364, equation 5): even steps in sigma^(1/rho).

    Returns [n + 1]. ValueError unless n >= 1, 0 < sigma_min < sigma_max and rho > 0."""
    low, high = sigma_range(sigma_min, sigma_max)
    _positive(rho=rho)
    ramp = np.linspace(0, 1, count(n))
    with np.errstate(over="ignore", invalid="ignore"):
        sigmas = (np.float64(high) ** (1 / rho) * (1 - ramp) + np.float64(low) ** (1 / rho) * ramp) ** rho
    return finish(sigmas, device)


@schedule("even in log sigma")
def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """Even steps in log sigma. Returns [n + 1]. ValueError unless n >= 1 and 0 < sigma_min < sigma_max."""
    return get_sigmas_polyexponential(n, sigma_min, sigma_max, device=device)


@schedule("log sigma falls as a power of even steps; with power 1, its default, exponential")
def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """log sigma falls as u^rho, u even from 1 to 0 (k-diffusion); rho 1 is the exponential schedule.

    Returns [n + 1]. ValueError unless n >= 1, 0 < sigma_min < sigma_max and rho > 0."""
    low, high = sigma_range(sigma_min, sigma_max)
    _positive(rho=rho)
    ramp = (1 - np.linspace(0, 1, count(n))) ** rho
    return finish(np.exp(ramp * math.log(high) + (1 - ramp) * math.log(low)), device)


def vp_betas(sigma_min: float, sigma_max: float, eps_s: float = 1e-3) -> tuple[float, float]:
    """(beta_d, beta_min) with which `get_sigmas_vp` goes from sigma_max to sigma_min (2206.00364, appendix C).

    For Stable Diffusion's .0292 to 14.6146: 9.05 and .85, near the process it was trained on."""
    low, high = (math.log1p(sigma**2) for sigma in sigma_range(sigma_min, sigma_max))
    beta_d = 2 * (high - low / eps_s) / (1 - eps_s)
    return beta_d, high - beta_d / 2


def _fitted(n: int, model: Any) -> Tensor:
    return get_sigmas_vp(n, *vp_betas(model.sigma_min, model.sigma_max))


@schedule("even in the time of a continuous VP process, fitted to the model's range", _fitted)
def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: torch.device | str = "cpu"
) -> Tensor:
    """Even steps in the time of a continuous variance-preserving process (2011.13456), from 1 to eps_s (k-diffusion).

    sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1); the defaults go from 152 to .0105 whatever the model's range,
    `vp_betas` fits them to one. Returns [n + 1]. ValueError unless n >= 1, 0 < eps_s < 1, and sigma falls."""
    if not 0 < eps_s < 1:
        raise ValueError(f"eps_s must lie between 0 and 1, got {eps_s}")
    t = np.linspace(1, eps_s, count(n))
    with np.errstate(over="ignore", invalid="ignore"):
        return finish(np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t)), device)


@schedule("even quantiles of a Laplace distribution of log sigma: dense about sigma 1")
def get_sigmas_laplace(
    n: int,
    sigma_min: float,
    sigma_max: float,
    mu: float = 0.0,
    beta: float = 0.5,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Even steps in the quantile of a Laplace distribution of log sigma (2407.03297), cut to the range of sigmas.

    mu, beta: its mean and scale. Returns [n + 1]. ValueError unless n >= 1, 0 < sigma_min < sigma_max and beta > 0."""
    _positive(beta=beta)
    low, high = (math.log(sigma) - mu for sigma in sigma_range(sigma_min, sigma_max))

    def above(log: float) -> float:
        """The share of the distribution above mu + log."""
        return math.exp(-log / beta) / 2 if log > 0 else 1 - math.exp(log / beta) / 2

    share = np.linspace(above(high), above(low), count(n))
    tail = np.minimum(share, 1 - share)
    with np.errstate(divide="ignore"):
        return finish(np.exp(mu - beta * np.sign(0.5 - share) * np.log(2 * tail)), device)


@schedule("even in arctan sigma")
def get_sigmas_kl_optimal(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """Even steps in arctan sigma (2404.14507: the optimum for Gaussian data).

    Returns [n + 1]: n values from sigma_max to sigma_min, then 0, as ComfyUI has it for n > 1. ValueError unless n >= 1
    and 0 < sigma_min < sigma_max."""
    low, high = sigma_range(sigma_min, sigma_max)
    return finish(np.tan(np.linspace(math.atan(high), math.atan(low), count(n))), device)


@schedule("half the steps linear in sigma near the top, then a parabola; made for flow models")
def get_sigmas_linear_quadratic(
    n: int, sigma_max: float, threshold_noise: float = 0.025, device: torch.device | str = "cpu"
) -> Tensor:
    """sigma_max (1 - v): v rises to `threshold_noise` in n // 2 even steps, then as a parabola of equal slope to 1.

    The schedule of Movie Gen (2410.13720), made for flow models; the same as ComfyUI's of that name. Returns [n + 1].
    ValueError unless n >= 1, sigma_max > 0, and 0 < threshold_noise < (n // 2) / n."""
    _positive(sigma_max=sigma_max)
    i, half = np.arange(count(n), dtype=np.float64), n // 2
    if n == 1:
        return finish(np.array([sigma_max]), device)
    if not 0 < threshold_noise < half / n:
        raise ValueError(f"threshold_noise must lie between 0 and {half / n:g} for {n} steps, got {threshold_noise}")
    slope = threshold_noise / half
    bend = (1 - slope * n) / (n - half) ** 2
    return finish(sigma_max * (1 - slope * i - bend * np.maximum(i - half, 0) ** 2), device)


@schedule("Align Your Steps, ten nodes optimised for SD1.5")
def get_sigmas_ays(n: int, device: torch.device | str = "cpu") -> Tensor:
    """Align Your Steps (2404.14507) for Stable Diffusion 1.5: its ten nodes, then 0; for other n the nodes are
    interpolated in log sigma. Returns [n + 1]. ValueError unless n >= 1."""
    return _nodes(AYS_SD15, n, device)


@schedule("Align Your Steps, ten nodes optimised for SDXL")
def get_sigmas_ays_sdxl(n: int, device: torch.device | str = "cpu") -> Tensor:
    """Align Your Steps (2404.14507) for SDXL: its ten nodes, then 0; other n as in `get_sigmas_ays`.

    Returns [n + 1]. ValueError unless n >= 1."""
    return _nodes(AYS_SDXL, n, device)


@schedule("GITS, ten nodes found for SD1.5")
def get_sigmas_gits(n: int, device: torch.device | str = "cpu") -> Tensor:
    """GITS (2405.11326) for Stable Diffusion 1.5: the ten nodes that Forge has; other n as in `get_sigmas_ays`.

    Returns [n + 1]. ValueError unless n >= 1."""
    return _nodes(GITS_SD15, n, device)


def _nodes(nodes: tuple[float, ...], n: int, device: torch.device | str) -> Tensor:
    """All nodes, the last included, interpolated to n + 1; the last is then replaced by 0."""
    u = np.linspace(0, 1, count(n) + 1)
    return finish(np.exp(np.interp(u, np.linspace(0, 1, len(nodes)), np.log(nodes)))[:-1], device)


def count(n: int) -> int:
    """n, if it is a number of steps; TypeError or ValueError otherwise."""
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"the number of steps must be an integer, got {n!r}")
    if n < 1:
        raise ValueError(f"the number of steps must be at least 1, got {n}")
    return n


def sigma_range(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """Both as floats; ValueError unless 0 < sigma_min < sigma_max < infinity."""
    low, high = float(sigma_min), float(sigma_max)
    if not 0 < low < high < math.inf:
        raise ValueError(f"expected 0 < sigma_min < sigma_max, got sigma_min {low} and sigma_max {high}")
    return low, high


def _positive(**options: float) -> None:
    for name, value in options.items():
        if not value > 0 or math.isinf(value):
            raise ValueError(f"{name} must be above 0, got {value}")


def finish(sigmas: Values, device: torch.device | str) -> Tensor:
    """Rounds to the default dtype, appends 0, and refuses what is not strictly decreasing after rounding."""
    rounded = torch.tensor([*sigmas.tolist(), 0.0], dtype=torch.get_default_dtype())
    if not (rounded.isfinite().all() and (rounded.diff() < 0).all()):
        raise ValueError(f"{len(sigmas)} steps do not fit between these sigmas in {rounded.dtype}: two would be equal")
    return rounded.to(device)
