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
from ella_kd.generate import generate
from ella_kd.guidance import CFG, CFGDenoiser, Guidance, GuidedDenoiser, Interval, Prediction
from ella_kd.images import Picture
from ella_kd.models.noise_schedule import NoiseSchedule
from ella_kd.pipeline import Pipeline

__all__ = [
    "CFG",
    "ELLA",
    "And",
    "Box",
    "CFGDenoiser",
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
    "generate",
    "lerp_features",
    "window",
]
