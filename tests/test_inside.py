"""What changes inside a UNet by sigma: the seam itself, FreeU against diffusers and its authors' code, ToMe against its
own package."""

from dataclasses import dataclass
from typing import Any

import pytest
import tomesd
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.speed.ways import as_diffusers
from ella_kd import CFG, PAG, CFGDenoiser, GuidedDenoiser, LDMDenoiser
from ella_kd.bound import Branch
from ella_kd.models import UNet, UNetConfig, fast_on_cpu, inside
from ella_kd.models.freeu import FreeU, lowest_frequencies
from ella_kd.models.inside import Change, Inside, finest
from ella_kd.models.patches import IdentityAttention, Several, SkipBlock
from ella_kd.models.tome import ToMe, merging, split
from ella_kd.samplers import sample_dpmpp_2m
from tiny import WIDTH, noise, randomised, relative, sharp_unet, tiny_unet

SD15 = UNetConfig(4, 4, 32, (1, 2, 4, 4), 2, (1, 1, 1, 0), WIDTH, 2)
SDXL = UNetConfig(4, 4, 32, (1, 2, 4), 2, (0, 2, 2), WIDTH, 2, linear_proj=True, middle_depth=2)
HERE = 3.0  # a sigma


def inputs(unet: UNet, batch: int = 2, h: int = 12, w: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    t = 999 * torch.rand(batch, generator=torch.Generator().manual_seed(0))
    return noise(batch, 4, h, w, dtype=unet.dtype), t, noise(batch, 7, WIDTH, seed=4, dtype=unet.dtype)


def random_unet(config: UNetConfig) -> UNet:
    return randomised(UNet(config), 0, 0.1).double()


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
@pytest.mark.parametrize(("h", "w"), [(16, 16), (20, 13)])
def test_freeu_by_level_equals_diffusers(config: UNetConfig, h: int, w: int) -> None:
    unet = random_unet(config)
    twin = as_diffusers(unet)
    twin.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    args = inputs(unet, h=h, w=w)
    got = Inside(unet, FreeU(1.5, 1.6, 0.9, 0.2, adaptive=False, by="level")).at((HERE,))(*args)
    assert relative(got, twin(*args).sample) < 1e-6  # diffusers' Fourier transform is in fp32
    assert relative(got, unet(*args)) > 1e-3


def authors(unet: UNet, x: Tensor, skip: Tensor, adaptive: bool) -> tuple[Tensor, Tensor]:
    """What the authors' code does before features are joined, written down again."""
    for width, b, s in ((4, 1.3, 0.9), (2, 1.4, 0.2)):
        if x.shape[1] == width * unet.config.model_channels:
            mean = x.mean(1, keepdim=True)
            lowest, highest = mean.amin((1, 2, 3), keepdim=True), mean.amax((1, 2, 3), keepdim=True)
            factor = (b - 1) * (mean - lowest) / (highest - lowest) + 1 if adaptive else b
            x = x.clone()
            x[:, :x.shape[1] // 2] *= factor
            frequencies = torch.fft.fftshift(torch.fft.fftn(skip, dim=(2, 3)), dim=(2, 3))
            row, column = (n // 2 for n in skip.shape[2:])
            frequencies[..., row - 1:row + 1, column - 1:column + 1] *= s
            return x, torch.fft.ifftn(torch.fft.ifftshift(frequencies, dim=(2, 3)), dim=(2, 3)).real
    return x, skip


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_freeu_by_channels_equals_the_authors_code(config: UNetConfig, adaptive: bool) -> None:
    unet = random_unet(config)

    @dataclass(frozen=True)
    class Theirs(Change):
        def joined(self, n: int, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
            return authors(unet, x, skip, adaptive)

    args = inputs(unet, h=16, w=24)
    got, want, level = (Inside(unet, change).at((HERE,))(*args) for change in (
        FreeU(1.3, 1.4, adaptive=adaptive), Theirs(), FreeU(1.3, 1.4, adaptive=adaptive, by="level")))
    assert relative(got, want) < 1e-12
    assert relative(level, want) > 1e-3, "the two ways to find the places differ"


@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 2), (1, 5), (7, 8), (33, 20)])
def test_the_lowest_frequencies_are_a_fourier_transforms(h: int, w: int) -> None:
    x = noise(2, 3, h, w, dtype=torch.float64)
    kept = torch.zeros(h, w, dtype=torch.float64)
    for u in (0, -1):
        for v in (0, -1):
            kept[u, v] = 1
    want = torch.fft.ifftn(torch.fft.fftn(x, dim=(2, 3)) * kept, dim=(2, 3)).real
    assert relative(lowest_frequencies(x), want) < 1e-12
    assert lowest_frequencies(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 5)])
@pytest.mark.parametrize("seed", [None, 0, 5])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_merging_equals_the_published_package(size: tuple[int, int], seed: int | None, ratio: float,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    h, w = size
    x, y = noise(2, h * w, 16, dtype=torch.float64), noise(2, h * w, 24, seed=7, dtype=torch.float64)
    _, stay = split(size, seed, x.device)
    grid = torch.zeros(h * w).index_fill(0, stay, 1).view(h, w)[:h // 2 * 2, :w // 2 * 2]
    cells = grid.view(h // 2, 2, w // 2, 2).transpose(1, 2).flatten(2)
    assert torch.equal(cells.sum(2), torch.ones(h // 2, w // 2)), "one of each 2 x 2"
    corner = cells.argmax(2, keepdim=True)
    assert bool(corner.any()) == (seed is not None)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: corner)
    fewer = int(h * w * ratio)
    theirs = tomesd.merge.bipartite_soft_matching_random2d(x, w, h, 2, 2, fewer, no_rand=seed is None,
                                                           generator=torch.Generator())
    merge, part = merging(x, size, fewer, seed)
    assert merge(y).shape[1] == h * w - min(fewer, h * w - len(stay))
    attended = [theirs[0](y).flip(2) ** 2, merge(y).flip(2) ** 2]
    assert relative(theirs[1](attended[0]), part(attended[1])) < 1e-13


def test_tome_equals_the_published_package_in_diffusers() -> None:
    unet = random_unet(SD15)
    twin = as_diffusers(unet)
    args = inputs(unet, batch=1, h=16, w=12)  # of an odd batch the package leaves the upper left pixels
    tomesd.apply_patch(twin, ratio=0.5)
    got = Inside(unet, ToMe(0.5, seed=None)).at((HERE,))(*args)
    want = twin(*args).sample
    assert relative(got, want) < 1e-12
    assert relative(got, unet(*args)) > 1e-5
    assert finest(unet) == ("input_blocks.1.1", "input_blocks.2.1", "output_blocks.9.1", "output_blocks.10.1",
                            "output_blocks.11.1")
    assert finest(random_unet(SDXL))[0] == "input_blocks.4.1"


OFF = {"no change": (), "a window below": (FreeU(sigma_hi=1.0), ToMe(sigma_hi=HERE - 1e-3)),
       "a window above": (FreeU(by="level", sigma_lo=HERE),), "factors of 1": (FreeU(1, 1, 1, 1),),
       "a ratio of 0": (ToMe(0.0),)}


@pytest.mark.parametrize("changes", OFF.values(), ids=OFF)
def test_off_is_the_unet_itself(changes: tuple[Change, ...]) -> None:
    unet = tiny_unet()
    assert Inside(unet, *changes).at((HERE,)) is unet


def test_a_window_holds_up_to_its_upper_end() -> None:
    change = FreeU(sigma_hi=HERE, sigma_lo=1.0)
    assert [change.on(tiny_unet()).at(sigma) is not None for sigma in (3.001, HERE, 1.001, 1.0, 0.5)] == [
        False, True, True, False, False]


ARGS: dict[str, Any] = {"cond": noise(1, 7, WIDTH, seed=4), "uncond": noise(1, 3, WIDTH, seed=5), "cond_scale": 4.0}


def denoised(network: Any, sigma: Tensor, x: Tensor) -> Tensor:
    return CFGDenoiser(LDMDenoiser(network))(x, sigma, **ARGS)


def test_rows_on_both_sides_of_a_threshold_and_batches_equal_singles() -> None:
    network = Inside(tiny_unet(), FreeU(by="level", sigma_lo=1.0), ToMe(0.5, sigma_hi=5.0))
    sigma, x = torch.tensor([9.0, 0.3, 2.0, 9.5]), noise(4, 4, 12, 9)
    together = denoised(network, sigma, x)
    for i in range(4):
        assert relative(together[i:i + 1], denoised(network, sigma[i:i + 1], x[i:i + 1])) < 1e-5
    plain = denoised(network.unet, sigma, x)
    assert min(relative(together[i], plain[i]) for i in range(4)) > 1e-5
    first, second = (denoised(Inside(network.unet, change), sigma, x) for change in network.changes)
    assert relative(together[:1], first[:1]) < 1e-5 and relative(together[1:2], second[1:2]) < 1e-5


def test_a_rules_patch_holds_where_a_change_patches_too() -> None:
    unet = sharp_unet()
    own = finest(unet)[:1]
    tome = ToMe(0.5).on(unet)
    rest = finest(unet)[1:]
    args = inputs(unet)
    patches = [(1, IdentityAttention(own)), (1, None)]
    got = Inside(unet, tome).at((HERE,))(*args, patches)
    first = unet(*args, [(2, Several((IdentityAttention(own), *ToMe(0.5, rest).patches)))])
    assert relative(got[:1], first[:1]) < 1e-13
    assert relative(got[1:], unet(*args, [(2, tome.patches[0])])[1:]) < 1e-13
    assert relative(got[:1], unet(*args, [(2, tome.patches[0])])[:1]) > 1e-4
    both = [(2, Several((SkipBlock(own), IdentityAttention(own), IdentityAttention(rest))))]
    assert relative(unet(*args, both), unet(*args, [(2, Several((SkipBlock(own), IdentityAttention(rest))))])) == 0


def test_guidance_that_patches_rows_of_its_own_stands_beside() -> None:
    unet = tiny_unet()
    network, x, sigma = Inside(unet, ToMe(0.5), FreeU(by="level")), noise(2, 4, 8, 8), torch.tensor([HERE, HERE])
    rule = PAG(CFG(4.0), 3.0)
    args = {name: ARGS[name] for name in ("cond", "uncond")}
    got = GuidedDenoiser(LDMDenoiser(network), rule)(x, sigma, **args)

    def answer(name: str, *patches: Any) -> Tensor:
        return LDMDenoiser(network).bind(x, cond=args[name])(x, HERE, only=Branch("cond", *patches)).denoised

    c, u, weak = answer("cond"), answer("uncond"), answer("cond", IdentityAttention(("middle_block.1",)))
    assert relative(got, u + 4 * (c - u) + 3 * (c - weak)) < 1e-5
    assert relative(weak, c) > 1e-6


@pytest.mark.slow
def test_fast_compile_and_inside_in_any_order(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(torch._dynamo.reset)
    torch._dynamo.reset()
    counters.clear()
    unet = randomised(UNet(UNetConfig(4, 4, 32, (1,), 1, (1,), WIDTH, 2)), 0, 0.1)
    changes = (FreeU(by="level", sigma_lo=1.0), ToMe(0.5))
    x, sigma = noise(2, 4, 8, 8), torch.tensor([HERE, HERE])
    want = denoised(Inside(unet, *changes), sigma, x)
    plain = denoised(unet, sigma, x)
    for network in (Inside(fast_on_cpu(unet), *changes), fast_on_cpu(Inside(unet, *changes))):
        assert relative(denoised(network, sigma, x), want) < 1e-5
    assert isinstance(fast_on_cpu(Inside(unet, *changes)), Inside)
    denoiser = CFGDenoiser(LDMDenoiser(Inside(unet, *changes)))
    denoiser.compile(backend="eager")
    sigmas = torch.tensor([9.0, HERE, 2.0, 0.9, 0.3, 0.0])
    with torch.no_grad():
        assert relative(denoiser(x, sigma, **ARGS), want) < 1e-5
        sample_dpmpp_2m(denoiser, x * 9, sigmas, extra_args=ARGS, disable=True)
    assert counters["stats"]["unique_graphs"] == 2, "one graph for each set of changes"
    assert not counters["graph_break"]
    assert relative(denoised(unet, sigma, x), plain) < 1e-6


def test_a_twin_shares_every_tensor_and_nests() -> None:
    unet = tiny_unet()
    nested = Inside(Inside(unet, FreeU(by="level")), ToMe(0.3))
    assert nested.unet is unet and len(nested.changes) == 2
    assert {id(x) for x in nested.parameters()} == {id(x) for x in unet.parameters()}
    args = inputs(unet)
    assert torch.equal(nested.at((HERE,))(*args), Inside(unet, FreeU(by="level"), ToMe(0.3)).at((HERE,))(*args))


def test_the_change_in_the_docstring_works() -> None:
    code = (inside.__doc__ or "").partition("frozen dataclass:\n")[2]
    unet = tiny_unet()
    names: dict[str, Any] = {"dataclass": dataclass, "Change": Change, "Inside": Inside, "unet": unet}
    exec("\n".join(line.removeprefix("    ") for line in code.splitlines()), names)
    args = inputs(unet)
    assert relative(names["network"].at((2.0,))(*args), unet(*args)) > 1e-3
    assert torch.equal(names["network"].at((1.0,))(*args), unet(*args))


def test_what_cannot_be() -> None:
    unet = tiny_unet()
    with pytest.raises(ValueError, match="ToMe and ToMe both change"):
        Inside(unet, ToMe(0.5, sigma_lo=1), ToMe(0.3, sigma_hi=2))
    Inside(unet, ToMe(0.5, sigma_lo=1), ToMe(0.3, sigma_hi=1))
    with pytest.raises(ValueError, match="decided by sigma"):
        Inside(unet, FreeU(by="level"))(*inputs(unet))
    with pytest.raises(TypeError, match="UNet, got Linear"):
        Inside(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes changes"):
        Inside(unet, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 or 2 times"):
        Inside(randomised(UNet(UNetConfig(4, 4, 32, (1, 3), 1, (1, 1), WIDTH, 2)), 0), FreeU())
    with pytest.raises(ValueError, match="no transformer nowhere"):
        Inside(unet, ToMe(places=("nowhere",)))
    for wrong in (lambda: ToMe(0.8), lambda: FreeU(-1.0), lambda: FreeU(by="x"), lambda: FreeU(sigma_lo=2, sigma_hi=1)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"got|finds"):
            wrong()
