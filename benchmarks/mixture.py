"""A model whose answer is exact: the denoiser and the probability flow of a Gaussian mixture."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Every value of x is one sample of a one-dimensional Gaussian mixture, whose denoised is exact (posterior mean).

    The probability flow keeps quantiles, so its solution is exact too: `quantile(u, sigma)` for every sigma."""

    means: tuple[float, ...] = (-1.5, 0.4, 2.0)
    stds: tuple[float, ...] = (0.4, 0.3, 0.6)
    weights: tuple[float, ...] = (0.3, 0.5, 0.2)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (len(x),)
        s2 = sigma.view(-1, 1, 1, 1, 1) ** 2
        means, stds, weights = (x.new_tensor(values) for values in (self.means, self.stds, self.weights))
        variance = stds**2 + s2
        log = weights.log() - 0.5 * variance.log() - (x[..., None] - means) ** 2 / (2 * variance)
        share = (log - log.amax(-1, keepdim=True)).exp()
        denoised = (stds**2 * x[..., None] + s2 * means) / variance
        return (share * denoised).sum(-1) / share.sum(-1)

    def quantile(self, u: float, sigma: float) -> float:
        spread = np.sqrt(np.square(self.stds) + sigma**2)

        def excess(x: float) -> float:
            return float(np.dot(self.weights, norm.cdf((x - np.array(self.means)) / spread))) - u

        return float(brentq(excess, -12 * spread.max(), 12 * spread.max(), xtol=1e-13, rtol=1e-14))
