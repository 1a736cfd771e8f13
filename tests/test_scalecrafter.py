"""ScaleCrafter against diffusers' UNet, whose convolutions are dilated as the authors' files of settings name them."""

import re

import pytest
import torch

from benchmarks.speed.ways import as_diffusers
from ella_kd.models import UNet, UNetConfig, fast_on_cpu
from ella_kd.models.hidiffusion import AFTER_40, WiderStride
from ella_kd.models.inside import Inside
from ella_kd.models.scalecrafter import AFTER_60, Dilation
from ella_kd.models.seamless import seamless
from test_hidiffusion import SD15, SD21, SDXL, inputs, random_unet
from tiny import WIDTH, randomised, relative

ALL = r"(resnets\.\d\.conv[12]|(down|up)samplers\.0\.conv)"
NAMED = {"sd15": rf"(down_blocks\.[123]|up_blocks\.[012]|mid_block)\.{ALL}",
         "sd21": rf"(down_blocks\.[123]|up_blocks\.[012]|mid_block)\.{ALL}",
         "sdxl": rf"(down_blocks\.3|up_blocks\.0|mid_block)\.{ALL}"}
CONFIGS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}


@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_the_published_settings(kind: str) -> None:
    unet, until = random_unet(CONFIGS[kind]), AFTER_40 if kind == "sd21" else AFTER_60
    how = Dilation.of(unet) if kind != "sd21" else Dilation((1, 2, 2, 2), sigma_lo=AFTER_40)
    network, twin, args = Inside(unet, how), as_diffusers(unet), inputs(unet, 16, 24)
    for name, module in twin.named_modules():
        if re.fullmatch(NAMED[kind], name):
            module.dilation, module.padding = (2, 2), (2, 2)
    got = network.at((until + 1e-3,))(*args)
    assert relative(got, twin(*args).sample) < 1e-12 < 1e-3 < relative(got, unet(*args))
    assert network.at((until,)) is unet
    both = Inside(unet, how, WiderStride(6 if kind == "sdxl" else 3)).at((9.0,))(*inputs(unet, 17, 23))
    assert both.shape[2:] == (17, 23) and bool(both.isfinite().all())


def test_the_numbers_of_sd21_and_what_cannot_be() -> None:
    with torch.device("meta"):
        wide = UNet(UNetConfig(4, 4, 32, (1, 2, 4, 4), 1, (1, 1, 1, 0), 1024, None, 16, linear_proj=True))
    assert Dilation.of(wide) == Dilation((1, 2, 2, 2), sigma_lo=AFTER_40)
    with pytest.raises(ValueError, match="3 levels, and Dilation numbers for 4 down"):
        Inside(random_unet(SDXL), Dilation())
    with pytest.raises(ValueError, match="a whole number of pixels"):
        Dilation((1, 2.5, 2, 2))  # type: ignore[arg-type]
    unet = randomised(UNet(UNetConfig(4, 4, 128, (1, 2), 1, (0, 1), WIDTH, 2)), 0, 0.05)
    with pytest.raises(ValueError, match="plain UNet"):
        Inside(fast_on_cpu(unet), Dilation((1, 2)))


def test_seamless_and_dilated() -> None:
    unet = seamless(randomised(UNet(UNetConfig(4, 4, 32, (1, 2), 1, (1, 1), WIDTH, 2)), 0, 0.1).double())
    network, (x, t, tokens) = Inside(unet, Dilation((2, 2))).at((9.0,)), inputs(unet, 8, 12)
    assert relative(network(x.roll((2, 4), (2, 3)), t, tokens), network(x, t, tokens).roll((2, 4), (2, 3))) < 1e-12
    assert relative(network(x, t, tokens), unet(x, t, tokens)) > 1e-3
