"""ControlNet against diffusers' own: its outputs, in the UNet, in every spelling and kind of file; whole runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.speed.ways import as_diffusers
from ella_kd.models import UNet, UNetConfig
from ella_kd.models.addons.control_files import to_ldm
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.context import Context
from ella_kd.models.controls import Control, Hint
from tiny import randomised, relative

WIDTH = 24
KINDS: dict[str, UNetConfig] = {
    "sd1": UNetConfig(model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=2, depth=(1, 1, 0), context_dim=WIDTH,
                      num_heads=2),
    "sd2": UNetConfig(model_channels=64, channel_mult=(1, 2), num_res_blocks=1, depth=(1, 1), context_dim=WIDTH,
                      num_heads=None, head_dim=64, linear_proj=True),
    "sdxl": UNetConfig(model_channels=64, channel_mult=(1, 1, 2), num_res_blocks=2, depth=(0, 1, 2), context_dim=WIDTH,
                       num_heads=None, head_dim=64, linear_proj=True, middle_depth=2, vector_dim=16 + 6 * 256)}


def their_controlnet(config: UNetConfig, seed: int = 0, **more: Any) -> Any:
    """diffusers' network for such a UNet, with random weights."""
    torch.manual_seed(seed)
    channels = [mult * config.model_channels for mult in config.channel_mult]
    down, _ = config.depths
    added: dict[str, Any] = {} if config.vector_dim is None else {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": config.vector_dim}
    net: Any = ControlNetModel(
        block_out_channels=tuple(channels), layers_per_block=config.num_res_blocks,
        cross_attention_dim=config.context_dim, attention_head_dim=[config.heads(ch) for ch in channels],
        use_linear_projection=config.linear_proj, conditioning_embedding_out_channels=(8, 8, 16, 24),
        down_block_types=tuple("CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in down),
        transformer_layers_per_block=[*(d[0] or 1 for d in down[:-1]), config.middle_depth], **added, **more)
    return randomised(net, seed, 0.1).eval()


def told(config: UNetConfig, rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What SDXL sees beside tokens: ours, and diffusers'."""
    if config.vector_dim is None:
        return {}, {}
    vector, sizes = torch.randn(rows, 16), torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(rows, 1)
    return {"vector": vector, "sizes": sizes}, {"added_cond_kwargs": {"text_embeds": vector, "time_ids": sizes}}


def batch(config: UNetConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return (torch.randn(2, 4, 8, 8), torch.tensor([700.0, 3.0]), torch.randn(2, 5, config.context_dim),
            torch.rand(2, 3, 64, 64))


def control(net: ControlNet, pictures: Tensor, strength: float = 1.0, **how: Any) -> Control:
    hints = tuple(Hint(row) for row in pictures.split(1))
    return Control(rows=tuple(range(len(hints))), network=net, hints=hints, strengths=(strength,) * len(hints), **how)


def in_ldm(net: Any) -> dict[str, Tensor]:
    weights = net.state_dict()
    return {"control_model." + ours: weights[name].clone() for name, ours in to_ldm(list(weights)).items()}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_diffusers_in_every_file(kind: str, tmp_path: Path) -> None:
    """A folder, a single file in diffusers' names, one in LDM's with and without the prefix: the same network, whose
    effect on the UNet is that of diffusers' two together, plain and in its guess mode."""
    config = KINDS[kind]
    theirs = their_controlnet(config)
    theirs.save_pretrained(tmp_path / "folder")
    save_file({name: x.clone() for name, x in theirs.state_dict().items()}, tmp_path / "theirs.safetensors")
    ldm = in_ldm(theirs)
    save_file(ldm, tmp_path / "ldm.safetensors")
    torch.save({"state_dict": {name.removeprefix("control_model."): x for name, x in ldm.items()}},
               tmp_path / "bare.pth")
    nets = {"folder": ControlNet.load(tmp_path / "folder")}
    if kind != "sd1":  # its two heads are nowhere in the shapes
        nets |= {name: ControlNet.load(tmp_path / name) for name in
                 ("theirs.safetensors", "ldm.safetensors", "bare.pth")}
    nets["folder"].save(tmp_path / "ours.safetensors")
    nets["ours"] = ControlNet.load(tmp_path / "ours.safetensors")
    first = nets["folder"].state_dict()
    for name, net in nets.items():
        assert net.config == nets["folder"].config, name
        assert all(torch.equal(x, first[key]) for key, x in net.state_dict().items())
    unet = randomised(UNet(config), 5, 0.1)
    twin = as_diffusers(unet)
    x, t, tokens, pictures = batch(config)
    ours, kwargs = told(config, 2)
    plain = unet(x, t, Context(tokens, **ours))
    for guess in ("", "diffusers"):
        down, mid = theirs(x, t, tokens, pictures, 0.7, guess_mode=bool(guess), return_dict=False, **kwargs)
        want = twin(x, t, tokens, down_block_additional_residuals=down, mid_block_additional_residual=mid, **kwargs)
        how: dict[str, Any] = {"factors": guess}
        got = unet(x, t, Context(tokens, controls=(control(nets["folder"], pictures, 0.7, **how),), **ours))
        assert relative(got, want.sample) < 1e-5
        assert relative(got, plain) > 1e-2


@torch.no_grad()
def test_one_without_transformers_sees_no_text(tmp_path: Path) -> None:
    """The small ones for SDXL."""
    config = KINDS["sdxl"]
    torch.manual_seed(0)
    sized = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256,
             "projection_class_embeddings_input_dim": 16 + 6 * 256}
    theirs: Any = ControlNetModel(
        block_out_channels=(64, 64, 128), layers_per_block=2, down_block_types=("DownBlock2D",) * 3, norm_num_groups=32,
        mid_block_type="UNetMidBlock2D", conditioning_embedding_out_channels=(8, 8, 16, 24), **sized)
    randomised(theirs, 2, 0.1).eval().save_pretrained(tmp_path / "small")
    net, unet = ControlNet.load(tmp_path / "small"), randomised(UNet(config), 5, 0.1)
    x, t, tokens, pictures = batch(config)
    ours, kwargs = told(config, 2)
    down, mid = theirs(x, t, tokens, pictures, 0.7, return_dict=False, **kwargs)
    want = as_diffusers(unet)(x, t, tokens, down_block_additional_residuals=down, mid_block_additional_residual=mid,
                              **kwargs)
    got = unet(x, t, Context(tokens, controls=(control(net, pictures, 0.7),), **ours))
    assert relative(got, want.sample) < 1e-5 and relative(got, unet(x, t, Context(tokens, **ours))) > 1e-2


@torch.no_grad()
def test_several_add_up_and_pooled_ones_are_diffusers(tmp_path: Path) -> None:
    config = KINDS["sd1"]
    both = [their_controlnet(config, 1), their_controlnet(config, 2, global_pool_conditions=True)]
    for i, net in enumerate(both):
        net.save_pretrained(tmp_path / str(i))
    first, second = (ControlNet.load(tmp_path / str(i)) for i in range(2))
    assert (first.pooled, second.pooled) == (False, True)
    save_file(in_ldm(both[0]), tmp_path / "control_v11e_sd15_shuffle.safetensors")
    assert ControlNet.load(tmp_path / "control_v11e_sd15_shuffle.safetensors").pooled
    unet = randomised(UNet(config), 5, 0.1)
    x, t, tokens, pictures = batch(config)
    other = torch.rand(2, 3, 64, 64)
    several: Any = MultiControlNetModel(both)
    down, mid = several(x, t, tokens, [pictures, other], [0.7, 1.3], return_dict=False)
    want = as_diffusers(unet)(x, t, tokens, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    controls = control(first, pictures, 0.7), control(second, other, 1.3, pooled=True)
    assert relative(unet(x, t, Context(tokens, controls=controls)), want.sample) < 1e-5


@torch.no_grad()
def test_ldms_guess_mode_is_its_formula() -> None:
    """0.825 ** (12 - i), which is no number of diffusers'."""
    config = KINDS["sd1"]
    net, unet = randomised(ControlNet(config), 3, 0.1), randomised(UNet(config), 5, 0.1)
    x, t, tokens, pictures = batch(config)
    plain = net(x, t, Context(tokens), net.read(pictures)[0])
    got = control(net, pictures, 0.5, factors="ldm").residuals(x, t, Context(tokens), config)
    last = len(plain.skips)
    assert plain.middle is not None and got.middle is not None
    assert relative(got.middle, 0.5 * plain.middle) < 1e-6
    for i in range(last):
        assert relative(got.skips[i], 0.5 * 0.825 ** (last - i) * plain.skips[i]) < 1e-6
    assert relative(unet(x, t, Context(tokens, controls=(control(net, pictures, 0.5, factors="ldm"),))),
                    unet(x, t, Context(tokens, controls=(control(net, pictures, 0.5),)))) > 1e-3


@torch.no_grad()
def test_files_told_against_a_base(tmp_path: Path) -> None:
    """A "difference" file and a Control-LoRA are the whole network again, given the base; without it they say so."""
    config = KINDS["sd2"]
    base = randomised(UNet(config), 7, 0.1)
    net = ControlNet.of(base)
    randomised(net, 8, 0.1)
    known = base.state_dict()
    difference = {f"control_model.{name}": (x - known[name] if name in known else x).contiguous()
                  for name, x in net.state_dict().items()}
    save_file({**difference, "difference": torch.zeros(())}, tmp_path / "difference.safetensors")
    lora, whole = {"lora_controlnet": torch.zeros(())}, {}
    for name, x in net.state_dict().items():
        if name in known and x.ndim > 1:
            up, down = torch.randn(x.shape[0], 3) * 0.1, torch.randn(3, *x.shape[1:]) * 0.1
            module = name.removesuffix(".weight")
            lora |= {f"{module}.up": up[..., None, None] if x.ndim == 4 else up, f"{module}.down": down}
            whole[name] = known[name] + (up @ down.flatten(1)).view_as(x)
        elif name in known and "norm" in name:
            whole[name] = known[name]  # what is not stored is the base's
        else:
            lora[name] = whole[name] = x
    save_file({name: x.contiguous() for name, x in lora.items()}, tmp_path / "lora.safetensors")
    for name, want in (("difference", net.state_dict()), ("lora", whole)):
        path = tmp_path / f"{name}.safetensors"
        got = ControlNet.load(path, base=base).state_dict()
        assert got.keys() == want.keys()
        assert max(float((got[key] - want[key]).abs().max()) for key in want) < 1e-6
        with pytest.raises(ValueError, match=r"told against a base model: give its UNet, base=sd\.unet"):
            ControlNet.load(path)
        with pytest.raises(ValueError, match="give the base"):
            ControlNet.load(path, base=UNet(KINDS["sd1"]))


def test_what_is_refused(tmp_path: Path) -> None:
    config = KINDS["sd2"]
    net = ControlNet(config, name="edges")
    weights = net.state_dict()
    path = tmp_path / "x.safetensors"
    save_file({**weights, "task_embedding": torch.zeros(6, 320)}, path)
    with pytest.raises(ValueError, match=r"is a union ControlNet .* not read"):
        ControlNet.load(path)
    save_file({name: x for name, x in weights.items() if name != "zero_convs.1.0.bias"}, path)
    with pytest.raises(ValueError, match=r"missing: zero_convs\.1\.0\.bias"):
        ControlNet.load(path)
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="is not a ControlNet, it looks like a LoRA"):
        ControlNet.load(path)
    (tmp_path / "folder").mkdir()
    save_file(weights, tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"controlnet_conditioning_channel_order": "bgr"}))
    with pytest.raises(ValueError, match="in the order 'bgr': only rgb"):
        ControlNet.load(tmp_path / "folder")
    unet = UNet(UNetConfig(model_channels=64, channel_mult=(1, 2), num_res_blocks=1, depth=(1, 1), context_dim=32,
                           num_heads=4))
    context = Context(torch.zeros(1, 3, 32), controls=(control(net, torch.zeros(1, 3, 64, 64)),))
    with pytest.raises(ValueError, match=r"the ControlNet edges is one for another .* \(context_dim 24 against 32\)"):
        unet(torch.zeros(1, 4, 8, 8), torch.ones(1), context)


def test_a_copy_of_the_way_down_starts_as_nothing_and_learns() -> None:
    """`ControlNet.of(unet)` adds zero, bitwise; gradients reach it and not the UNet, whatever was read before."""
    config = KINDS["sd1"]
    unet = randomised(UNet(config), 5, 0.1)
    net = ControlNet.of(unet)
    x, t, tokens, pictures = batch(config)
    seen = Context(tokens, controls=(control(net, pictures),))
    with torch.no_grad():
        plain = unet(x, t, Context(tokens))
        assert torch.equal(unet(x, t, seen), plain)
        assert torch.equal(net.state_dict()["middle_block.0.in_layers.2.weight"],
                           unet.state_dict()["middle_block.0.in_layers.2.weight"])
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    losses = []
    for _ in range(4):
        loss = unet(x, t, seen).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in unet.parameters())
    grads = [p.grad for p in net.input_hint_block.parameters()]
    assert all(grad is not None for grad in grads)
    with torch.no_grad():  # what was read of the picture is read anew once the weights are others
        before = unet(x, t, seen)
        list(net.input_hint_block.parameters())[-1].add_(1.0)
        assert relative(unet(x, t, seen), before) > 1e-4
