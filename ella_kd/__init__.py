"""A k-diffusion style sampler library for ELLA: the prompt is a function of the noise level."""

from ella_kd.adapters import DiffusersUNet
from ella_kd.conditioning import (
    ELLA,
    And,
    Box,
    Channels,
    Composition,
    Concat,
    Conditioning,
    Constant,
    Context,
    Lerp,
    Mask,
    Regions,
    Stack,
    Switch,
    lerp_features,
    window,
)
from ella_kd.denoiser import ELLADenoiser, LDMDenoiser
from ella_kd.draw import draw
from ella_kd.generate import generate
from ella_kd.guidance import CFG, CFGDenoiser, Guidance, GuidedDenoiser, Interval, Prediction
from ella_kd.images import Picture
from ella_kd.models.noise_schedule import NoiseSchedule
from ella_kd.pipeline import Pipeline
from ella_kd.upsample import CaptionUpsampler

__all__ = [
    "CFG",
    "ELLA",
    "And",
    "Box",
    "CFGDenoiser",
    "CaptionUpsampler",
    "Channels",
    "Composition",
    "Concat",
    "Conditioning",
    "Constant",
    "Context",
    "DiffusersUNet",
    "ELLADenoiser",
    "Guidance",
    "GuidedDenoiser",
    "Interval",
    "LDMDenoiser",
    "Lerp",
    "Mask",
    "NoiseSchedule",
    "Picture",
    "Pipeline",
    "Prediction",
    "Regions",
    "Stack",
    "Switch",
    "draw",
    "generate",
    "lerp_features",
    "window",
]
