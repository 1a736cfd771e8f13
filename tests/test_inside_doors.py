"""What is asked of the UNet's inside through `generate`, the command and a PNG's text."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ella_kd import Pipeline, generate
from ella_kd.cli import main
from ella_kd.models.context import Context
from ella_kd.models.freeu import FreeU
from ella_kd.models.hidiffusion import Shrink, WiderStride, WindowAttention, Windows, hidiffusion
from ella_kd.models.inside import Change, Inside
from ella_kd.models.networks import BySigma
from ella_kd.models.tiled import Tiled
from ella_kd.models.tome import ToMe
from ella_kd.models.unet import UNet, UNetConfig
from ella_kd.request import Request

PROMPT = "A red heart sits in the center."
DOORS: dict[str, tuple[dict[str, Any], list[str], tuple[Change, ...], int]] = {
    "freeu": ({"freeu": True}, ["--freeu"], (FreeU(by="level"),), 32),
    "tome": ({"tome": 0.5}, ["--tome", ".5"], (ToMe(0.5),), 32),
    "both": ({"freeu": True, "tome": 0.3}, ["--freeu", "--tome", "0.3"], (ToMe(0.3), FreeU(by="level")), 32),
    "hidiffusion": ({"hidiffusion": True}, ["--hidiffusion"], (WiderStride(2), WindowAttention()), 64),
    "deep shrink": ({"deep_shrink": True}, ["--deep-shrink"], (Shrink(),), 64),
}


@pytest.mark.parametrize("name", DOORS)
def test_a_door_draws_what_the_values_draw_and_a_png_remembers(name: str, tmp_path: Any) -> None:
    given, options, changes, side = DOORS[name]
    sd = Pipeline.miniature()
    how: dict[str, Any] = {"steps": 3, "width": side, "height": side, "seeds": 5, "progress": False}
    [picture] = generate(sd, PROMPT, **how, **given)
    [want] = generate(replace(sd, unet=Inside(sd.unet, *changes)), PROMPT, **how)  # type: ignore[arg-type]
    [plain] = generate(sd, PROMPT, **how)
    drawn, same, other = (np.asarray(each.image) for each in (picture, want, plain))
    assert np.array_equal(drawn, same) and not np.array_equal(drawn, other)
    read = Request.from_text(picture.settings.parameters())
    assert all(getattr(read, each) == value for each, value in given.items())
    size = ["--width", str(side), "--height", str(side)]
    said = CliRunner().invoke(main, ["generate", PROMPT, "--steps", "3", *size, "--out", str(tmp_path), *options])
    assert said.exit_code == 0, said.output
    [file] = tmp_path.glob("*.png")
    again = Request.from_png(file)
    assert all(getattr(again, each) == value for each, value in given.items())


def test_tiles(tmp_path: Any) -> None:
    """Side and overlap in pixels; pictures of one tile are drawn as they are, and the picture remembers."""
    sd = Pipeline.miniature()
    how: dict[str, Any] = {"steps": 2, "height": 48, "seeds": 5, "progress": False}
    [picture] = generate(sd, PROMPT, width=80, tile="48:16", **how)
    [want] = generate(replace(sd, unet=Tiled(sd.unet, 6, 2)), PROMPT, width=80, **how)
    assert np.array_equal(np.asarray(picture.image), np.asarray(want.image))
    assert Request.from_text(picture.settings.parameters()).tile == "48:16"
    assert Request(PROMPT, tile="48").changed(sd, 48, 48) is sd
    said = CliRunner().invoke(main, ["generate", PROMPT, "--steps", "1", "--width", "96", "--tile", "48:16", "--out",
                                     str(tmp_path)])
    assert said.exit_code == 0 and Request.from_png(next(tmp_path.glob("*.png"))).tile == "48:16", said.output
    for tile, says in (("48:48", "an overlap less than it"), ("wide", "got 'wide'")):
        with pytest.raises(ValueError, match=says):
            Request(PROMPT, tile=tile)
    with pytest.raises(ValueError, match="multiples of 8"):
        generate(sd, PROMPT, tile="44:16", **how)
    with pytest.raises(ValueError, match="choose one"):
        Request(PROMPT, tile="48", hidiffusion=True)
    with pytest.raises(ValueError, match="choose tile or tiling"):
        Request(PROMPT, tile="48", tiling=True)


def test_a_lora_by_sigma_is_changed_in_each_of_its_networks() -> None:
    sd = Pipeline.miniature()
    request = Request(PROMPT, tome=0.5)
    twin = replace(sd, unet=BySigma(sd.unet, sd.unet, at=1.0))
    networks: Any = request.changed(twin, 32, 32).unet.networks
    assert all(isinstance(network, Inside) for network in networks) and networks[0] is networks[1]
    assert Request(PROMPT).changed(sd, 64, 64) is sd


def test_the_second_pass_is_changed_at_its_own_size(recwarn: pytest.WarningsRecorder,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    sd = Pipeline.miniature()
    how: dict[str, Any] = {"steps": 3, "seeds": 5, "hires": "2:0.5", "progress": False}
    seen = list[tuple[Any, ...]]()
    forward = UNet.forward

    def looking(self: UNet, x: Any, t: Any, context: Any, patches: Any = (), changes: Any = (), deep: Any = None,
                ) -> Any:
        if x.shape[2:] == (12, 12):
            seen.append(tuple(type(change) for change in changes))
        return forward(self, x, t, context, patches, changes, deep)

    monkeypatch.setattr(UNet, "forward", looking)
    changed, plain = (generate(sd, PROMPT, hidiffusion=on, **how)[0] for on in (True, False))
    assert changed.image.size == (96, 96) and changed.image.tobytes() != plain.image.tobytes()
    assert not [each for each in recwarn if "larger than" in str(each.message)]
    assert seen == [(WiderStride, WindowAttention), (WindowAttention,), (WindowAttention,), (), (), ()]
    with pytest.warns(UserWarning, match=r"acts above sigma 2\.74, and this run begins at 0\.693"):
        generate(sd, PROMPT, deep_shrink=True, **how)


def test_the_published_numbers_of_each_family() -> None:
    xl = UNet(UNetConfig(4, 4, 32, (1, 2, 4), 2, (0, 1, 1), 24, 2))
    sd2 = UNet(UNetConfig(4, 4, 32, (1, 2, 4, 4), 2, (1, 1, 1, 0), 1024, 2))
    assert [FreeU.of(unet).b1 for unet in (xl, sd2)] == [1.3, 1.4]
    assert hidiffusion(sd2, 128, 200)[0] == WiderStride(3)
    assert [type(change) for change in hidiffusion(xl, 256, 256)] == [WiderStride, Shrink, WindowAttention]
    assert [type(change) for change in hidiffusion(xl, 256, 256, aggressive=False)] == [Shrink, WindowAttention]


def test_sizes_that_are_halved_unevenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said where some map in windows has an odd side at some sigma, and nowhere else."""
    odd: list[int] = []

    def attention(self: Any, attn: Any, x: Any, size: tuple[int, int]) -> Any:
        odd.extend(side for side in size if side % 2)
        return attn(x, x)

    monkeypatch.setattr(Windows, "attention", attention)
    sd2 = UNetConfig(4, 4, 32, (1, 2, 4, 4), 2, (1, 1, 1, 0), 8, 2)
    xl = UNetConfig(4, 4, 32, (1, 2, 4), 2, (0, 1, 1), 8, 2)
    for config, unit, good in ((sd2, 16, 96), (xl, 64, 128)):
        sd = replace(Pipeline.miniature(), unet=UNet(config))
        for width, height in ((good, good), (good, good + unit), (good + unit // 2, good)):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                network: Any = Request(PROMPT, hidiffusion=True).changed(sd, width, height).unet
            odd.clear()
            for sigma in (14.0, 5.0, 2.5, 1.0):
                x = torch.zeros(1, 4, height // 8, width // 8)
                network.at((sigma,))(x, torch.ones(1), Context.of(torch.zeros(1, 2, 8)))
            assert bool(said) == bool(odd) == (width != good)
            assert all(f"multiples of {unit} px are even, such as {good}x" in str(each.message) for each in said)


def test_what_cannot_be() -> None:
    with pytest.warns(UserWarning, match="larger than the model's own 48 px, and leaves 48x48"):
        generate(Pipeline.miniature(), PROMPT, steps=1, hidiffusion=True, seeds=1, progress=False)
    with pytest.raises(ValueError, match="choose one"):
        Request(PROMPT, hidiffusion=True, tome=0.5)
    for other in ({"tile": "32:16"}, {"lora": "azure.safetensors:0.8:14.6-2.5"}):
        with pytest.raises(ValueError, match=r"reuse .* negative prompt alone, 1:3"):
            Request(PROMPT, reuse="3:2", **other)  # type: ignore[arg-type]
        assert Request(PROMPT, reuse="1:2", **other).reuse == "1:2"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0 to 0\.75, got 2"):
        Request(PROMPT, tome=2)
