"""The bundled miniature draws what dense prompts say: its pictures, judged by the checker on unseen combinations."""

import json
import random
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks import demo, score
from benchmarks.miniature.questions import ask, summary
from benchmarks.miniature.scenes import parse, random_scene, render, to_pictures, to_tensor
from ella_kd import CFGDenoiser, ELLADenoiser, Pipeline
from ella_kd.samplers import randn, sample_dpm_adaptive, sample_dpm_fast


@pytest.fixture(scope="module")
def miniature() -> Pipeline:
    return Pipeline.miniature(device="cpu")


@torch.no_grad()
def test_the_autoencoder_gives_every_scene_back(miniature: Pipeline) -> None:
    rng = random.Random(7)
    scenes = [random_scene(rng, rng.randint(1, 3), unseen=True) for _ in range(200)]
    images = to_tensor([render(scene) for scene in scenes])
    decoded = torch.cat([miniature.vae.decode(miniature.vae.encode(part)) for part in images.split(50)])
    exact = [parse(picture) == scene for picture, scene in zip(to_pictures(decoded), scenes, strict=True)]
    assert sum(exact) >= 196


@pytest.mark.parametrize("mode", ["fixed", "flexible"])
def test_ella_draws_two_things_as_told(miniature: Pipeline, mode: str) -> None:
    wanted = score.held_out(24, 2)
    found = score.draw(miniature, score.write_captions(wanted, "dense"), mode=mode, steps=12, scale=score.SCALE)
    result = score.score(wanted, found)
    assert result["right"]["score"] >= 85
    assert result["right"]["all_right"] >= 70
    assert result["shuffled"]["score"] <= 40
    assert result["shuffled"]["all_right"] == 0


def test_the_unet_learned_from_tags_alone(miniature: Pipeline) -> None:
    wanted = score.held_out(24, 1)
    found = score.draw(miniature, score.write_captions(wanted, "tags"), mode="plain", steps=12, scale=score.SCALE)
    assert summary([ask(w, f) for w, f in zip(wanted, found, strict=True)])["all_right"] >= 90


def test_the_demo_as_a_user_runs_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(demo.main, ["--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"sheet.png", *(f"{n:02d}.png" for n in range(1, 9))}
    with Image.open(tmp_path / "01.png") as image:
        assert image.size == (256, 256)
        settings = json.loads(image.text["ella_kd"])  # type: ignore[attr-defined]
    assert settings["prompt"] in done.output
    assert done.output.count("found:") == 8
    difference = int(done.output.split("largest difference ")[1].split()[0])
    assert difference <= 2  # k-diffusion's own loop draws the same picture


def test_the_score_fills_its_tables(miniature: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "STEPS", 2)
    monkeypatch.setattr(score, "SCORED", ("euler",))
    (tmp_path / "README.md").write_text((score.HERE / "README.md").read_text())
    few = ["--count", "2", "--sampler-count", "2", "--most", "1"]
    done = CliRunner().invoke(score.main, [*few, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "README.md").read_text()
    assert text.count("| one |") == 4
    assert "| euler |" in text
    assert (tmp_path / "samplers.png").stat().st_size < 300_000
    assert json.loads((tmp_path / "score.json").read_text())["settings"]["steps"] == 2


def test_the_adaptive_and_the_fast_sampler_draw_dense_prompts_too(miniature: Pipeline) -> None:
    wanted = score.held_out(4, 2)
    assert miniature.tsc is not None and miniature.t5 is not None
    denoiser = CFGDenoiser(ELLADenoiser(miniature.unet, miniature.tsc, miniature.noise_schedule))
    low, high = denoiser.sigma_min, denoiser.sigma_max
    args = {"cond": miniature.t5(score.write_captions(wanted, "dense")), "uncond": miniature.t5(""), "cond_scale": 3.0}
    x = randn((4, 4, 8, 8), [0, 1, 2, 3]) * high
    adaptive = sample_dpm_adaptive(denoiser, x, low, high, extra_args=args, disable=True)
    fast = sample_dpm_fast(denoiser, x, low, high, 20, extra_args=args, disable=True)
    for latents in (adaptive, fast):
        with torch.no_grad():
            found = [parse(picture) for picture in to_pictures(miniature.vae.decode(latents))]
        assert summary([ask(w, f) for w, f in zip(wanted, found, strict=True)])["all_right"] >= 75
