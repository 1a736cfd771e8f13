"""Seamless textures: on a torus every network commutes with moves around the edges; nothing else is touched."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ella_kd import Pipeline, draw, generate, read_settings
from ella_kd.models import AutoencoderKL, UNet, UNetConfig, VAEConfig
from ella_kd.models.context import Context
from ella_kd.models.cpu import fast_on_cpu
from ella_kd.models.seamless import seamless
from ella_kd.request import Request
from ella_kd.samplers import randn
from tiny import WIDTH, noise, randomised, relative, tiny_unet


@torch.no_grad()
def test_a_move_around_the_edges_commutes() -> None:
    unet, vae = tiny_unet().double(), randomised(AutoencoderKL(VAEConfig(channels=32, channel_mult=(1, 2))), 1).double()
    x, tokens, t = noise(2, 4, 8, 12, dtype=torch.float64), noise(2, 3, WIDTH, dtype=torch.float64), torch.ones(2) * 400
    before = [*map(torch.clone, (unet(x, t, tokens), vae.decode(x)))]
    for network, call, fine in ((seamless(unet), lambda n, z: n(z, t, Context(tokens)), 1),
                                (seamless(vae), lambda n, z: n.decode(z), 2), (seamless(vae), lambda n, z: n.encode(
                                    torch.nn.functional.interpolate(z[:, :3].clamp(-1, 1), scale_factor=2)), 1)):
        moved = call(network, x.roll((2, 4), (2, 3)))
        assert relative(moved, call(network, x).roll((2 * fine, 4 * fine), (2, 3))) < 1e-12
    plain = call(vae, x.roll((2, 4), (2, 3)))
    assert relative(plain, call(vae, x).roll((2, 4), (2, 3))) > 1e-3  # an ordinary one has edges
    assert all(torch.equal(a, b) for a, b in zip(before, (unet(x, t, tokens), vae.decode(x)), strict=True))
    assert all(a is b for a, b in zip(unet.parameters(), seamless(unet).parameters(), strict=True))


@torch.no_grad()
def test_before_and_after_fast_on_cpu() -> None:
    unet = randomised(UNet(UNetConfig(4, 4, 128, (1, 2), 1, (0, 1), WIDTH, 2)), 0, 0.05)
    x, tokens, t = noise(1, 4, 7, 10), noise(1, 3, WIDTH), torch.ones(1) * 400
    wanted = seamless(unet)(x, t, tokens)
    for network in (fast_on_cpu(seamless(unet)), seamless(fast_on_cpu(unet))):
        assert relative(network(x, t, tokens), wanted) < 1e-4
    assert relative(fast_on_cpu(unet)(x, t, tokens), wanted) > 1e-2


def test_tiling_by_the_door(tiny_files: dict[str, str], tmp_path: Path) -> None:
    pipeline = Pipeline.load(**tiny_files, device="cpu")  # type: ignore[arg-type]
    [picture] = generate(pipeline, "a red circle", tiling=True, width=16, height=16, steps=2, seeds=1, progress=False)
    picture.save(tmp_path / "a.png")
    [again] = generate(pipeline, progress=False, **read_settings(tmp_path / "a.png"))
    assert again.image.tobytes() == picture.image.tobytes()
    assert Request.from_text(picture.settings.parameters()).tiling
    start = randn((1, 4, 4, 4), [1])
    texts: dict[str, Any] = {"uncond": pipeline.encode(""), "steps": 2, "progress": False}
    one, other = (np.asarray(draw(pipeline.seamless(), pipeline.encode("a"), noise=z, **texts)[0]).astype(int)
                  for z in (start, start.roll(2, 3)))
    assert np.abs(np.roll(one, 2 * pipeline.vae.factor, 1) - other).max() <= 1
