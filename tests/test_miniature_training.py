"""The trainer: budgets, resuming, local SGD, and all five stages end to end on a budget of seconds."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.miniature import diffusion, train
from benchmarks.miniature.autoencoder import Autoencoder, scenes_of
from benchmarks.miniature.loop import Budget, Stage
from benchmarks.miniature.loop import train as run_stage
from benchmarks.miniature.scenes import render, to_tensor
from ella_kd import Pipeline, generate
from ella_kd.models import NoiseSchedule


class Line(Stage):
    """Fits y = 2 x."""

    name = "line"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 1)

    def forward(self, rng: random.Random, batch: int, progress: float) -> Tensor:
        x = torch.tensor([[rng.uniform(-1, 1)] for _ in range(batch)])
        return (self.layer(x) - 2 * x).square().mean()

    def evaluate(self) -> dict[str, float]:
        return {"weight": self.layer.weight.item()}


BUDGET = Budget(samples=3200, minutes=60, batch=8, lr=0.05)


def test_a_stage_learns_logs_and_is_not_trained_twice(tmp_path: Path) -> None:
    line = Line()
    run_stage(line, BUDGET, tmp_path, seed=0)
    assert line.layer.weight.item() == pytest.approx(2, abs=0.02)
    log = [json.loads(text) for text in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert log[-1]["samples"] == 3200
    assert log[-1]["weight"] == pytest.approx(line.layer.weight.item(), rel=1e-6)  # scored with the averaged weights
    again = Line()
    run_stage(again, BUDGET, tmp_path, seed=0)
    assert torch.equal(again.layer.weight, line.layer.weight)
    assert len((tmp_path / "line.jsonl").read_text().splitlines()) == len(log)
    assert not list(tmp_path.glob("*.partial"))


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    class Killed(Line):
        steps = 0

        def forward(self, rng: random.Random, batch: int, progress: float) -> Tensor:
            self.steps += 1
            if self.steps == 200:
                raise KeyboardInterrupt
            return super().forward(rng, batch, progress)

    with pytest.raises(KeyboardInterrupt):
        run_stage(Killed(), BUDGET, tmp_path, seed=0, log_every=0.0)
    state = torch.load(tmp_path / "line.pt", weights_only=True)
    assert (state["samples"], state["done"]) == (199 * 8, False)
    with pytest.raises(ValueError, match="unfinished"):
        train.finished(Line(), tmp_path)
    line = Line()
    run_stage(line, BUDGET, tmp_path, seed=0)
    assert torch.load(tmp_path / "line.pt", weights_only=True)["samples"] == 3200
    assert torch.equal(train.finished(Line(), tmp_path).layer.weight, line.layer.weight)


def test_a_stage_that_was_not_trained_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train the stage 'line' first"):
        train.finished(Line(), tmp_path)


def test_whitening_changes_latents_and_no_picture() -> None:
    torch.manual_seed(0)
    stage = Autoencoder().eval().requires_grad_(False)
    images = to_tensor([render(scene) for scene in scenes_of(random.Random(2), 1024)])
    before = stage.vae.decode(stage.vae.encode(images[:8]))
    vae = stage.whitened()
    latents = torch.cat([vae.encode(part) for part in images.split(128)])
    flat = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.cov(flat), torch.eye(4), atol=1e-2, rtol=0)
    torch.testing.assert_close(vae.decode(latents[:8]), before, atol=1e-4, rtol=0)


def test_the_loss_weight_favours_the_highest_noise() -> None:
    sigma = NoiseSchedule.sd15().t_to_sigma(torch.tensor([0.0, 300.0, 700.0, 999.0]))
    expected = [5 * sigma[0] ** 2, 1.0, sigma[2], 12.0]  # 5 / SNR below SNR 5; then sigma, at most 12
    weight = diffusion.loss_weight(sigma)
    torch.testing.assert_close(weight[[0, 2, 3]], torch.stack([torch.as_tensor(expected[i]) for i in (0, 2, 3)]))
    assert 0.9 < weight[1] <= 5


def test_five_stages_make_a_system_that_the_loaders_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "POOL", 16)
    monkeypatch.setattr(diffusion.DiffusionStage, "evaluate", lambda self: {})
    budgets = {name: Budget(samples=16, minutes=1, batch=4) for name in train.STAGES}
    preset = replace(train.PRESETS["cpu"], budgets=budgets, processes=1)
    before = {}
    for name in train.STAGES:
        torch.manual_seed(0)
        stage = train.build(name, preset, tmp_path)
        before = {key: value.clone() for key, value in stage.state_dict().items()}
        run_stage(stage, budgets[name], tmp_path, seed=0)
    changed = {key.split(".")[0] for key, value in stage.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"tsc", "denoiser"}  # the same connector under both names
    assert all(torch.equal(value, before[key]) for key, value in stage.state_dict().items() if "inner_model" in key)
    train.export(preset, tmp_path, 0, tmp_path / "out")
    out = tmp_path / "out"
    pipeline = Pipeline.load(out / "sd.safetensors", tsc=out / "tsc.safetensors", t5=out / "t5",
                             clip_tokenizer=out / "clip", device="cpu")
    assert pipeline.size == 32
    for mode in ("plain", "fixed", "flexible"):
        assert generate(pipeline, "A red ring.", mode=mode, steps=2, seeds=0, progress=False)
    assert pipeline.t5 is not None
    prompt = "A red ring sits in the center. The background is snow."
    assert isinstance(stage, diffusion.ConnectorDiffusion)
    expected = stage.encode([prompt]).tokens
    torch.testing.assert_close(pipeline.t5(prompt).tokens, expected, atol=1e-2, rtol=1e-2)  # fp16 on disk


def test_two_processes_train_one_connector(tmp_path: Path) -> None:
    """Local SGD over gloo, as the cpu preset runs it: both processes stop together and leave one checkpoint."""
    script = tmp_path / "two.py"
    script.write_text(
        "from dataclasses import replace\n"
        "import sys, torch.distributed as dist, torch.multiprocessing as mp\n"
        "from pathlib import Path\n"
        "from benchmarks.miniature.loop import train\n"
        "from test_miniature_training import BUDGET, Line\n"
        "def work(rank, folder):\n"
        "    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)\n"
        "    line = Line()\n"
        "    train(line, replace(BUDGET, samples=6400), Path(folder), seed=0)\n"
        "    Path(folder, f'weight{rank}').write_text(str(line.layer.weight.item()))\n"
        "if __name__ == '__main__':\n"
        "    mp.spawn(work, args=(sys.argv[1],), nprocs=2)\n"
    )
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, env={**os.environ, "PYTHONPATH": paths})
    weights = [float((tmp_path / f"weight{rank}").read_text()) for rank in (0, 1)]
    assert weights == pytest.approx([2, 2], abs=0.05)
    assert torch.load(tmp_path / "line.pt", weights_only=True)["samples"] == 6400
