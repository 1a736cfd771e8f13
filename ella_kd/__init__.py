"""A k-diffusion style sampler library for ELLA: the prompt is a function of the noise level."""

from ella_kd.adapters import DiffusersUNet
from ella_kd.conditioning import ELLA, Concat, Conditioning, Constant, Context
from ella_kd.denoiser import ELLADenoiser, LDMDenoiser
from ella_kd.generate import generate
from ella_kd.guidance import CFGDenoiser, Prediction
from ella_kd.images import Picture
from ella_kd.models.noise_schedule import NoiseSchedule
from ella_kd.pipeline import Pipeline

__all__ = [
    "ELLA",
    "CFGDenoiser",
    "Concat",
    "Conditioning",
    "Constant",
    "Context",
    "DiffusersUNet",
    "ELLADenoiser",
    "LDMDenoiser",
    "NoiseSchedule",
    "Picture",
    "Pipeline",
    "Prediction",
    "generate",
]
