"""Networks and their files: the UNet, the autoencoder, ELLA's connector, text encoders, checkpoints."""

from ella_kd.models.noise_schedule import NoiseSchedule
from ella_kd.models.tsc import TSC
from ella_kd.models.unet import UNet, UNetConfig
from ella_kd.models.vae import AutoencoderKL, VAEConfig

__all__ = ["TSC", "AutoencoderKL", "NoiseSchedule", "UNet", "UNetConfig", "VAEConfig"]
