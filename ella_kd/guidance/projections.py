"""Rules that change the direction of classifier-free guidance: which part of cond - uncond is followed."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ella_kd.guidance.rule import CFG, COND, UNCOND, Answers, Branch, Guidance, is_all
from ella_kd.scale import Scale


@dataclass(frozen=True)
class _Guided(Guidance):
    """Classifier-free guidance, and `scale - 1` times a change of its direction: no change is CFG bitwise."""

    scales = ("scale",)
    scale: Scale

    @property
    def branches(self) -> tuple[Branch, ...]:
        return CFG(self.scale).branches

    def __call__(self, answers: Answers) -> Tensor:
        guided = CFG(self.scale)(answers)
        if is_all(self.scale, 1):
            return guided
        return guided + answers.factor(plus(self.scale, -1)) * self._change(answers)

    @abstractmethod
    def _change(self, answers: Answers) -> Tensor:
        """What the direction C - U changes by, [B, C, h, w]."""


@dataclass(frozen=True)
class APG(_Guided):
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416): guidance without what oversaturates.

    Of d = C - U the part along C mostly raises contrast and saturation, the rest adds what is wanted: C + (scale - 1) *
    (orthogonal + eta * parallel), after d is shortened to a norm of at most `threshold` (section 4). eta: 0 drops the
    parallel part, as the paper advises, 1 keeps it. threshold: the paper's r, None for none; it is a norm over C, h and
    w, so it grows with the picture (diffusers' default is 15, ComfyUI's 5).

    The paper also adds a negative momentum over the steps. It is left out: a rule is a function of x and sigma alone,
    and so means the same in every sampler, and in split, resumed or adaptive runs. Where eta < 1 or d is shortened
    others differ from the paper: diffusers adds scale * update to U, and ComfyUI scale * update to C, which with eta 1
    is plain guidance of scale + 1. Raises ValueError for an eta that is not finite or a threshold not above 0.
    """

    eta: float = 0.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.eta):
            raise ValueError(f"eta must be finite (0 drops the parallel part, 1 keeps it), got {self.eta}")
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise ValueError(f"threshold must be a norm above 0, or None for no limit, got {self.threshold}")

    def _change(self, answers: Answers) -> Tensor:
        d = answers[COND] - answers[UNCOND]
        change = (self.eta - 1) * _onto(d, answers[COND])
        if self.threshold is not None:
            k = (self.threshold / _dot(d, d).sqrt()).clamp(max=1)
            change = k * change + (k - 1) * d
        return change


@dataclass(frozen=True)
class CFGZeroStar(_Guided):
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): the uncond scaled to fit the cond, and a still start.

    Guide from s U instead of U, s = <C, U> / |U|^2 the least-squares fit per sample (section 4.1), where C and U are
    the velocities of the sampling ODE, here dx/dsigma = eps; the paper's are those of flow matching. While sigma >=
    zero_init the velocity is 0 and x stays where it is (section 4.2). The paper does so for the first 4 % of a flow
    model's time, which is sigma = t / (1 - t) above 24, beyond Stable Diffusion's noise: the default is None, no such
    start. ComfyUI fits s to eps but scales the uncond's x0 with it; diffusers scales the first U of U + scale * (C - U)
    and not the second. Raises ValueError for a zero_init not above 0.
    """

    zero_init: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_init is not None and not 0 < self.zero_init < math.inf:
            raise ValueError(f"zero_init must be a sigma above 0, or None for no still start, got {self.zero_init}")

    def __call__(self, answers: Answers) -> Tensor:
        guided = super().__call__(answers)
        if self.zero_init is None:
            return guided
        return torch.where(answers.sigma >= self.zero_init, answers.x, guided)

    def _change(self, answers: Answers) -> Tensor:
        # s U - U is the part of C - U along U; from the difference, since at sigma 14 both are nearly x.
        return _onto(answers[UNCOND] - answers[COND], answers.x - answers[UNCOND])


@dataclass(frozen=True)
class TCFG(_Guided):
    """Tangential damping (Kwon et al. 2025, arXiv 2503.18137): guide from the part of the uncond that agrees.

    Of the 2 x N matrix of both scores (here eps, per sample) the uncond keeps its component along the first right
    singular vector and loses that along the second; then plain guidance. The vector comes in closed form from the 2 x 2
    Gram matrix: no SVD, which would make a GPU wait. ComfyUI does this to eps as we do, diffusers to whatever the
    network returns.
    """

    def _change(self, answers: Answers) -> Tensor:
        u = answers.x - answers[UNCOND]  # sigma * eps has the same singular vectors
        d = answers[UNCOND] - answers[COND]  # c - u: at sigma 14 both are nearly x, and the difference keeps its digits
        across = d - _onto(d, u)
        # In the plane of u and across, u is (norm, 0) and c is (a, b); the first singular vector is at this angle.
        norm, b = _dot(u, u).sqrt(), _dot(across, across).sqrt()
        a = norm + _ratio(_dot(d, u), norm)
        angle = torch.atan2(2 * a * b, norm**2 + a**2 - b**2) / 2
        return _ratio(norm * angle.sin() * angle.cos(), b) * across - angle.sin() ** 2 * u


def plus(scale: Scale, number: float) -> Scale:
    """A resolved scale with a number added, in float64 as one scale or one per sample: the same bits either way."""
    assert not callable(scale)
    return scale + number if isinstance(scale, float) else tuple(s + number for s in scale)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3), keepdim=True)


def _onto(a: Tensor, b: Tensor) -> Tensor:
    """The part of a along b; none if b is 0."""
    return _ratio(_dot(a, b), _dot(b, b)) * b


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0)
