"""PAG, SEG, SLG and SAG: closed forms, separate calls of the network, and what they do to the miniature's pictures."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor

import studio
from benchmarks.miniature.scenes import render, to_tensor
from ella_kd.denoiser import LDMDenoiser
from ella_kd.guidance import CFG, COND, UNCOND, Answers, Branch, Guidance, GuidedDenoiser
from ella_kd.guidance.perturbed import PAG, SAG, SEG, SLG, Perturbed, attended_pixels
from ella_kd.models.patches import BlurredQueries, IdentityAttention, Patch, Recorder, SkipAttention, SkipBlock
from tiny import WIDTH, PointwiseUNet, answer, features, noise, relative, row, sharp_unet

MIDDLE = ("middle_block.1",)
PLACES = ("input_blocks.3.1", "middle_block.1")
RULES: dict[str, tuple[Callable[..., Guidance], Patch]] = {
    "PAG": (PAG, IdentityAttention(MIDDLE)),
    "PAG elsewhere": (lambda base, scale=3.0: PAG(base, scale, list(PLACES)), IdentityAttention(PLACES)),
    "SEG": (SEG, BlurredQueries(MIDDLE)),
    "SEG of 1 px": (lambda base, scale=3.0: SEG(base, scale, 1.0, "input_blocks.1.1"),
                    BlurredQueries(("input_blocks.1.1",), 1.0)),
    "SLG": (SLG, SkipBlock(MIDDLE)),
    "a patch": (lambda base, scale=3.0: Perturbed(base, SkipAttention(PLACES), scale), SkipAttention(PLACES)),
}
X, SIGMA = noise(2, 4, 12, 9, dtype=torch.float64) * 3, torch.tensor([5.0, 0.7], dtype=torch.float64)
CONDITIONS = {"cond": features(7, 3, width=WIDTH), "uncond": features(1, seed=9, width=WIDTH)}


def answers(**denoised: Tensor) -> Answers:
    """Given answers, by name; `patched` is the one to any patch."""
    class Given(dict[Branch, Tensor]):
        def __missing__(self, branch: Branch) -> Tensor:
            return denoised["patched" if branch.patch else branch.cond]

    x = noise(2, 4, 12, 9, seed=1, dtype=torch.float64)
    return Answers(x, SIGMA[:, None, None, None], Given(), lambda x, branch: x, {})


def three(seed: int = 5) -> dict[str, Tensor]:
    return {name: noise(2, 4, 12, 9, seed=seed + i, dtype=torch.float64)
            for i, name in enumerate(("cond", "uncond", "patched"))}


@given(st.sampled_from(list(RULES)), st.floats(-5, 15), st.floats(-5, 15))
def test_the_closed_form(name: str, scale: float, cfg: float) -> None:
    make, patch = RULES[name]
    given = three()
    c, u, p = given.values()
    rule = make(CFG(cfg), scale)
    want = u + cfg * (c - u) + scale * (c - p)
    assert torch.allclose(rule(answers(**given)), want, rtol=1e-12, atol=1e-12)
    if scale and cfg != 1:
        assert set(rule.branches) == {COND, UNCOND, Branch("cond", patch)}


@pytest.mark.parametrize("name", RULES)
def test_a_scale_per_sample(name: str) -> None:
    make, _ = RULES[name]
    given = three()
    c, _, p = given.values()
    got = make(CFG(1.0), (2.0, 0.0))(answers(**given))
    assert torch.allclose(got[0], c[0] + 2 * (c[0] - p[0]), rtol=1e-13)
    assert torch.equal(got[1], c[1])


@pytest.mark.parametrize("name", [*RULES, "SAG"])
def test_scale_0_is_the_base_and_asks_for_nothing(name: str) -> None:
    make = RULES[name][0] if name in RULES else SAG
    for scale in (0, 0.0, (0.0, 0.0), lambda sigma: 3.0 if sigma > 9 else 0.0):
        rule = make(CFG(7.0), scale).at((5.0, 0.7))
        assert rule.branches == CFG(7.0).branches
        assert not rule.watched
        given = answers(**three())
        assert torch.equal(rule(given), CFG(7.0)(given))
    rule = make(CFG(7.0), lambda sigma: 3.0 if sigma > 1 else 0.0).at((5.0, 0.7))
    assert rule.scale == (3.0, 0.0)  # type: ignore[attr-defined]
    rows: list[int] = []
    denoiser = GuidedDenoiser(LDMDenoiser(sharp_unet()), make(CFG(1.0), 0.0))
    denoiser.inner_model.inner_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    plain = denoiser.inner_model(X, SIGMA, CONDITIONS["cond"])
    assert torch.equal(denoiser(X, SIGMA, **CONDITIONS), plain)
    assert rows == [2, 2]


@pytest.mark.parametrize("base", [CFG(1.0), CFG(4.0)], ids=["alone", "cfg"])
@pytest.mark.parametrize("name", RULES)
def test_one_call_equals_separate_calls(name: str, base: CFG) -> None:
    make, patch = RULES[name]
    inner = LDMDenoiser(sharp_unet())
    rows: list[int] = []
    hook = inner.inner_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    got = GuidedDenoiser(inner, make(base, 3.0))(X, SIGMA, **CONDITIONS)
    assert rows == [4 if base.scale == 1 else 6]
    hook.remove()
    c, u = (inner(X, SIGMA, CONDITIONS[name]) for name in ("cond", "uncond"))
    p = answer(inner, X, SIGMA, CONDITIONS["cond"], patch)
    assert relative(got, u + base.scale * (c - u) + 3.0 * (c - p)) < 1e-12
    assert relative(got, base(Answers(X, SIGMA, {COND: c, UNCOND: u}, lambda x, b: x, {}))) > 1e-5


@pytest.mark.parametrize("name", [*RULES, "SAG"])
def test_a_batch_equals_single_runs(name: str) -> None:
    make = RULES[name][0] if name in RULES else SAG
    for together in (True, False):
        denoiser = GuidedDenoiser(LDMDenoiser(sharp_unet()), make(CFG(4.0)), together)
        batch = denoiser(X, SIGMA, **CONDITIONS)
        for i in range(2):
            one = denoiser(X[i:i + 1], SIGMA[i:i + 1], cond=row(CONDITIONS["cond"], i), uncond=CONDITIONS["uncond"])
            assert relative(batch[i:i + 1], one) < 1e-12


# SAG


def naive_mask(received: np.ndarray, size: tuple[int, int], threshold: float) -> np.ndarray:
    """One sample's, with loops: received [h', w']; the pixel of the map that covers each of the latents'."""
    grid = received.shape
    mask = np.zeros(size, bool)
    for y in range(size[0]):
        for x in range(size[1]):
            at = y * grid[0] // size[0], x * grid[1] // size[1]
            mask[y, x] = received[at] > threshold
    return mask


@settings(max_examples=30)
@given(st.integers(1, 17), st.integers(1, 17), st.integers(0, 3), st.floats(0.2, 1.8))
def test_the_mask_of_sag(h: int, w: int, halvings: int, threshold: float) -> None:
    grid = h, w
    for _ in range(halvings):
        grid = math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)
    received = 2 * torch.rand(2, 1, *grid, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = attended_pixels(received, torch.zeros(2, 4, h, w), threshold)
    assert got.shape == (2, 1, h, w)
    for i in range(2):
        assert (got[i, 0].numpy() == naive_mask(received[i, 0].numpy(), (h, w), threshold)).all()


def test_what_receives_the_average_is_not_attended() -> None:
    assert not attended_pixels(torch.ones(1, 1, 2, 2), torch.zeros(1, 4, 2, 2), 1.0).any()


@pytest.mark.parametrize(("cfg", "examined"), [(1.0, "cond"), (4.0, "uncond")])
def test_sag_equals_separate_calls_in_eps(cfg: float, examined: str) -> None:
    inner = LDMDenoiser(sharp_unet())
    rule = SAG(CFG(cfg), 0.75, sigma=1.5)
    rows: list[int] = []
    hook = inner.inner_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    got = GuidedDenoiser(inner, rule)(X, SIGMA, **CONDITIONS)
    assert rows == [2 if cfg == 1 else 4, 2]
    hook.remove()

    def eps(x: Tensor, name: str) -> Tensor:
        return (x - inner(x, SIGMA, CONDITIONS[name])) / s

    s, recorder = SIGMA[:, None, None, None], Recorder(MIDDLE[0])
    denoised = answer(inner, X, SIGMA, CONDITIONS[examined], recorder)
    degraded = denoised.clone().numpy()
    for i in range(2):
        mask = naive_mask(recorder.received[i, 0].numpy(), (12, 9), 1.0)
        assert 0.1 < mask.mean() < 0.9
        blurred = gaussian_filter(denoised[i].numpy(), 1.5, axes=(1, 2), mode="reflect", truncate=6)
        degraded[i] = np.where(mask, blurred, degraded[i])
    noise_of_x = eps(X, examined)
    again = torch.from_numpy(degraded) + s * noise_of_x
    guided = eps(X, "uncond") + cfg * (eps(X, "cond") - eps(X, "uncond"))
    guided = guided + 0.75 * (noise_of_x - eps(again, examined))  # the paper's equation
    assert relative(got, X - s * guided) < 1e-6  # scipy's Gaussian is cut elsewhere
    assert relative(got, GuidedDenoiser(inner, CFG(cfg))(X, SIGMA, **CONDITIONS)) > 1e-3


def test_sag_is_linear_in_scale_and_nothing_without_a_blur() -> None:
    inner = LDMDenoiser(sharp_unet())

    def guided(scale: float = 1.0, sigma: float = 2.0, threshold: float = 1.0) -> Tensor:
        return GuidedDenoiser(inner, SAG(CFG(4.0), scale, sigma, threshold))(X, SIGMA, **CONDITIONS)

    base = guided(scale=0)
    assert relative(guided(scale=2.5) - base, 2.5 * (guided() - base)) < 1e-12
    assert relative(guided(scale=-1) - base, base - guided()) < 1e-12
    for nothing in (guided(sigma=0.0), guided(threshold=1e9)):
        assert relative(nothing, base) < 1e-14
    everywhere = guided(threshold=0.0)
    assert relative(everywhere, guided()) > 1e-4
    per_sample = GuidedDenoiser(inner, SAG(CFG(4.0), (0.0, 2.5), sigma=2.0))(X, SIGMA, **CONDITIONS)
    assert relative(per_sample, torch.stack([base[0], guided(scale=2.5)[1]])) < 1e-14


def test_rules_nest_in_one_call() -> None:
    inner = LDMDenoiser(sharp_unet())
    rows: list[int] = []
    inner.inner_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    rule = SAG(PAG(SLG(CFG(4.0), 2.0), 3.0))
    got = GuidedDenoiser(inner, rule)(X, SIGMA, **CONDITIONS)
    assert rows == [8, 2]
    steps = [GuidedDenoiser(inner, r)(X, SIGMA, **CONDITIONS)
             for r in (CFG(4.0), SLG(CFG(4.0), 2.0), PAG(CFG(4.0), 3.0), SAG(CFG(4.0)))]
    assert relative(got, sum(steps[1:]) - 2 * steps[0]) < 1e-12


@pytest.mark.parametrize(("make", "says"), [
    (lambda: PAG(CFG(1.0), math.nan), "PAG's scale must be finite, got nan"),
    (lambda: PAG(CFG(1.0), 3.0, ()), r"PAG needs the transformer blocks to change.*unet\.places"),
    (lambda: SEG(CFG(1.0), 3.0, -1.0), "sigma >= 0.* got -1.0"),
    (lambda: SAG(CFG(1.0), 0.75, -1.0), "SAG's blur needs sigma >= 0.* got -1.0"),
    (lambda: SAG(CFG(1.0), 0.75, math.nan), "SAG's blur needs sigma >= 0.* got nan"),
    (lambda: SAG(SAG(CFG(1.0)), place="input_blocks.1.1").watched, "watch cond at middle_block.1 and at input_blocks"),
    (lambda: attended_pixels(torch.zeros(4, 1, 2, 2), torch.zeros(2, 4, 8, 8), 1.0), "4 rows .* batch of 2"),
])
def test_a_wrong_rule_is_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_a_wrong_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no transformer block 'mid': choose from input_blocks\.1\.1, "):
        GuidedDenoiser(LDMDenoiser(sharp_unet()), PAG(CFG(1.0), 3.0, "mid"))(X, SIGMA, **CONDITIONS)
    for rule in (PAG(CFG(1.0)), SAG(CFG(1.0))):
        with pytest.raises(ValueError, match=r"PointwiseUNet has no patch point: use ella_kd's own UNet"):
            GuidedDenoiser(LDMDenoiser(PointwiseUNet()), rule)(X, SIGMA, **CONDITIONS)
    with pytest.raises(TypeError, match="PAG wraps a guidance rule"):
        PAG(3.0)  # type: ignore[arg-type]


# The miniature has attention among nine pixels only, one for each place: what PAG and SEG change there changes nothing
# (errors within 2 %). A skipped block does: SLG is shown on the model with every weight a tenth smaller, as
# autoguidance is, because the model itself leaves nothing to mend.

LAST = ("output_blocks.1.1",)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_pictures_of_a_weakened_model_come_nearer_to_the_true_ones(scale: float) -> None:
    """Score 60 without, 79 and 89 with."""
    inner = studio.weakened(0.9)
    plain, got = (studio.look(rule, "euler", 10, 16, 3, inner) for rule in (CFG(1.0), SLG(CFG(1.0), scale, LAST)))
    assert got.better(plain) > 2
    assert got.score >= plain.score + 8


def test_sag_keeps_cfg_nearer_to_the_spread_of_the_true_pictures() -> None:
    """Which is 0.90, and the score stays."""
    plain, got = (studio.look(rule, "euler", 10, 16, 3) for rule in (CFG(7.0), SAG(CFG(7.0))))
    print(plain.spread, got.spread, plain.score, got.score)
    assert 0.9 < got.spread < plain.spread - 0.005
    assert got.score >= plain.score - 2


@torch.no_grad()
def test_the_weakened_network_is_worse() -> None:
    """Its answer at noise 0.5 is farther from the true latents than the plain one, which makes it one to go away from.
    """
    (wanted, cond, _), inner = studio.prompts(100, 3), studio.denoiser()
    true = studio.miniature().vae.encode(to_tensor([render(scene) for scene in wanted]))
    x = true + 0.5 * noise(*true.shape)
    rules = CFG(1.0), SLG(CFG(1.0), 1.0, LAST)
    plain, guided = (GuidedDenoiser(inner, rule)(x, torch.full((100,), 0.5), cond=cond) for rule in rules)
    skipped = 2 * plain - guided
    worse = ((skipped - true) ** 2 - (plain - true) ** 2).mean((1, 2, 3))
    assert float(worse.mean() / worse.std()) * 10 > 2.5  # standard errors
