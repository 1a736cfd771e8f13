"""Controls and image prompts in runs: off is off, rows and sigmas that want none cost none, planned = unplanned, batch
= singles; with every combination; and what is refused at the door."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ella_kd import ELLA, And, Box, CFGDenoiser, Concat, ELLADenoiser, Regions, Stack, Switch
from ella_kd.conditioning import Channels, Conditioning, Constant, Lerp, With, window
from ella_kd.models import TextFeatures, UNet
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.addons.ip_adapter import IPAdapter, Projection
from ella_kd.models.addons.t2i import T2IAdapter
from ella_kd.models.controls import Hint
from ella_kd.samplers import sample_euler
from tiny import WIDTH, features, planned, randomised, relative, tiny_tsc, tiny_unet

UNET, TSC = tiny_unet(), tiny_tsc()
NET, OTHER = (randomised(ControlNet.of(UNET, name), seed, 0.1) for seed, name in ((3, "edges"), (4, "depth")))
ADAPTER = randomised(T2IAdapter(3, (32, 64), name="sketch"), 5, 0.1)
DENOISER = ELLADenoiser(UNET, TSC)


class Eye(torch.nn.Module):
    """An image encoder of one number for each third of a picture."""

    def forward(self, pictures: Any, whole: bool) -> Tensor:
        return torch.cat([torch.as_tensor(picture).float().view(1, 3, -1).mean(2) for picture in pictures])


def image_adapter(unet: UNet) -> IPAdapter:
    widths = [block.attn2.to_k.weight.shape[0] for block in unet.cross_attentions]
    adapter = randomised(IPAdapter(Projection(3, WIDTH, 2), WIDTH, widths, "ip"), 6, 0.5)
    adapter.encoder = Eye()  # type: ignore[assignment]
    return adapter


IP = image_adapter(UNET)
PICTURE, SECOND = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).split(1)


def prompt(n: int = 1, seed: int = 2) -> Conditioning:
    return ELLA(TSC, features(*range(3, 3 + n), seed=seed))


def plain(cond: Conditioning) -> Conditioning:
    return cond


def controlled(cond: Conditioning) -> Conditioning:
    return cond.with_control(NET, PICTURE, 0.7)


def several(cond: Conditioning) -> Conditioning:
    """Everything at once: two ControlNets, one of them twice, an adapter, pictures as prompts."""
    clip = Constant(TextFeatures(noise(1, 4, WIDTH)))
    return (cond.with_control(NET, PICTURE, 0.7, window=(6, 0.5)).with_control(OTHER, SECOND, lambda s: 0.1 * s)
            .with_control(NET, SECOND, 0.5, guess="ldm", tokens=clip).with_control(ADAPTER, PICTURE, 0.4)
            .with_image(IP, [PICTURE, SECOND], 0.6).with_image(IP, PICTURE, lambda s: 0.4 * (s > 1)))


def shuffled(cond: Conditioning) -> Conditioning:
    return cond.with_control(NET, SECOND, 1.2, pooled=True)


def pictured(cond: Conditioning) -> Conditioning:
    return cond.with_image(IP, PICTURE, 0.8, window=(6, 0.5))


WAYS = [controlled, several, shuffled, pictured]


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spy(monkeypatch: pytest.MonkeyPatch, network: Any, name: str, note: Callable[..., None]) -> None:
    """`note` of the arguments of every call."""
    called = getattr(network, name)

    def noted(*args: Any) -> Any:
        note(*args)
        return called(*args)

    monkeypatch.setattr(network, name, noted)


def answer(cond: Conditioning, x: Tensor, sigma: Tensor, uncond: Conditioning | None = None) -> Tensor:
    return CFGDenoiser(DENOISER)(x, sigma, cond=cond, uncond=uncond or prompt(seed=9), cond_scale=3.0)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_planned_is_unplanned_and_a_batch_its_singles(way: Callable[[Conditioning], Conditioning]) -> None:
    x, sigma = 5 * noise(3, 4, 8, 8), torch.tensor([9.0, 2.0, 0.3])
    for uncond in (prompt(seed=9), way(prompt(seed=9))):
        args: dict[str, Any] = {"cond": way(prompt(3)), "uncond": uncond, "cond_scale": 3.0}
        together = CFGDenoiser(DENOISER)(x, sigma, **args)
        assert relative(planned(CFGDenoiser(DENOISER), x, sigma, **args).denoised, together) < 1e-5
        for i in range(3):
            single = way(ELLA(TSC, features(3, 4, 5), torch.tensor([i])))
            alone = answer(single, x[i:i + 1], sigma[i:i + 1], uncond)
            assert relative(alone, together[i:i + 1]) < 1e-5
    assert relative(together, answer(prompt(3), x, sigma)) > 1e-3


@torch.no_grad()
def test_off_is_off_bitwise() -> None:
    """Strength 0, as a number, per row or by sigma, and a closed window; the network is not asked."""
    x, sigma = 5 * noise(2, 4, 8, 8), torch.tensor([5.0, 2.0])
    want = answer(prompt(2), x, sigma)

    def never(*args: Any) -> Any:
        raise AssertionError("the control's network was asked")

    net = ControlNet.of(UNET)
    net.forward = never  # type: ignore[assignment, method-assign]
    base = prompt(2)
    for off in (base.with_control(net, PICTURE, 0), base.with_control(net, PICTURE, lambda s: 0.0),
                base.with_control(net, PICTURE, (0.0, 0.0)), base.with_control(net, PICTURE, window=(9, 6)),
                base.with_image(IP, PICTURE, 0), base.with_image(IP, PICTURE, window=(1.5, 0)),
                base.with_control(net, PICTURE, window=(1.5, 1))):
        assert torch.equal(answer(off, x, sigma), want)
        assert torch.equal(planned(CFGDenoiser(DENOISER), x, sigma, cond=off, uncond=prompt(seed=9),
                                   cond_scale=3.0).denoised[0], want[0])
    half = answer(base.with_control(NET, PICTURE, (0.0, 0.8)).with_image(IP, PICTURE, (0.0, 0.5)), x, sigma)
    assert relative(half[:1], want[:1]) < 1e-6 and relative(half[1:], want[1:]) > 1e-3


@torch.no_grad()
def test_the_network_runs_for_rows_and_sigmas_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for all rows of a step, none above and below the window, one reading of the picture in a run."""
    rows: list[tuple[float, int]] = []
    read: list[int] = []
    calls: list[int] = []
    for network, name, note in ((NET, "forward", lambda x, t, *_: rows.append((float(t[0]), len(x)))),
                                (NET, "read", lambda pictures: read.append(len(pictures))),
                                (UNET, "forward", lambda x, *_: calls.append(len(x)))):
        spy(monkeypatch, network, name, note)
    sigmas = torch.tensor([10.0, 6.0, 3.0, 1.0, 0.4, 0])
    pictures = torch.cat([PICTURE, SECOND])
    args = {"cond": prompt(2).with_control(NET, pictures, 0.7, window=(6, 0.4)), "uncond": prompt(seed=9),
            "cond_scale": 3.0}
    sample_euler(CFGDenoiser(DENOISER), noise(2, 4, 8, 8), sigmas, extra_args=args, disable=True)
    assert calls == [4] * 5 and [n for _, n in rows] == [2, 2, 2] and read == [2]
    rows.clear()
    args["uncond"] = prompt(seed=9).with_control(NET, pictures, 0.7)
    sample_euler(CFGDenoiser(DENOISER), noise(2, 4, 8, 8), sigmas, extra_args=args, disable=True)
    assert [n for _, n in rows] == [2, 4, 4, 4, 2]


@torch.no_grad()
def test_it_sees_ellas_tokens_of_the_step_or_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, Tensor]] = []
    times: list[float] = []
    spy(monkeypatch, UNET, "forward", lambda x, t, *_: times.append(float(t[0])))
    spy(monkeypatch, NET, "forward", lambda x, t, context, *_: seen.append((float(t[0]), context.tokens)))
    cond, sigmas = prompt(), torch.tensor([9.0, 1.0, 0])
    own = prompt(seed=11)
    ways: list[tuple[dict[str, Any], Any]] = [({}, cond), ({"tokens": own}, own),
                                              ({"tokens": Switch(own, cond, at=3.0)}, None)]
    for extra, wanted in ways:
        seen.clear()
        args = {"cond": cond.with_control(NET, PICTURE, **extra)}
        sample_euler(DENOISER, noise(1, 4, 8, 8), sigmas, extra_args=args, disable=True)
        assert len(seen) == 2 and [t for t, _ in seen] == times[-2:]
        for i, (t, tokens) in enumerate(seen):
            expected = (wanted or (own, cond)[i])(torch.tensor([t])).tokens
            assert relative(tokens, expected) < 1e-5
    assert relative(seen[0][1], seen[1][1]) > 1e-3


COMBINATIONS: dict[str, Callable[[Callable[[Conditioning], Conditioning]], Conditioning]] = {
    "and": lambda way: And((way(prompt()), 1.0), (prompt(seed=5), -0.4)),
    "around and": lambda way: way(And((prompt(), 0.6), (prompt(seed=5), 0.4))),
    "regions": lambda way: Regions((way(prompt()), Box(0, 0, 0.5, 1)), (prompt(seed=5), Box(0.5, 0, 1, 1))),
    "switch": lambda way: Switch(way(prompt()), prompt(seed=5), at=3.0),
    "window": lambda way: window(way(prompt()), 6, 1, otherwise=prompt(seed=5)),
    "concat": lambda way: Concat(way(prompt()), prompt(seed=5)),
    "repeat": lambda way: way(prompt()).repeat(2),
    "lerp": lambda way: Lerp(way(prompt()), prompt(seed=5), 0.3),
    "stack": lambda way: Stack(way(prompt()), prompt(seed=5))}


@torch.no_grad()
@pytest.mark.parametrize("way", [controlled, several])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_combination(name: str, way: Callable[[Conditioning], Conditioning]) -> None:
    """Planned = unplanned, and what is steered differs from what is not."""
    x, sigma = 5 * noise(2, 4, 8, 8), torch.tensor([5.0, 2.0])
    cond = COMBINATIONS[name](way)
    got = answer(cond, x, sigma)
    args: dict[str, Any] = {"cond": cond, "uncond": prompt(seed=9), "cond_scale": 3.0}
    assert relative(planned(CFGDenoiser(DENOISER), x, sigma, **args).denoised, got) < 1e-5
    change = (got - answer(COMBINATIONS[name](plain), x, sigma)).flatten(1).norm(dim=1)
    assert change[0] > 1e-3 and (change[1] < 1e-4) == (name in ("switch", "stack"))
    if name == "stack":
        single = answer(way(prompt()), x[:1], sigma[:1])
        assert relative(got[:1], single) < 1e-5
    if name == "around and":
        assert relative(got, answer(And((way(prompt()), 0.6), (way(prompt(seed=5)), 0.4)), x, sigma)) < 1e-6
    if name == "lerp":
        both = Lerp(prompt(), prompt(seed=5), 0.3).with_control(NET, PICTURE, 0.7 * 0.7)
        assert way is several or relative(got, answer(both, x, sigma)) < 1e-5
        half = Lerp(way(prompt()), way(prompt(seed=5)), 0.5)
        assert relative(answer(half, x, sigma), answer(way(Lerp(prompt(), prompt(seed=5), 0.5)), x, sigma)) < 1e-5
    if name == "regions":  # the half that is not steered stays
        assert relative(got[..., 4:], answer(COMBINATIONS[name](plain), x, sigma)[..., 4:]) < 1e-5


@torch.no_grad()
def test_beside_channels() -> None:
    """A UNet that sees channels beside x, and a ControlNet that does not, or that does."""
    config = replace(UNET.config, in_channels=6)
    unet = randomised(UNet(config), 8, 0.1)
    denoiser = CFGDenoiser(ELLADenoiser(unet, TSC))
    x, sigma, channels = 5 * noise(2, 4, 8, 8), torch.tensor([5.0, 2.0]), noise(1, 2, 8, 8)
    whole = randomised(ControlNet.of(unet), 9, 0.1)
    for net in (NET, whole):
        cond = Channels(prompt(), channels).with_control(net, PICTURE)
        args: dict[str, Any] = {"cond": cond, "uncond": Channels(prompt(seed=9), 0 * channels), "cond_scale": 3.0}
        got = denoiser(x, sigma, **args)
        assert relative(planned(denoiser, x, sigma, **args).denoised, got) < 1e-5
        assert relative(got, denoiser(x, sigma, **{**args, "cond": Channels(prompt(), channels)})) > 1e-3
        same = denoiser(x, sigma, **{**args, "cond": With(prompt().with_control(net, PICTURE), channels=channels)})
        assert torch.equal(same, got)


@torch.no_grad()
def test_a_part_of_the_picture() -> None:
    """`Context.crop` cuts hints by 8 pixels a latent, of the canvas that they are stretched to; parts of parts too."""
    context = controlled(prompt())(torch.ones(1))
    tile = context.crop((2, 4, 6, 8), (16, 24)).crop((1, 0, 4, 4), (6, 8))
    [hint] = tile.controls[0].hints
    small = torch.rand(1, 3, 16, 24)
    exact = Hint(torch.nn.functional.interpolate(small, scale_factor=8)).crop((2, 4, 6, 8), (16, 24))
    assert torch.equal(exact.drawn((6, 8), small)[..., ::8, ::8], small[..., 2:8, 4:12])
    assert hint.part == ((16, 24), (3, 4, 4, 4)) and hint.drawn((4, 4), small).shape == (1, 3, 32, 32)
    assert context.controls[0].hints[0].crop((0, 0, 4, 4), (8, 8)) is context.controls[0].hints[0].crop(
        (0, 0, 4, 4), (8, 8)), "so that it is read once"
    with pytest.raises(ValueError, match="a hint was cut for latents of"):
        hint.drawn((8, 8), small)


def test_pictures_of_every_kind_are_the_same() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(levels)
    floats = torch.from_numpy(levels).permute(2, 0, 1) / 255
    x, sigma = noise(1, 4, 8, 8), torch.ones(1)
    with torch.no_grad():
        want = answer(prompt().with_control(NET, image), x, sigma)
        for same in (levels, levels.transpose(2, 0, 1), floats, floats[None], [image]):
            assert torch.equal(answer(prompt().with_control(NET, same), x, sigma), want)


def test_what_the_door_refuses() -> None:
    cond, x, sigma = prompt(), noise(2, 4, 8, 8), torch.ones(2)
    with pytest.raises(TypeError, match=r"a control is a ControlNet or a T2IAdapter, ControlNet\.load\(file\)"):
        cond.with_control("canny.safetensors", PICTURE)
    with pytest.raises(ValueError, match="guess must be one of"):
        cond.with_control(NET, PICTURE, guess="yes")
    with pytest.raises(ValueError, match="a T2IAdapter has no guess mode"):
        cond.with_control(ADAPTER, PICTURE, guess="ldm")
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got -1 to 1: .* \(x \+ 1\) / 2"):
        cond.with_control(NET, 2 * (PICTURE > 0.5).float() - 1)
    with pytest.raises(ValueError, match="'openpose' is not done here: the package controlnet_aux does it"):
        cond.with_control(NET, PICTURE, preprocess="openpose")
    with pytest.raises(FileNotFoundError, match=r"no picture at edges\.png"):
        cond.with_control(NET, "edges.png")
    with pytest.raises(ValueError, match="one for all rows or one per row, got 2 pictures, 3 strengths"):
        cond.with_control(NET, [PICTURE, SECOND], (1, 2, 3))
    with pytest.raises(ValueError, match="has 3 rows and the batch 2"):
        answer(cond.with_control(NET, [PICTURE] * 3), x, sigma)
    with pytest.raises(ValueError, match="a window needs 0 <= sigma_lo < sigma_hi"):
        cond.with_control(NET, PICTURE, window=(1, 2))
    with pytest.raises(TypeError, match="an image prompt takes an IPAdapter"):
        cond.with_image(NET, PICTURE)
    with pytest.raises(ValueError, match="takes a picture or several, or None"):
        cond.with_image(IP, [])
    meta = ControlNet.of(UNET, "far").to("meta")
    with pytest.raises(ValueError, match=r"the control far is on meta and the latents on cpu: move it"):
        answer(cond.with_control(meta, PICTURE), x, sigma)
    half = ControlNet.of(UNET).to(torch.bfloat16)
    with torch.no_grad():
        assert answer(cond.with_control(half, PICTURE), x, sigma).dtype == torch.float32
    from ella_kd.models.network import OfTokens
    foreign = OfTokens(lambda x, t, tokens: x)
    with pytest.raises(ValueError, match="does not see a ControlNet or T2I-Adapter"):
        foreign(x[:1], sigma[:1], controlled(cond)(sigma[:1]))
