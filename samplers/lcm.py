"""The sampler of consistency models: denoise, and add the next sigma's noise anew."""

from dataclasses import dataclass

from torch import Tensor

from ella_kd.samplers.multistep import DataMultistep, DataWeights
from ella_kd.samplers.registry import Args, Callback, Model, NoiseSampler, Seeds, cfg_pp_form, sampler, walk
from ella_kd.samplers.solver import Step, pairs, refuse_ascending, refuse_negative

__all__ = ["LCM", "sample_lcm", "sample_lcm_cfg_pp"]


@dataclass(frozen=True)
class LCM(DataMultistep):
    """x' = D + t noise: multistep consistency sampling (2303.01469, Algorithm 1; latent consistency, 2310.04378).

    Right for models distilled to jump to sigma 0 from any sigma. On others it draws D's noise away at each step and
    approaches no flow, so it has no order: 0. One evaluation per step."""

    s_noise: float = 1.0
    order = 0

    def __post_init__(self) -> None:
        refuse_negative(s_noise=self.s_noise)

    def between(self, s: float, t: float, n: int) -> Step[DataWeights]:
        refuse_ascending(s, t)
        up = t * self.s_noise
        return Step((s,), DataWeights(0.0, (1.0,), up), pairs(up, s, t))


@sampler(LCM(), "consistency")
def sample_lcm(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, noise_sampler: NoiseSampler | None = None,
    *, s_noise: float = 1.0, seeds: Seeds = None,
) -> Tensor:
    """Multistep consistency sampling (2303.01469, 2310.04378), for models distilled for it. One evaluation per step."""
    return walk(LCM(s_noise), model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler)


sample_lcm_cfg_pp = cfg_pp_form(sample_lcm)
