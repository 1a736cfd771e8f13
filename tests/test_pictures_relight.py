"""IC-Light: offsets on a checkpoint, and what its network is shown, against the published script's steps, tiny."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.speed.ways import as_diffusers
from ella_kd import Pipeline, cli, draw, generate, read_settings
from ella_kd.models import UNet
from ella_kd.samplers import randn
from test_models_vae import diffusers_twin
from test_pictures_diffusers import SCALE, SEED, SIZE, STEPS, ddim, decoded, from_sigma_max
from test_pictures_pixels import speckled
from tiny import relative

__all__ = ["decoded"]
THING, BEHIND = speckled(SIZE, SIZE, seed=1), speckled(SIZE, SIZE, seed=2)
ALPHA = Image.new("L", (SIZE, SIZE))
ALPHA.paste(255, (8, 4, 28, 30))
CUT = THING.copy()
CUT.putalpha(ALPHA)


def write_offset(path: Path, pipeline: Pipeline, channels: int, **other: Tensor) -> dict[str, Tensor]:
    """Differences of every tensor, under diffusers' names, for a network that sees so many channels."""
    generator = torch.Generator().manual_seed(channels)
    found = {name: torch.randn(x.shape, generator=generator) * 0.03
             for name, x in as_diffusers(cast(UNet, pipeline.unet)).state_dict().items()}
    own = found["conv_in.weight"]
    found["conv_in.weight"] = torch.randn(own.shape[0], channels, 3, 3, generator=generator) * 0.2
    save_file({**found, **other}, path)
    return found


@torch.no_grad()
def theirs(pipeline: Pipeline, offset: dict[str, Tensor], pictures: list[Image.Image], noise: Tensor) -> Tensor:
    """Their script: conv_in widened with zeros, the offsets added, the pictures' latents beside x in both halves."""
    unet: Any = as_diffusers(cast(UNet, pipeline.unet))
    narrow, channels = unet.conv_in, offset["conv_in.weight"].shape[1]
    unet.conv_in = torch.nn.Conv2d(channels, narrow.out_channels, 3, padding=1)
    unet.conv_in.weight.zero_()[:, :4] = narrow.weight
    unet.conv_in.bias.copy_(narrow.bias)
    unet.load_state_dict({name: x + offset[name] for name, x in unet.state_dict().items()}, strict=True)
    pixels = torch.stack([torch.from_numpy(np.array(each)).float().movedim(-1, 0) / 127 - 1 for each in pictures])
    vae: Any = diffusers_twin(pipeline.vae)
    beside = torch.cat([each[None] * pipeline.vae.config.scale for each in vae.encode(pixels).latent_dist.mode()], 1)
    text = torch.cat([pipeline.encode(said, "clip")(torch.zeros(1)).tokens for said in ("", "a red circle")])
    scheduler, x = ddim(), noise
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        nothing, wanted = unet(torch.cat([x, beside], 1).repeat(2, 1, 1, 1), t, text).sample.chunk(2)
        x = scheduler.step(nothing + SCALE * (wanted - nothing), t, x).prev_sample
    return x


@pytest.mark.parametrize("channels", [8, 12])
def test_relighting_is_theirs(pipeline: Pipeline, tiny_files: dict[str, str], decoded: list[Tensor], tmp_path: Path,
                              channels: int) -> None:
    offset = write_offset(tmp_path / "light.safetensors", pipeline, channels)
    lit = Pipeline.load(tiny_files["checkpoint"], offset=tmp_path / "light.safetensors", device="cpu",
                        clip_tokenizer=tiny_files["clip_tokenizer"])
    assert (lit.purpose, lit.name) == ("IC-Light", "sd + light")
    noise = randn((1, 4, 8, 8), [SEED])
    pictures: dict[str, Any] = {"foreground": CUT, **({"background": BEHIND} if channels == 12 else {})}
    grey = Image.composite(THING, Image.new("RGB", THING.size, (127, 127, 127)), ALPHA)
    args: dict[str, Any] = {"uncond": lit.encode("", "clip"), "guidance": SCALE, "sampler": "euler", "steps": STEPS,
                            "schedule": "leading", "seeds": SEED, "progress": False, "width": SIZE, "height": SIZE}
    draw(lit, lit.encode("a red circle", "clip"), noise=from_sigma_max(lit), **args, **pictures)
    want = theirs(pipeline, offset, [grey, BEHIND][: len(pictures)], noise)
    assert relative(decoded[-1], want) < 2e-6  # 7e-6 with 127.5 as 0, .09 with another picture
    if channels == 8:  # a start picture is where the light comes from, as in their script
        draw(lit, lit.encode("a red circle", "clip"), start=BEHIND, strength=0.9, **{**args, "width": None,
             "height": None}, **pictures)
        assert relative(decoded[-1], want) > 0.05
    lit.save(tmp_path / "whole.safetensors")  # a whole file of 8 channels: the picture's name says what it is for
    whole = Pipeline.load(tmp_path / "whole.safetensors", device="cpu", clip_tokenizer=tiny_files["clip_tokenizer"])
    draw(whole, whole.encode("a red circle", "clip"), noise=from_sigma_max(lit), **args, **pictures)
    assert relative(decoded[-1], want) < 1e-4


def test_the_command_keeps_it(tiny_files: dict[str, str], pipeline: Pipeline, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_offset(Path("light.safetensors"), pipeline, 8)
    CUT.save("thing.png")
    words = [word for name, value in tiny_files.items() for word in (f"--{name.replace('_', '-')}", value)]
    words = ["generate", "a red circle", *words, "--device", "cpu", "--steps", "2", "--seed", "3", "--offset"]
    done = CliRunner().invoke(cli.main, [*words, "light.safetensors", "--foreground", "thing.png"])
    assert done.exit_code == 0, done.output
    path = next(Path("out").iterdir())
    assert read_settings(path)["foreground"] == "thing.png"
    lit = Pipeline.load(**tiny_files, offset="light.safetensors", device="cpu")  # type: ignore[arg-type]
    [again] = generate(lit, progress=False, **read_settings(path))
    with Image.open(path) as image:
        assert (np.asarray(again.image) == np.asarray(image)).all()
    for offset, what in ((tiny_files["checkpoint"], "--offset takes IC-Light's file"), ("none", "no file at none")):
        done = CliRunner().invoke(cli.main, [*words, offset, "--foreground", "thing.png"])
        assert done.exit_code == 2 and what in done.output, done.output


def test_refusals(pipeline: Pipeline, tiny_files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "light.safetensors"
    write_offset(path, pipeline, 8)
    lit = Pipeline.load(**tiny_files, offset=path, device="cpu")  # type: ignore[arg-type]
    cases: list[tuple[Pipeline, dict[str, Any], str]] = [
        (lit, {}, "relights a picture: give it as foreground"), (lit, {"start": THING}, "give it as foreground"),
        (lit, {"foreground": CUT, "background": BEHIND}, "sees a foreground beside x, got 2 pictures"),
        (pipeline, {"foreground": CUT}, "for a network that relights"), (lit, {"background": BEHIND}, "give both"),
    ]
    for system, more, what in cases:
        with pytest.raises(ValueError, match=what):
            generate(system, "a", steps=1, progress=False, **more)
    with pytest.raises(ValueError, match=r"looks like IC-Light's offsets.*its place is offset, --offset"):
        Pipeline.load(path, device="cpu")
    with pytest.raises(ValueError, match=r"holds no offsets of a UNet, it looks like a Stable Diffusion 1\.x"):
        Pipeline.load(**tiny_files, offset=tiny_files["checkpoint"], device="cpu")  # type: ignore[arg-type]
    write_offset(path, pipeline, 8, **{"conv_out.weight": torch.zeros(4, 16, 3, 3)})
    with pytest.raises(ValueError, match=r"light\.safetensors does not fit .*:\n  misshapen"):
        Pipeline.load(**tiny_files, offset=path, device="cpu")  # type: ignore[arg-type]
