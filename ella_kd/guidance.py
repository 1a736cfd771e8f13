"""Guidance: one denoiser made of the conditional and the unconditional answer of another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ella_kd.conditioning import Conditioning, Stack
from ella_kd.denoiser import Condition, LDMDenoiser


@dataclass(frozen=True, eq=False)
class Prediction:
    """What guidance saw and decided, each [B, C, h, w]; uncond is None where it was not evaluated."""

    denoised: Tensor
    cond: Tensor
    uncond: Tensor | None


class CFGDenoiser(nn.Module):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) around a denoiser.

    `denoiser(x, sigma, cond, uncond, cond_scale)`, the signature of k-diffusion scripts: uncond + cond_scale *
    (cond - uncond), both from one UNet call, whatever the lengths of their tokens. Scale 1 asks for no uncond and
    evaluates none.
    """

    def __init__(self, inner_model: LDMDenoiser) -> None:
        super().__init__()
        self.inner_model = inner_model

    @property
    def sigma_min(self) -> float:
        return self.inner_model.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.inner_model.sigma_max

    @property
    def sigmas(self) -> Tensor:
        """[N] float64, ascending."""
        return self.inner_model.sigmas

    @property
    def log_sigmas(self) -> Tensor:
        """[N] float64, ascending."""
        return self.inner_model.log_sigmas

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """The timestep of a noise level: any shape -> fp32, clamped to the schedule."""
        return self.inner_model.sigma_to_t(sigma, quantize)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The noise level of a timestep: any shape, dtype kept."""
        return self.inner_model.t_to_sigma(t)

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """n noise levels evenly spaced in t, or all of them, descending, then 0: [n + 1]."""
        return self.inner_model.get_sigmas(n)

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition, uncond: Condition | None = None,
                cond_scale: float = 1.0) -> Tensor:
        """x [B, C, h, w], sigma [B] -> the guided denoised. Raises ValueError if a scale other than 1 has no uncond."""
        return self.predict(x, sigma, cond=cond, uncond=uncond, cond_scale=cond_scale).denoised

    def predict(self, x: Tensor, sigma: Tensor, need_uncond: bool = False, *, cond: Condition,
                uncond: Condition | None = None, cond_scale: float = 1.0) -> Prediction:
        """The guided answer with its two halves; need_uncond: evaluate uncond even at scale 1 (CFG++ steps on it)."""
        if cond_scale == 1 and not need_uncond:
            denoised = self.inner_model(x, sigma, cond)
            return Prediction(denoised, denoised, None)
        if uncond is None:
            raise ValueError(f'guidance at scale {cond_scale} needs uncond: pass uncond=t5(""), or a negative prompt')
        both = Stack((self._lift(cond, "cond", len(x)), self._lift(uncond, "uncond", len(x))))
        c, u = self.inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return Prediction(c if cond_scale == 1 else u + (c - u) * cond_scale, c, u)

    def _lift(self, cond: Condition, name: str, batch: int) -> Conditioning:
        lifted = self.inner_model.lift(cond)
        if lifted.rows not in (1, batch):
            raise ValueError(f"{name} has {lifted.rows} rows and the batch {batch}: give one row, or one per sample")
        return lifted

    def planned(self, sigmas: Tensor, extra_args: Mapping[str, Any]) -> dict[str, Any]:
        """The sampler's extra_args with cond and uncond planned for every sigma [N] of the run, in one TSC call."""
        names = [name for name in ("cond", "uncond") if extra_args.get(name) is not None]
        conditionings = self.inner_model.plan(sigmas, [extra_args[name] for name in names])
        return {**extra_args, **dict(zip(names, conditionings, strict=True))}
