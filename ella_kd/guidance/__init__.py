"""Guidance: rules over the answers of a denoiser, and the denoiser that evaluates what they ask for."""

from ella_kd.bound import COND, UNCOND, Branch
from ella_kd.guidance.branches import AutoGuidance, InstructPix2Pix, Patched, PromptToPrompt
from ella_kd.guidance.guided import CFGDenoiser, GuidedDenoiser
from ella_kd.guidance.perturbed import PAG, SAG, SEG, SLG, Perturbed
from ella_kd.guidance.projections import APG, TCFG, CFGZeroStar
from ella_kd.guidance.rule import CFG, Answers, Guidance, Interval
from ella_kd.guidance.thresholds import DynamicThreshold, MimicScale, Rescale
from ella_kd.guidance.tones import Contrast, Mirrored, Shifted
from ella_kd.samplers.model import Prediction

__all__ = [
    "APG",
    "CFG",
    "COND",
    "PAG",
    "SAG",
    "SEG",
    "SLG",
    "TCFG",
    "UNCOND",
    "Answers",
    "AutoGuidance",
    "Branch",
    "CFGDenoiser",
    "CFGZeroStar",
    "Contrast",
    "DynamicThreshold",
    "Guidance",
    "GuidedDenoiser",
    "InstructPix2Pix",
    "Interval",
    "MimicScale",
    "Mirrored",
    "Patched",
    "Perturbed",
    "Prediction",
    "PromptToPrompt",
    "Rescale",
    "Shifted",
]
