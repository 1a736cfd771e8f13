"""Networks and their files: the UNet, the autoencoder, ELLA's connector, text encoders, checkpoints."""

from ella_kd.models.clip import CLIPTextEncoder, TwoTextEncoders
from ella_kd.models.cpu import fast_on_cpu
from ella_kd.models.feature_cache import FeatureCache
from ella_kd.models.features import SavedFeatures, load_features, save_features
from ella_kd.models.files.checkpoint import Checkpoint, load_checkpoint
from ella_kd.models.files.connector import load_tsc, save_tsc
from ella_kd.models.files.saving import save_checkpoint
from ella_kd.models.noise_schedule import EDMSchedule, NoiseSchedule
from ella_kd.models.t5 import T5TextEncoder
from ella_kd.models.text import TextFeatures
from ella_kd.models.tsc import TSC
from ella_kd.models.unet import UNet, UNetConfig
from ella_kd.models.vae import AutoencoderKL, VAEConfig

__all__ = [
    "TSC",
    "AutoencoderKL",
    "CLIPTextEncoder",
    "Checkpoint",
    "EDMSchedule",
    "FeatureCache",
    "NoiseSchedule",
    "SavedFeatures",
    "T5TextEncoder",
    "TextFeatures",
    "TwoTextEncoders",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "fast_on_cpu",
    "load_checkpoint",
    "load_features",
    "load_tsc",
    "save_checkpoint",
    "save_features",
    "save_tsc",
]
