"""Pictures that grow: drawn at the network's own size first, then again and again, larger, each around the last one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ella_kd.denoiser import Denoiser
from ella_kd.models.demofusion import fading
from ella_kd.pictures.segments import other_seeds, sample_in_segments
from ella_kd.samplers import get_sampler, randn
from ella_kd.samplers.noise import check_seeds, random_seeds


@torch.no_grad()
def sample_progressively(
    sampler: str,
    denoiser_of: Callable[[int], Denoiser],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    *,
    scale: int,
    seeds: Sequence[int] | None = None,
    power: float = 3.0,
    disable: bool | None = None,
    **options: Any,
) -> Tensor:
    """DemoFusion's phases (Du et al. 2023, arXiv 2311.16973, section 3.3): latents `scale` times as large as x.

    x [B, C, h, w] at sigmas[0]: where the first phase, an ordinary run, begins. Phase k of 2 .. scale draws the picture
    at k times its size from the last one enlarged, z, and noise n of its own: before each step
    x = (1 - c^power) x + c^power (z + sigma n), c = `fading(t)`. Since x changes, a method begins each step without
    history. In the end each phase has the mean and deviation of the first, row by row. denoiser_of(k): the
    denoiser of a phase; for k of 2 and more its network is a `LocalAndGlobal(unet, k)`:

        def denoiser_of(k):
            return (replace(sd, unet=LocalAndGlobal(sd.unet, k, 64)) if k > 1 else sd).denoiser(CFG(7.0))

    Raises ValueError for a scale below 1, ValueError and TypeError as `sample_in_segments` does.
    """
    if type(scale) is not int or scale < 1:
        raise ValueError(f"scale is how many times larger the picture becomes, a whole number of at least 1, got "
                         f"{scale!r}")
    given, (h, w) = random_seeds(len(x)) if seeds is None else check_seeds(seeds, len(x)), x.shape[2:]
    z = get_sampler(sampler).function(denoiser_of(1), x, sigmas, extra_args=extra_args, seeds=given, disable=disable,
                                      **options)
    std, mean = torch.std_mean(z, (1, 2, 3), keepdim=True)
    levels = [float(sigma) for sigma in sigmas.tolist()]
    for k in range(2, scale + 1):
        denoiser = denoiser_of(k)
        residual = [float(fading(denoiser.sigma_to_t(torch.tensor(s, dtype=torch.float64)))) ** power
                    for s in levels[:-1]]
        z = F.interpolate(z, (k * h, k * w), mode="bicubic")
        noise = randn(z.shape, other_seeds(given, k, scale)).to(z)

        def before(i: int, x: Tensor, z: Tensor = z, noise: Tensor = noise, c: list[float] = residual) -> Tensor:
            return torch.lerp(x, z + levels[i] * noise, c[i])

        z = sample_in_segments(sampler, denoiser, z + levels[0] * noise, sigmas, extra_args, disable=disable,
                               seeds=other_seeds(given, k, 0), before=before, **options)
        own_std, own_mean = torch.std_mean(z, (1, 2, 3), keepdim=True)
        z = (z - own_mean) / own_std * std + mean
    return z
