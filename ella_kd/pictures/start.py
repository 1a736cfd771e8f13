"""Image to image: where on a schedule a picture comes in, and how much noise it gets there."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ella_kd.conditioning import above
from ella_kd.samplers import get_schedule

Convention = Literal["level", "comfyui", "a1111", "diffusers"]
CONVENTIONS: tuple[Convention, ...] = ("level", "comfyui", "a1111", "diffusers")


def sigmas_from(schedule: str, steps: int, model: Any, sigma: float) -> Tensor:
    """`steps` steps of a schedule that begin at this noise level: [steps + 1], sigma first.

    The rest are the last levels of the shortest whole schedule that has so many below sigma, so that the steps are as
    the schedule makes them there, and the start is the same on every schedule. A sigma of the model's sigma_max or more
    is the whole schedule. Raises ValueError unless sigma is above the model's sigma_min.
    """
    if not sigma > model.sigma_min:
        raise ValueError(f"a picture comes in at a sigma above the model's sigma_min, {model.sigma_min:g}, got {sigma}")
    whole = get_schedule(schedule).sigmas
    if not above(model.sigma_max, sigma):
        return whole(steps, model)

    def enough(n: int) -> bool:
        try:
            return int((whole(n, model).double() < sigma * (1 - 1e-5)).sum()) >= steps  # 1e-5: rounded otherwise
        except ValueError:  # more than a schedule of whole timesteps has
            return True

    n = _least(enough, steps)
    try:
        sigmas = whole(n, model)[-steps - 1 :].clone()
    except ValueError as error:
        raise ValueError(f"the schedule {schedule} has not {steps} levels below sigma {sigma:g}: take fewer steps, a "
                         f"greater strength or another schedule ({error})") from error
    sigmas[0] = sigma
    return sigmas


def sigmas_by_strength(schedule: str, steps: int, model: Any, strength: float,
                       convention: Convention = "level") -> Tensor:
    """The part of a schedule that a strength from 0 to 1 stands for, 1 the whole: [n + 1].

    "level": `sigmas_from` the noise level of the timestep strength * 999, the same on every schedule, in `steps` steps.
    "comfyui": the last steps + 1 levels of a schedule of int(steps / strength) steps (its denoise). "a1111": the last
    int(min(strength, .999) * steps) + 1 steps. "diffusers": the last int(steps * strength) steps.
    Raises ValueError for a strength outside (0, 1], one that leaves no step, and an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r} of strength: choose {', '.join(CONVENTIONS)}")
    check_strength(strength)
    whole = get_schedule(schedule).sigmas
    if convention == "level":
        last = torch.tensor(strength * (len(model.sigmas) - 1), dtype=torch.float64)
        return whole(steps, model) if strength == 1 else sigmas_from(schedule, steps, model,
                                                                     float(model.t_to_sigma(last)))
    if convention == "comfyui":
        n, taken = (steps, steps) if strength > 0.9999 else (int(steps / strength), steps)
    elif convention == "a1111":
        n, taken = steps, int(min(strength, 0.999) * steps) + 1
    else:
        n, taken = steps, int(steps * strength)
    if not taken:
        raise ValueError(f"{steps} steps at strength {strength} leave no step in {convention}'s count: take more of "
                         "one or the other")
    return whole(n, model)[-taken - 1 :]


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From noise a to noise b on the arc between them, row by row, so that the length of noise is kept: [B, ...]."""
    cosine = torch.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1).clamp(-1, 1)
    angle = cosine.view(-1, *[1] * (a.ndim - 1)).acos()
    if bool((angle.sin() < 1e-3).any()):  # the same noise, or its opposite: no arc
        return torch.lerp(a, b, share)
    there, here = ((part * angle).sin() / angle.sin() for part in (share, 1 - share))
    return (a * here + b * there).to(a.dtype)


def check_strength(strength: float) -> float:
    """ValueError for one outside (0, 1], TypeError for what is no number."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise TypeError(f"strength must be a number, got {strength!r}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength is a number above 0 and at most 1, got {strength}")
    return float(strength)


def _least(enough: Callable[[int], bool], low: int) -> int:
    """The smallest n from low on that is enough; more of n is enough too. ValueError where a million are not."""
    high = low
    while not enough(high):
        low, high = high + 1, high * 2
        if high > 1_000_000:
            raise ValueError("so small a strength leaves nothing to do: take a greater one")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
