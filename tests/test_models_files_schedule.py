"""What a model predicts, its noise levels, and how that is known."""

import pytest
import torch

from ella_kd.models import NoiseSchedule, load_checkpoint
from filing import Edit


@pytest.mark.parametrize(("said", "argument", "want"), [
    ("epsilon", None, "eps"), ("v", None, "v"), ("v", "eps", "eps"), ("odd", "v", "v")])
def test_prediction_is_the_argument_then_the_metadata(edited: Edit, said: str, argument: str | None,
                                                      want: str) -> None:
    path = edited(dict, **{"modelspec.prediction_type": said})
    assert load_checkpoint(path, prediction=argument).noise_schedule.prediction == want  # type: ignore[arg-type]


def test_the_schedule_is_the_exact_one_unless_the_file_has_another(edited: Edit) -> None:
    exact = NoiseSchedule.sd15().alphas_cumprod
    rounded = load_checkpoint(edited(lambda t: {**t, "alphas_cumprod": exact.half()}))
    assert torch.equal(rounded.noise_schedule.alphas_cumprod, exact)
    other = NoiseSchedule.scaled_linear(beta_end=0.014, n=1100, prediction="v")
    loaded = load_checkpoint(edited(lambda t: {**t, "alphas_cumprod": other.alphas_cumprod}), prediction="v")
    assert torch.equal(loaded.noise_schedule.alphas_cumprod, other.alphas_cumprod)
    with pytest.raises(ValueError, match=r"edited.safetensors has a noise schedule of its own .*decrease strictly"):
        load_checkpoint(edited(lambda t: {**t, "alphas_cumprod": torch.zeros(1000)}))
    for table in (exact.bfloat16(), exact.bfloat16().float(), exact.half().float(), exact.half().bfloat16()):
        loaded = load_checkpoint(edited(lambda t, table=table: {**t, "alphas_cumprod": table}))
        assert torch.equal(loaded.noise_schedule.alphas_cumprod, exact)
    with pytest.raises(ValueError, match=r"strictly.* \(bfloat16 is coarse: give the table in float32\)"):
        load_checkpoint(edited(lambda t: {**t, "alphas_cumprod": other.alphas_cumprod.bfloat16()}))
