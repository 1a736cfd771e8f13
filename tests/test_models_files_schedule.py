"""What a model predicts, its noise levels, and how that is known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ella_kd.models import EDMSchedule, NoiseSchedule, load_checkpoint
from ella_kd.models.files import presets
from ella_kd.models.files.hashes import sha256
from ella_kd.models.files.layout import Part
from ella_kd.models.files.names import Source
from ella_kd.models.files.presets import HubFile, Preset
from ella_kd.models.files.schedule import V_BIAS, Known, known_prediction
from ella_kd.models.files.weights import Weights
from filing import Edit, Tensors


@pytest.mark.parametrize(("said", "argument", "want"), [
    ("epsilon", None, "eps"), ("v", None, "v"), ("v", "eps", "eps"), ("odd", "v", "v")])
def test_prediction_is_the_argument_then_the_metadata(edited: Edit, said: str, argument: str | None,
                                                      want: str) -> None:
    path = edited(dict, **{"modelspec.prediction_type": said})
    assert load_checkpoint(path, prediction=argument).noise_schedule.prediction == want  # type: ignore[arg-type]


def test_the_schedule_is_the_exact_one_unless_the_file_has_another(edited: Edit) -> None:
    def table_of(tensors: Callable[[Tensors], Tensors], **args: Any) -> Tensor:
        schedule = load_checkpoint(edited(tensors), **args).noise_schedule
        assert isinstance(schedule, NoiseSchedule)
        return schedule.alphas_cumprod

    exact = NoiseSchedule.sd15().alphas_cumprod
    assert torch.equal(table_of(lambda t: {**t, "alphas_cumprod": exact.half()}), exact)
    other = NoiseSchedule.scaled_linear(beta_end=0.014, n=1100, prediction="v")
    found = table_of(lambda t: {**t, "alphas_cumprod": other.alphas_cumprod}, prediction="v")
    assert torch.equal(found, other.alphas_cumprod)
    with pytest.raises(ValueError, match=r"edited.safetensors has a noise schedule of its own .*decrease strictly"):
        load_checkpoint(edited(lambda t: {**t, "alphas_cumprod": torch.zeros(1000)}))
    for table in (exact.bfloat16(), exact.bfloat16().float(), exact.half().float(), exact.half().bfloat16()):
        changed: Tensors = {"alphas_cumprod": table}
        assert torch.equal(table_of(lambda t: t | changed), exact)  # noqa: B023
    with pytest.raises(ValueError, match=r"strictly.* \(bfloat16 is coarse: give the table in float32\)"):
        load_checkpoint(edited(lambda t: {**t, "alphas_cumprod": other.alphas_cumprod.bfloat16()}))


def test_a_table_of_ones_own_is_kept(edited: Edit) -> None:
    table = NoiseSchedule.sd15().alphas_cumprod - torch.linspace(0, 1, 1000, dtype=torch.float64) ** 8 * 0.00095
    for own, ratio in ((table.float(), 1e-6), (table.half(), 1e-3)):
        schedule = load_checkpoint(edited(lambda t: {**t, "alphas_cumprod": own})).noise_schedule  # noqa: B023
        assert schedule.sigma_max == pytest.approx(16.39, abs=0.02) and schedule.sigma_max == pytest.approx(
            float(((1 - table[-1]) / table[-1]).sqrt()), rel=ratio)
    zero = NoiseSchedule.sd15().zero_terminal_snr().alphas_cumprod
    for last in (0.0, 4.8973451890853435e-08):  # as files have it
        own = torch.cat([zero[:-1], torch.tensor([last])]).float()
        schedule = load_checkpoint(edited(lambda t: {**t, "alphas_cumprod": own})).noise_schedule  # noqa: B023
        assert isinstance(schedule, NoiseSchedule) and torch.equal(schedule.alphas_cumprod, zero)


def test_eps_against_the_noise_levels_of_v_is_refused(edited: Edit) -> None:
    path = edited(lambda t: {**t, "edm_vpred.sigma_max": torch.tensor(120.0)}, **SAID)
    with pytest.raises(ValueError, match=r'edm_vpred.sigma_max, .*prediction="eps" cannot be'):
        load_checkpoint(path, prediction="eps")


SAID = {"modelspec.prediction_type": "", "modelspec.predict_key": ""}  # what the small file says, taken away


@pytest.mark.parametrize(("said", "want"), [("v", "v"), ("epsilon", "eps")])
def test_comfyuis_key_is_read(edited: Edit, said: str, want: str) -> None:
    loaded = load_checkpoint(edited(dict, **{**SAID, "modelspec.predict_key": said}))
    assert loaded.noise_schedule.prediction == want
    assert loaded.known == Known(want, "the file's metadata modelspec.predict_key")


def test_marker_tensors_speak(edited: Edit) -> None:
    empty = torch.tensor([])
    loaded = load_checkpoint(edited(lambda t: {**t, "v_pred": empty}, **SAID))
    assert torch.equal(loaded.noise_schedule.sigmas, NoiseSchedule.sd2_v().sigmas)
    assert (loaded.noise_schedule.prediction, loaded.known) == ("v", Known("v", "the file's tensor v_pred"))
    loaded = load_checkpoint(edited(lambda t: {**t, "ztsnr": empty}, **SAID))
    zero = NoiseSchedule.sd2_v().zero_terminal_snr()
    assert loaded.noise_schedule.prediction == "v" and torch.equal(loaded.noise_schedule.sigmas, zero.sigmas)
    table = zero.alphas_cumprod.float()
    loaded = load_checkpoint(edited(lambda t: {**t, "ztsnr": empty, "alphas_cumprod": table}, **SAID))
    assert torch.equal(loaded.noise_schedule.sigmas, zero.sigmas), "it is so already"
    ends = {"edm_vpred.sigma_max": torch.tensor(100.0), "edm_vpred.sigma_min": torch.tensor(0.01)}
    loaded = load_checkpoint(edited(lambda t: {**t, **ends}, **SAID))
    schedule = loaded.noise_schedule
    assert isinstance(schedule, EDMSchedule) and schedule.prediction == "v" and schedule.sigma_data == 1
    assert (schedule.sigma_max, schedule.sigma_min) == (pytest.approx(100), pytest.approx(0.01))
    sigma = torch.tensor([0.1, 3.0])
    for ours, theirs in zip(schedule.scalings(sigma), NoiseSchedule.sd2_v().scalings(sigma)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("marker", "want"), [("v_pred", "v"), ("ztsnr", "v"), ("edm_mean", "edm")])
def test_a_marker_holds_against_stale_metadata(edited: Edit, marker: str, want: str) -> None:
    value = torch.zeros(1, 4, 1, 1) if marker == "edm_mean" else torch.tensor([])
    path = edited(lambda t: {**t, marker: value}, **{"modelspec.prediction_type": "epsilon"})
    with pytest.warns(UserWarning, match=rf"says modelspec.prediction_type = 'epsilon', and its tensor {marker} says"):
        loaded = load_checkpoint(path)
    assert loaded.known == Known(want, f"the file's tensor {marker}")
    assert isinstance(loaded.noise_schedule, EDMSchedule if want == "edm" else NoiseSchedule)
    assert load_checkpoint(path, prediction="eps").noise_schedule.prediction == "eps"


@pytest.mark.parametrize(("name", "text", "want"), [
    ("edited.yaml", "model:\n  params:\n    parameterization: \"v\"\n", "v"),
    ("edited.yaml", "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n", "eps"),
    ("edited.yaml", "          target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling\n", "v"),
    ("edited.yaml", "          target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling\n", "eps"),
    ("edited.yaml", "          target: sgm.modules.diffusionmodules.denoiser_scaling.EDMScaling\n", "edm"),
    ("scheduler_config.json", '{"prediction_type": "v_prediction"}', "v"),
    ("scheduler_config.json", '{"_class_name": "PNDMScheduler"}', "eps"),
])
def test_a_configuration_beside_the_file_is_read(edited: Edit, tmp_path: Path, name: str, text: str, want: str) -> None:
    (tmp_path / name).write_text(text)
    loaded = load_checkpoint(edited(dict, **SAID))
    assert loaded.noise_schedule.prediction == want and loaded.known and name in loaded.known.how


@pytest.mark.parametrize(("name", "text"), [
    ("edited.yaml", "model:\n  target: sgm.models.diffusion.DiffusionEngine\n  # target: ldm.VScaling\n"),
    ("scheduler_config.json", '{"_class_name": "CosineDPMSolverMultistepScheduler"}'),
])
def test_a_configuration_that_does_not_say_is_no_proof(edited: Edit, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.warns(UserWarning, match="nothing says whether"):
        known = load_checkpoint(edited(dict, **SAID)).known
    assert known and known.guess


@pytest.mark.parametrize(("config", "says"), [
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "its scheduler is a FlowMatchEuler.*flow matching is not"),
    ({"prediction_type": "sample"}, "says prediction_type = 'sample', known are epsilon and v_prediction"),
    ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule 'squaredcos_cap_v2' is not known"),
    ({"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000"), ({"beta_start": "x"}, "could not convert"),
    ({"trained_betas": [0.1, 2.0]}, "decrease strictly"),
])
def test_a_scheduler_that_cannot_be_used(edited: Edit, tmp_path: Path, config: dict[str, Any], says: str) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    path = edited(lambda t: {name: x for name, x in t.items() if name != "alphas_cumprod"}, **SAID)
    with pytest.raises(ValueError, match=rf"edited.safetensors.*{says}"):
        load_checkpoint(path)


def test_betas_of_ones_own(edited: Edit, tmp_path: Path) -> None:
    betas = torch.linspace(0.001, 0.02, 50, dtype=torch.float64)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler",
                                                               "trained_betas": betas.tolist()}))
    path = edited(lambda t: {name: x for name, x in t.items() if name != "alphas_cumprod"}, **SAID)
    table = load_checkpoint(path).noise_schedule
    assert isinstance(table, NoiseSchedule) and torch.equal(table.alphas_cumprod, (1 - betas).cumprod(0))


def test_nothing_is_silently_eps(edited: Edit) -> None:
    says = (r"nothing says whether edited.safetensors predicts eps or v: eps is a guess: .*"
            r'give prediction="v" \(--prediction v\)')
    with pytest.warns(UserWarning, match=says):
        loaded = load_checkpoint(edited(dict, **SAID))
    assert loaded.known and loaded.known.guess and loaded.noise_schedule.prediction == "eps"
    with pytest.raises(ValueError, match='prediction must be "eps" or "v", got \'x\''):
        load_checkpoint(edited(dict, **SAID), prediction="x")  # type: ignore[arg-type]


def test_a_published_file_is_known_by_its_hash(edited: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edited(dict, **SAID)
    for digest, want in ((sha256(path), Known("v", "its sha256 is that of org/sd:x.ckpt")), ("0" * 64, None)):
        file = HubFile("org/sd", "x.ckpt", bytes=path.stat().st_size, sha256=digest, prediction="v")
        monkeypatch.setattr(presets, "PRESETS", {"sd": Preset("a test", {"checkpoint": file})})
        known = load_checkpoint(path).known
        assert known and (known == want or (want is None and known.guess))


@pytest.mark.parametrize(("spread", "step", "purpose", "want", "guess"), [
    (0.2, None, "", "v", True), (0.05, None, "", "eps", True), (0.2, "875000", "", "eps", False),
    (0.2, "1", "", "v", True), (0.2, None, "inpainting", "eps", False), (0.01, None, "x4 upscaler", "v", False),
])
def test_stable_diffusion_2_is_guessed_by_a_tensor(spread: float, step: str | None, purpose: str, want: str,
                                                   guess: bool) -> None:
    weights = Weights.of({V_BIAS: torch.tensor([-spread, spread] * 16)}, "x.safetensors")
    weights.metadata |= {"global_step": step} if step else {}
    known = known_prediction(Path("x.safetensors"), weights, Part("unet", weights, {V_BIAS: Source(V_BIAS, (32,))}),
                             "sd2", purpose)
    assert (known.prediction, known.guess) == (want, guess)
