"""The bundled miniature draws what dense prompts say: its pictures, judged by the checker on unseen combinations."""

import json
import random
from pathlib import Path

import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks import demo, score
from benchmarks.miniature.questions import ask, summary
from benchmarks.miniature.scenes import parse, random_scene, render, to_pictures, to_tensor
from ella_kd import CFGDenoiser
from ella_kd.samplers import randn, sample_dpm_adaptive, sample_dpm_fast
from studio import denoiser, miniature, prompts, read


@torch.no_grad()
def test_the_autoencoder_gives_every_scene_back() -> None:
    rng, vae = random.Random(7), miniature().vae
    scenes = [random_scene(rng, rng.randint(1, 3), unseen=True) for _ in range(100)]
    decoded = vae.decode(vae.encode(to_tensor([render(scene) for scene in scenes])))
    exact = [parse(picture) == scene for picture, scene in zip(to_pictures(decoded), scenes, strict=True)]
    assert sum(exact) >= 98


def test_ella_draws_two_things_as_told_in_fixed_mode() -> None:
    wanted = score.held_out(24, 2)
    found = score.draw(miniature(), score.write_captions(wanted, "dense"), mode="fixed", steps=12, scale=score.SCALE)
    result = score.score(wanted, found)
    assert result["right"]["score"] >= 85
    assert result["right"]["all_right"] >= 70
    assert result["shuffled"]["score"] <= 40
    assert result["shuffled"]["all_right"] == 0


def test_the_unet_learned_from_tags_alone() -> None:
    wanted = score.held_out(12, 1)
    found = score.draw(miniature(), score.write_captions(wanted, "tags"), mode="plain", steps=12, scale=score.SCALE)
    assert summary([ask(w, f) for w, f in zip(wanted, found, strict=True)])["all_right"] >= 90


def test_the_demo_as_a_user_runs_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(demo.main, ["--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"sheet.png", *(f"{n:02d}.png" for n in range(1, 9))}
    with Image.open(tmp_path / "01.png") as image:
        assert image.size == (288, 288)
        settings = json.loads(image.text["ella_kd"])  # type: ignore[attr-defined]
    assert settings["prompt"] in done.output
    assert done.output.count("found:") == 8
    assert int(done.output.split(" of 8 pictures are exactly")[0].split()[-1]) >= 6
    difference = int(done.output.split("largest difference ")[1].split()[0])
    assert difference <= 2  # k-diffusion's own loop draws the same picture


def test_the_adaptive_and_the_fast_sampler_draw_dense_prompts_too() -> None:
    wanted, cond, uncond = prompts(4)
    model = CFGDenoiser(denoiser())
    low, high = model.sigma_min, model.sigma_max
    args = {"cond": cond, "uncond": uncond, "cond_scale": 3.0}
    x = randn((4, 4, 6, 6), [0, 1, 2, 3]) * high
    adaptive = sample_dpm_adaptive(model, x, low, high, extra_args=args, disable=True)
    fast = sample_dpm_fast(model, x, low, high, 20, extra_args=args, disable=True)
    for latents in (adaptive, fast):
        assert summary([ask(w, f) for w, f in zip(wanted, read(latents), strict=True)])["all_right"] >= 75
