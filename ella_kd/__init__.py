"""A k-diffusion style sampler library for ELLA: the prompt is a function of the noise level.

What a script needs is here; the rest is one level down: `ella_kd.samplers`, `.models`, `.guidance`, `.conditioning`.
"""

import ella_kd.clone  # noqa: F401
from ella_kd.adapters import DiffusersUNet
from ella_kd.conditioning import ELLA as ELLA
from ella_kd.conditioning import And, Box, Concat, Lerp, Mask, Regions, Stack, Switch, window
from ella_kd.conditioning import Channels as Channels
from ella_kd.conditioning import Composition as Composition
from ella_kd.conditioning import Conditioning as Conditioning
from ella_kd.conditioning import Constant as Constant
from ella_kd.conditioning import Context as Context
from ella_kd.conditioning import lerp_features as lerp_features
from ella_kd.denoiser import ELLADenoiser, LDMDenoiser
from ella_kd.drawing import draw
from ella_kd.generation import generate
from ella_kd.guidance import (
    APG,
    CFG,
    PAG,
    SAG,
    SEG,
    SLG,
    TCFG,
    AutoGuidance,
    CFGDenoiser,
    CFGZeroStar,
    DynamicThreshold,
    GuidedDenoiser,
    InstructPix2Pix,
    Interval,
    MimicScale,
    Rescale,
)
from ella_kd.guidance import Guidance as Guidance
from ella_kd.guidance import Perturbed as Perturbed
from ella_kd.guidance import Prediction as Prediction
from ella_kd.images import Picture as Picture
from ella_kd.models.noise_schedule import NoiseSchedule as NoiseSchedule
from ella_kd.pipeline import Pipeline
from ella_kd.refining import Refiner
from ella_kd.request import VERSION as __version__
from ella_kd.request import Request, read_settings
from ella_kd.upsample import CaptionUpsampler

__all__ = [
    "APG",
    "CFG",
    "PAG",
    "SAG",
    "SEG",
    "SLG",
    "TCFG",
    "And",
    "AutoGuidance",
    "Box",
    "CFGDenoiser",
    "CFGZeroStar",
    "CaptionUpsampler",
    "Concat",
    "DiffusersUNet",
    "DynamicThreshold",
    "ELLADenoiser",
    "GuidedDenoiser",
    "InstructPix2Pix",
    "Interval",
    "LDMDenoiser",
    "Lerp",
    "Mask",
    "MimicScale",
    "Pipeline",
    "Refiner",
    "Regions",
    "Request",
    "Rescale",
    "Stack",
    "Switch",
    "__version__",
    "draw",
    "generate",
    "read_settings",
    "window",
]
