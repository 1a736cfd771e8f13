"""The trainer: budgets, exact resuming after a kill, and all five stages end to end on a budget of seconds."""

import json
import random
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.miniature import autoencoder, captions, diffusion, text, train
from benchmarks.miniature.loop import Budget, Stage
from benchmarks.miniature.loop import train as run_stage
from benchmarks.miniature.scenes import Scene, Thing, random_scene
from ella_kd import Pipeline, generate
from ella_kd.models import NoiseSchedule


class Line(Stage):
    """Fits y = 2 x, from numbers of both generators."""

    name = "line"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 1)

    def forward(self, rng: random.Random, step: int, batch: int, progress: float) -> Tensor:
        x = torch.tensor([[rng.uniform(-1, 1)] for _ in range(batch)])
        return (self.layer(x) - 2 * x + 0.01 * torch.randn_like(x)).square().mean()

    def evaluate(self) -> dict[str, float]:
        torch.randn(random.randint(1, 9))  # scoring may use up what it likes
        return {"weight": self.layer.weight.item()}


BUDGET = Budget(samples=3200, batch=8, lr=0.05)


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
    assert not list(tmp_path.glob(".*"))


def test_a_run_killed_again_and_again_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    whole = Line()
    run_stage(whole, BUDGET, tmp_path / "whole", seed=0)

    class Slow(Line):
        def forward(self, rng: random.Random, step: int, batch: int, progress: float) -> Tensor:
            time.sleep(0.01)
            return super().forward(rng, step, batch, progress)

    def train_slowly() -> None:
        run_stage(Slow(), BUDGET, tmp_path, 0, log_every=0.05, save_every=0.02)

    reached = [0]
    for _ in range(2):
        process = get_context("fork").Process(target=train_slowly)  # a new interpreter would import for seconds
        process.start()
        while reached[-1] < len(reached) * 50:  # until it has gone on by fifty steps
            assert process.is_alive()
            time.sleep(0.01)
            if (tmp_path / "line.pt").exists():
                reached[-1] = torch.load(tmp_path / "line.pt", weights_only=True)["step"]
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        reached.append(0)
    state = torch.load(tmp_path / "line.pt", weights_only=True)
    assert 100 <= state["step"] < 400
    with pytest.raises(ValueError, match="unfinished"):
        train.finished(Line(), tmp_path)
    line = Line()
    run_stage(line, BUDGET, tmp_path, seed=0)
    assert torch.equal(line.layer.weight, whole.layer.weight)
    assert torch.equal(train.finished(Line(), tmp_path).layer.weight, whole.layer.weight)


def test_a_diffusion_stage_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing, without evaluation: captions, noise, curriculum, optimiser and average all go on as they were."""

    def stage() -> diffusion.PlainDiffusion:
        torch.manual_seed(0)
        made = diffusion.PlainDiffusion(text.CLIPReader(), diffusion.Curriculum())
        monkeypatch.setattr(made, "evaluate", dict)
        return made

    whole = stage()
    run_stage(whole, Budget(samples=20, batch=4), tmp_path / "whole", seed=3)

    class Stop(Exception):
        pass

    stopped = stage()
    forward = stopped.forward

    def until(rng: random.Random, step: int, batch: int, progress: float) -> Tensor:
        if step == 3:
            raise Stop
        return forward(rng, step, batch, progress)

    stopped.forward = until  # type: ignore[method-assign]
    with pytest.raises(Stop):
        run_stage(stopped, Budget(samples=20, batch=4), tmp_path, seed=3, save_every=0.0)
    resumed = stage()
    run_stage(resumed, Budget(samples=20, batch=4), tmp_path, seed=3)
    for ours, theirs in zip(resumed.unet.parameters(), whole.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_stage_that_was_not_trained_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train the stage 'line' first"):
        train.finished(Line(), tmp_path)


def test_the_loss_weight_favours_the_highest_noise() -> None:
    sigma = NoiseSchedule.sd15().t_to_sigma(torch.tensor([0.0, 300.0, 700.0, 999.0]))
    low, middle, high, highest = diffusion.loss_weight(sigma).tolist()
    assert low < middle < high < highest == 12


def test_timesteps_cover_the_schedule_and_favour_both_ends() -> None:
    torch.manual_seed(0)
    t = diffusion.draw_timesteps(20_000, torch.device("cpu"))
    assert 0 <= t.min() < 5
    assert 994 < t.max() <= 999
    shares = torch.histc(t, bins=3, min=0, max=999) / len(t)
    assert shares[0] > 0.35
    assert shares[2] > 0.3


def test_training_never_shows_what_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage draws its scenes by `random_scene`, never an unseen one."""
    asked = []

    def spy(rng: random.Random, count: int, unseen: bool = False) -> Scene:
        asked.append(unseen)
        return random_scene(rng, count, unseen)

    for module in (autoencoder, text, diffusion):
        monkeypatch.setattr(module, "random_scene", spy)
    clip, t5 = text.CLIPReader(), text.T5Reader()
    plain = diffusion.PlainDiffusion(clip, diffusion.Curriculum())
    for stage in (autoencoder.Autoencoder(), clip, t5, plain,
                  diffusion.ConnectorDiffusion(t5, plain.unet, diffusion.Curriculum())):
        asked.clear()
        assert stage(random.Random(0), 0, 2, 0.5).isfinite()
        assert asked == [False, False]


def test_case_and_marks_are_nothing_to_the_tokenizers() -> None:
    rng = random.Random(0)
    for reader in (text.t5_tokenizer(), text.clip_tokenizer()):
        words = captions.dense(Scene("snow", (Thing(0, "ring", "red", "striped", "dark"),)), rng,
                               captions.Wording(marks="stops"))
        lower, upper = (reader(captions.text(words, upper)).input_ids for upper in (False, True))
        assert lower == upper
        assert reader.unk_token_id not in lower
    assert len(text.t5_tokenizer()(captions.text(words)).input_ids) == len(words) + 1  # word-level, and the end


def test_the_stages_make_files_that_the_library_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = {name: Budget(samples=4, batch=4) for name in train.STAGES}
    monkeypatch.setattr(train, "BUDGETS", budgets)
    for owner in (autoencoder.Autoencoder, text.Reader, diffusion.DiffusionStage):
        monkeypatch.setattr(owner, "evaluate", lambda self: {})
    for name in train.STAGES:
        torch.manual_seed(0)
        stage = train.build(name, tmp_path)
        before = {key: value.clone() for key, value in stage.state_dict().items()}
        run_stage(stage, budgets[name], tmp_path, seed=0)
    changed = {key.split(".")[0] for key, value in stage.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"tsc", "denoiser"}  # the same connector under both names
    assert all(torch.equal(value, before[key]) for key, value in stage.state_dict().items() if "inner_model" in key)
    out = tmp_path / "out"
    train.export(tmp_path, 0, out)
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < 25e6
    pipeline = Pipeline.load(out / "sd.safetensors", tsc=out / "tsc.safetensors", t5=out / "t5",
                             clip_tokenizer=out / "clip", device="cpu")
    assert pipeline.size == 48
    for mode in ("plain", "fixed", "flexible"):
        assert generate(pipeline, "A red ring.", mode=mode, steps=2, seeds=0, progress=False)
    assert pipeline.t5 is not None
    prompt = "A red ring sits in the center. The background is snow."
    assert isinstance(stage, diffusion.ConnectorDiffusion)
    expected = stage.encode([prompt]).tokens
    torch.testing.assert_close(pipeline.t5(prompt).tokens, expected, atol=1e-2, rtol=1e-2)  # fp16 on disk
