"""ELLA's connector on disk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ella_kd.models import TSC, load_tsc, save_tsc
from tiny import randomised


def test_a_connector_comes_back_with_its_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tsc = TSC(time_channel=32, time_embed_dim=24, width=32, layers=2, heads=4, num_latents=6, input_dim=20)
    randomised(tsc, 0)
    save_tsc(tmp_path / "tsc.safetensors", tsc, dtype=torch.float16)
    loaded = load_tsc(tmp_path / "tsc.safetensors")
    features, t = torch.randn(1, 3, 20), torch.tensor([500.5])
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(features, t), tsc.half().float()(features, t))
    tensors = load_file(tmp_path / "tsc.safetensors")
    for name, says in [("connector.latents", "connector.latents is missing"),
                       ("connector.perceiver_blocks.1.ln_2.linear.bias",
                        r"missing: connector.perceiver_blocks.1.ln_2.linear.bias \[64\]")]:
        save_file({key: x for key, x in tensors.items() if key != name}, tmp_path / "broken.safetensors")
        with pytest.raises(ValueError, match=says):
            load_tsc(tmp_path / "broken.safetensors")
