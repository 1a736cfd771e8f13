"""The autoencoder against diffusers' AutoencoderKL with the same random weights, and against the real names."""

import json
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from PIL import Image
from torch import Tensor

from ella_kd.models import AutoencoderKL, VAEConfig

DATA = Path(__file__).parent / "data"
PREFIX = "first_stage_model."
SD15 = VAEConfig(channels=32)
MINIATURE = VAEConfig(channels=32, channel_mult=(1, 2, 3), num_res_blocks=1)
X4 = VAEConfig(channels=32, channel_mult=(1, 2, 4), scale=0.08333)
PLAYGROUND = VAEConfig(channels=32, scale=0.5, mean=(-1.6574, 1.886, -1.383, 2.5155),
                       std=(8.4927, 5.9022, 6.5498, 5.2299))
CONFIGS = {"sd15": SD15, "miniature": MINIATURE, "x4": X4, "playground": PLAYGROUND}


def random_vae(config: VAEConfig) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(config)
    for name, parameter in vae.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return vae.requires_grad_(False)


def diffusers_twin(vae: AutoencoderKL) -> Any:  # diffusers.AutoencoderKL
    config, levels = vae.config, len(vae.config.channel_mult)
    twin: Any = diffusers.AutoencoderKL(
        in_channels=config.in_channels, out_channels=config.in_channels, latent_channels=config.latent_channels,
        block_out_channels=[mult * config.channels for mult in config.channel_mult],
        layers_per_block=config.num_res_blocks, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    weights = {PREFIX + name: x for name, x in vae.state_dict().items()}
    twin.load_state_dict(convert_ldm_vae_checkpoint(weights, twin.config))
    return twin.to(vae.dtype).requires_grad_(False)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name: str, dtype: torch.dtype, tolerance: float) -> None:
    vae = random_vae(CONFIGS[name]).to(dtype)
    twin: Any = diffusers_twin(vae)
    f = vae.factor
    assert f == (4 if name in ("miniature", "x4") else 8)
    images = torch.randn(2, 3, 4 * f, 2 * f, generator=torch.Generator().manual_seed(1), dtype=dtype)
    posterior = twin.encode(images).latent_dist
    mean, logvar = vae.moments(images)
    assert mean.shape == (2, 4, 4, 2)
    assert mean.std() > 0.1
    assert error(mean, posterior.mean) < tolerance
    assert error(logvar, posterior.logvar) < tolerance
    latents = vae.encode(images)
    config = vae.config
    mean, std = (torch.tensor(x or [default] * 4, dtype=dtype)[:, None, None]
                 for x, default in ((config.mean, 0.0), (config.std, 1.0)))
    assert error(latents, (posterior.mean - mean) * config.scale / std) < tolerance
    assert error(vae.decode(latents), twin.decode(posterior.mean).sample) < tolerance


def test_the_log_variance_stays_in_range() -> None:
    vae = random_vae(MINIATURE)
    vae.quant_conv.load_state_dict({"weight": vae.quant_conv.weight, "bias": torch.tensor([0.0] * 4 + [100, -100] * 2)})
    _, logvar = vae.moments(torch.randn(1, 3, 8, 8))
    assert (logvar.amin().item(), logvar.amax().item()) == (-30, 20)


def test_a_draw_is_mean_plus_deviation_times_noise() -> None:
    vae = random_vae(MINIATURE)
    images = torch.randn(1, 3, 8, 8)
    mean, logvar = vae.moments(images)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    drawn = vae.encode(images, sample=True, generator=torch.Generator().manual_seed(5))
    assert error(drawn, (mean + (logvar / 2).exp() * noise) * 0.18215) < 1e-6
    assert error(drawn, vae.encode(images)) > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_the_architecture_is_read_off_the_shapes(name: str) -> None:
    with torch.device("meta"):
        shapes = {key: x.shape for key, x in AutoencoderKL(CONFIGS[name]).state_dict().items()}
    config = CONFIGS[name]  # scale, mean and std are not in the shapes
    assert VAEConfig.from_shapes(shapes) == replace(config, scale=0.18215, mean=None, std=None)


def test_has_the_names_and_shapes_of_sd15() -> None:
    names = json.loads((DATA / "sd15_ldm_keys.json").read_text())
    want = {name.removeprefix(PREFIX): shape for name, shape in names.items() if name.startswith(PREFIX)}
    with torch.device("meta"):
        vae = AutoencoderKL()
    assert {name: list(x.shape) for name, x in vae.state_dict().items()} == want
    assert len(want) == 248
    assert VAEConfig.from_shapes(want) == VAEConfig()


def test_pictures_in_bytes_are_read_in_any_order() -> None:
    """A PIL image, an array and tensors of uint8 are the floats x / 127.5 - 1, whatever the network's dtype."""
    vae = random_vae(MINIATURE)
    picture = torch.randint(0, 256, (8, 12, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(picture.numpy())
    for dtype in (torch.float64, torch.float32):
        vae.to(dtype)
        want = vae.encode(picture.permute(2, 0, 1)[None].to(dtype) / 127.5 - 1)
        for given in (picture, picture[None], picture.permute(2, 0, 1), picture.permute(2, 0, 1)[None],
                      picture.numpy(), image, image.convert("RGBA"),
                      picture.permute(2, 0, 1)[None].double() / 127.5 - 1):
            got = vae.encode(given)
            assert got.shape == want.shape == (1, 4, 2, 3) and got.dtype == dtype
            assert error(got, want) < 1e-5


@pytest.mark.parametrize(("images", "says"), [
    (torch.full((1, 3, 8, 8), 255.0), r"floats in \[-1, 1\], got values up to 255: give those in 0..255 as uint8"),
    (torch.full((1, 3, 8, 8), torch.nan), r"floats in \[-1, 1\], got values up to nan"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "uint8 or a PIL image in 0..255, got torch.int64"),
    ([Image.new("RGB", (8, 8))], "uint8 or a PIL image in 0..255, got list"),
    (torch.zeros(8, 8, 4, dtype=torch.uint8), r"images \[B, 3, H, W\] .*, got \[1, 8, 8, 4\]"),
])
def test_what_is_no_picture_is_refused(images: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        AutoencoderKL(MINIATURE).encode(images)


def test_a_short_repr() -> None:
    assert repr(AutoencoderKL(MINIATURE)) == "AutoencoderKL(1 latent for 4 x 4 px, scale 0.18215, float32 on cpu)"


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 8, 10), (1, 3, 6, 8)])
def test_wrong_images_are_refused(shape: tuple[int, ...]) -> None:
    vae = AutoencoderKL(MINIATURE)
    vae.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"images \[B, 3, H, W\] with H and W multiples of 4"):
        vae.encode(torch.zeros(shape))


def test_wrong_latents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latents \[B, 4, h, w\], got \[1, 3, 2, 2\]"):
        AutoencoderKL(MINIATURE).decode(torch.zeros(1, 3, 2, 2))


def test_the_published_x4_upscalers() -> None:
    with torch.device("meta"):
        weights = AutoencoderKL(VAEConfig(channel_mult=(1, 2, 4))).state_dict()
    assert (len(weights), sum(x.numel() for x in weights.values())) == (204, 55_325_927)


def overflowing() -> AutoencoderKL:
    """As SDXL's: activations beyond float16's 65504, and a picture of about 1 after the last norm."""
    vae = random_vae(MINIATURE)
    for layer in (vae.decoder.conv_in, vae.encoder.conv_in):
        layer.weight *= 3e4
    for layer in (vae.decoder.conv_in, vae.post_quant_conv):
        assert layer.bias is not None
        torch.nn.init.zeros_(layer.bias)
    return vae.half()


def test_pictures_that_overflow_are_decoded_in_float32() -> None:
    """The others stay as they are, so that a picture does not depend on those beside it; it is told once."""
    vae = overflowing()
    wide = deepcopy(vae).float()
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    latents[1] *= 1e-3
    with torch.no_grad(), pytest.warns(UserWarning, match="overflows in float16, as SDXL's does"):
        images = vae.decode(latents)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = [vae.decode(latents[i:i + 1]) for i in range(3)]
    assert images.dtype == torch.float16 and images.isfinite().all()
    assert all(error(images[i:i + 1], alone[i]) < 2e-3 for i in range(3))
    for i in (0, 2):
        assert error(images[i], wide.decode(latents[i:i + 1].float())[0]) < 1e-3
    assert error(images[1], wide.decode(latents[1:2].float())[0]) < 2e-2
    layers = torch.nn.Sequential(vae.post_quant_conv, vae.decoder)
    plain = layers(latents / vae.config.scale)
    assert plain[1].isfinite().all() and not plain[0].isfinite().all()
    assert all(x.dtype == torch.float16 for x in vae.state_dict().values()), "nothing is changed in place"
    moments = vae.moments(torch.ones(1, 3, 16, 16).half())
    assert all(x.isfinite().all() for x in moments)


def test_mean_and_std_are_one_number_per_channel() -> None:
    with pytest.raises(ValueError, match="mean needs one number per channel of the latents, 4, got 3"):
        VAEConfig(mean=(0.0, 0.0, 0.0))


def test_channels_must_suit_the_group_norm() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        VAEConfig(channels=48)
