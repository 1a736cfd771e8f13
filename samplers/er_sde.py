"""Extended reverse-time SDE (2309.06169) on past denoised."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from ella_kd.samplers.multistep import Array, DataMultistep, DataWeights, integrate, padded
from ella_kd.samplers.registry import Args, Callback, Model, NoiseSampler, Seeds, cfg_pp_form, sampler, walk
from ella_kd.samplers.solver import Step, pairs, refuse_ascending, refuse_negative, refuse_order

__all__ = ["ERSDE", "sample_er_sde", "sample_er_sde_cfg_pp"]


def er_sde_scaler(sigma: float) -> float:
    """ER-SDE 5 of the paper, its recommendation: sigma (e^(sigma^0.3) + 10)."""
    return sigma * (math.exp(sigma**0.3) + 10)


@dataclass(frozen=True)
class ERSDE(DataMultistep):
    """Extended reverse-time SDE, data prediction in VE sigma (2309.06169, algorithm 3): with r = phi(t) / phi(s),

    x' = r x + (1 - r) D + A_1 D' + A_2 D'' + sqrt(t^2 - s^2 r^2) noise,

    A_1 = t - s + phi(t) I_0, A_2 = (t - s)^2 / 2 + phi(t) I_1, I_k the integral of (sigma - s)^k / phi from t to s. The
    noise scale function phi, noise_scaler, must grow at least as fast as sigma; phi = sigma is the flow, without noise.

    D' is the backward difference, as in the paper and ComfyUI, so that max_stage 3 has order 2 all the same. corrected
    takes D' of the parabola through three D: order 3. One evaluation per step. ComfyUI sums 200 points for I_k; these
    are Gauss-Legendre integrals."""

    s_noise: float = 1.0
    noise_scaler: Callable[[float], float] = er_sde_scaler
    max_stage: int = 3
    corrected: bool = False
    order = 2

    def __post_init__(self) -> None:
        refuse_negative(s_noise=self.s_noise)
        refuse_order("max_stage", self.max_stage, 3)

    def steps(self, sigmas: Sequence[float]) -> list[Step[DataWeights]]:
        steps = []
        for i, (s, t) in enumerate(pairwise(sigmas)):
            weights = DataWeights(0.0, padded((1.0,), self.max_stage))
            if t > 0:
                phi = float(self.noise_scaler(t))
                ratio = phi / self.noise_scaler(s)
                up = t * math.sqrt(self._share(s, t, ratio)) * self.s_noise
                first, *rest = self._weights(sigmas[: i + 1][::-1][: self.max_stage], t, phi)
                weights = DataWeights(ratio, padded((1 - ratio + first, *rest), self.max_stage), up)
            steps.append(Step((s,), weights, pairs(weights.up, s, t)))
        return steps

    def _share(self, s: float, t: float, ratio: float) -> float:
        """How much of the variance at t is new noise."""
        share = 1 - (s * ratio / t) ** 2
        if share > 1e-12:
            return share
        if not share > -1e-12:
            refuse_ascending(s, t)
            raise ValueError(f"noise_scaler must grow at least as fast as sigma, as it does not at {t:g}")
        return 0.0  # phi = sigma, rounded

    def _weights(self, nodes: Sequence[float], t: float, phi: float) -> list[float]:
        """What A_1 D' + A_2 D'' takes of the D at `nodes`, the newest first."""
        s = nodes[0]
        if len(nodes) == 1:
            return [0.0]

        def integrand(u: Array) -> Array:
            values = [math.exp(v) / self.noise_scaler(math.exp(v)) for v in u]
            return np.stack([np.ones_like(u), np.exp(u) - s]) * values

        i_0, i_1 = integrate(integrand, math.log(t), math.log(s)).tolist()
        first = (t - s + phi * i_0) / (s - nodes[1])
        weights = [first, -first]
        if len(nodes) == 3:
            # f[0,1,2] = D'' / 2 = (f[0,1] - f[1,2]) / (s_0 - s_2)
            second = (t - s) ** 2 + 2 * phi * i_1
            if self.corrected:
                second += first * (s - nodes[1]) ** 2
            a, b = (second / (s - nodes[2]) / gap for gap in (s - nodes[1], nodes[1] - nodes[2]))
            weights = [first + a, -first - a - b, b]
        return weights


@sampler(ERSDE(), "ER-SDE")
def sample_er_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback | None = None,
    disable: bool | None = None, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    noise_scaler: Callable[[float], float] | None = None, max_stage: int = 3, corrected: bool = False,
    *, seeds: Seeds = None,
) -> Tensor:
    """Extended reverse-time SDE (2309.06169); noise_scaler(sigma) of one's own. Order 2, or 3 corrected, without noise;
    one evaluation per step."""
    return walk(
        ERSDE(s_noise, noise_scaler or er_sde_scaler, max_stage, corrected),
        model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler,
    )


sample_er_sde_cfg_pp = cfg_pp_form(sample_er_sde)
