"""Networks and their files: the UNet, the autoencoder, ELLA's connector, text encoders, checkpoints."""

from ella_kd.models.clip import CLIPTextEncoder, TwoTextEncoders
from ella_kd.models.cpu import fast_on_cpu
from ella_kd.models.feature_cache import FeatureCache
from ella_kd.models.features import SavedFeatures, load_features, save_features
from ella_kd.models.files.checkpoint import Checkpoint, load_checkpoint
from ella_kd.models.files.connector import load_tsc, save_tsc
from ella_kd.models.files.saving import save_checkpoint
from ella_kd.models.freeu import FreeU
from ella_kd.models.hidiffusion import Shrink, WiderStride, WindowAttention, hidiffusion
from ella_kd.models.inside import Change, Inside, with_changes
from ella_kd.models.noise_schedule import EDMSchedule, NoiseSchedule
from ella_kd.models.t5 import T5TextEncoder
from ella_kd.models.text import TextFeatures
from ella_kd.models.tome import ToMe
from ella_kd.models.tsc import TSC
from ella_kd.models.unet import UNet, UNetConfig
from ella_kd.models.vae import AutoencoderKL, VAEConfig

__all__ = [
    "TSC",
    "AutoencoderKL",
    "CLIPTextEncoder",
    "Change",
    "Checkpoint",
    "EDMSchedule",
    "FeatureCache",
    "FreeU",
    "Inside",
    "NoiseSchedule",
    "SavedFeatures",
    "Shrink",
    "T5TextEncoder",
    "TextFeatures",
    "ToMe",
    "TwoTextEncoders",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "WiderStride",
    "WindowAttention",
    "fast_on_cpu",
    "hidiffusion",
    "load_checkpoint",
    "load_features",
    "load_tsc",
    "save_checkpoint",
    "save_features",
    "save_tsc",
    "with_changes",
]
