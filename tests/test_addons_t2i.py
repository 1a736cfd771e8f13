"""T2I-Adapter against diffusers' own: full, light, of one channel, SDXL's; in both spellings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import T2IAdapter as Theirs
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.speed.ways import as_diffusers
from ella_kd.models import UNet, UNetConfig
from ella_kd.models.addons.t2i import T2IAdapter, to_authors
from ella_kd.models.context import Context
from ella_kd.models.controls import Control, Hint
from tiny import randomised, relative

SD1 = UNetConfig(model_channels=32, channel_mult=(1, 2, 3, 3), num_res_blocks=2, depth=(1, 1, 1, 0), context_dim=24,
                 num_heads=2)
SDXL = UNetConfig(model_channels=32, channel_mult=(1, 2, 4), num_res_blocks=2, depth=(0, 1, 1), context_dim=24,
                  num_heads=2, linear_proj=True, vector_dim=16 + 6 * 256)
KINDS: dict[str, tuple[UNetConfig, dict[str, Any]]] = {
    "full": (SD1, {"channels": [32, 64, 96, 96]}),
    "one channel": (SD1, {"channels": [32, 64, 96, 96], "in_channels": 1}),
    "light": (SD1, {"channels": [32, 64, 96], "num_res_blocks": 4, "adapter_type": "light_adapter"}),
    "xl": (SDXL, {"channels": [32, 64, 128, 128], "downscale_factor": 16, "adapter_type": "full_adapter_xl"})}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_diffusers(kind: str, tmp_path: Path) -> None:
    config, how = KINDS[kind]
    torch.manual_seed(0)
    theirs: Any = Theirs(**how)
    randomised(theirs, 1, 0.1)
    theirs.save_pretrained(tmp_path / "folder")
    plain = {name.removeprefix("adapter."): x.clone() for name, x in theirs.state_dict().items()}
    names = to_authors(plain)
    save_file({names[name]: x for name, x in plain.items()}, tmp_path / "authors.safetensors")
    torch.save({"adapter": {names[name]: x for name, x in plain.items()}}, tmp_path / "nested.pth")
    assert any(".body." in name or name == "body.7.block1.weight" for name in names.values())
    nets = [T2IAdapter.load(tmp_path / name) for name in ("folder", "authors.safetensors", "nested.pth")]
    for net in nets[1:]:
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), nets[0].parameters(), strict=True))
    pictures = torch.rand(2, 1, 64, 64) if "one" in kind else torch.rand(2, 3, 64, 64)
    wanted = theirs(pictures)
    for got, want in zip(nets[0](pictures.expand(-1, 3, -1, -1)), wanted, strict=True):
        assert relative(got, want) < 1e-5
    unet = randomised(UNet(config), 5, 0.1)
    x, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([700.0, 3.0]), torch.randn(2, 5, 24)
    ours: dict[str, Any] = {}
    told: dict[str, Any] = {}
    if config.vector_dim:
        ours = {"vector": torch.randn(2, 16), "sizes": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(2, 1)}
        told = {"added_cond_kwargs": {"text_embeds": ours["vector"], "time_ids": ours["sizes"]}}
    want = as_diffusers(unet)(x, t, tokens, down_intrablock_additional_residuals=[0.6 * f for f in wanted], **told)
    hints = tuple(Hint(row.expand(-1, 3, -1, -1)) for row in pictures.split(1))
    control = Control(rows=(0, 1), network=nets[0], hints=hints, strengths=(0.6, 0.6))
    got = unet(x, t, Context(tokens, controls=(control,), **ours))
    assert relative(got, want.sample) < 1e-5
    assert relative(got, unet(x, t, Context(tokens, **ours))) > 1e-2
    wide = UNet(UNetConfig(model_channels=64, channel_mult=(1, 2), num_res_blocks=1, depth=(1, 0), context_dim=24))
    with pytest.raises(ValueError, match=r"the T2I-Adapter folder is one for .* take one that was made for this UNet"):
        wide(x, t, Context(tokens, controls=(control,)))


def test_what_is_refused(tmp_path: Path) -> None:
    save_file({"control_model.input_hint_block.0.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is not a T2I-Adapter, it looks like a ControlNet"):
        T2IAdapter.load(tmp_path / "x.safetensors")
    net = randomised(T2IAdapter(3, (32, 64, 96, 96)), 0)
    weights = net.state_dict()
    save_file({**weights, "conv_in.weight": torch.zeros(32, 5, 3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="it reads 5 numbers a place, expected one of 64, 192, 256, 768"):
        T2IAdapter.load(tmp_path / "x.safetensors")
    del weights["body.3.block1.bias"]
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"missing: body\.3\.block1\.bias"):
        T2IAdapter.load(tmp_path / "x.safetensors")


@torch.no_grad()
def test_a_picture_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomised(T2IAdapter(3, (32, 64, 96, 96)), 0)
    unet = randomised(UNet(SD1), 5, 0.1)
    pictures: list[int] = []
    read = net.read

    def noted(x: Tensor) -> tuple[Tensor, ...]:
        pictures.append(len(x))
        return read(x)

    monkeypatch.setattr(net, "read", noted)
    hints = Hint(torch.rand(1, 3, 40, 50)), Hint(torch.rand(1, 3, 64, 64))
    control = Control(rows=(0, 1, 2), network=net, hints=(hints[0], hints[1], hints[0]), strengths=(1.0, 0.5, 1.0))
    x, tokens = torch.randn(1, 4, 8, 8).repeat(3, 1, 1, 1), torch.randn(1, 5, 24).repeat(3, 1, 1)
    for t in (900.0, 500.0, 100.0):
        out = unet(x, torch.full((3,), t), Context(tokens, controls=(control,)))
        assert relative(out[2:], out[:1]) < 1e-6 < relative(out[1:2], out[:1])
    assert pictures == [2]
