"""Guidance: rules over the answers of a denoiser, and the denoiser that evaluates what they ask for."""

from ella_kd.guidance.guided import CFGDenoiser, GuidedDenoiser, Prediction
from ella_kd.guidance.rule import CFG, COND, UNCOND, Answers, Branch, Guidance, Interval

__all__ = [
    "CFG",
    "COND",
    "UNCOND",
    "Answers",
    "Branch",
    "CFGDenoiser",
    "Guidance",
    "GuidedDenoiser",
    "Interval",
    "Prediction",
]
