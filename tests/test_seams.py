"""The seams: how short the way from `generate` to the UNet is, who imports whom, and that models without `bind`, and
networks, conditionings, rules and inputs of a user's own, take part without a change of ours."""

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ella_kd import (
    CFG,
    And,
    CFGDenoiser,
    Concat,
    Constant,
    ELLADenoiser,
    GuidedDenoiser,
    LDMDenoiser,
    Pipeline,
    generate,
)
from ella_kd.conditioning import Levels, Stack, With
from ella_kd.guidance import Guidance
from ella_kd.models import UNet
from ella_kd.models.context import Context, per_row
from ella_kd.samplers import SAMPLERS, bind, get_sigmas_karras, sample_dpm_adaptive, sample_euler
from tiny import WIDTH, PointwiseTSC, PointwiseUNet, features, noise, planned, relative, tiny_tsc, tiny_unet

ROOT = Path(__file__).parent.parent
X = noise(2, 4, 8, 8) * 5
SIGMA = torch.tensor([5.0, 0.3])
ARGS = {"cond": features(4, 2), "uncond": features(1, seed=9), "cond_scale": 3.0}


def ours(file: str) -> str | None:
    """The file's path in this repository, None for anybody else's."""
    path = Path(file)
    parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else ("",)
    return "/".join(parts) if parts[0] in ("ella_kd", "samplers", "models") else None


def test_from_generate_to_the_unet_are_at_most_9_frames_in_7_files(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[list[tuple[str, str]]] = []
    forward = UNet.forward

    def looking(self: UNet, *args: Any) -> Any:
        frames, frame = [("models/unet.py", "forward")], sys._getframe(1)
        while frame is not None:
            file = ours(frame.f_code.co_filename)
            frames += [(file, frame.f_code.co_name)] if file else []
            if frame.f_code.co_name == "generate":
                break
            frame = frame.f_back  # type: ignore[assignment]
        ways.append(frames)
        return forward(self, *args)

    monkeypatch.setattr(UNet, "forward", looking)
    generate(pipeline, "a red circle", steps=2, seeds=1, progress=False)
    assert len(ways) == 2
    for way in ways:
        assert way[-1][1] == "generate"
        assert len(way) <= 9, way
        assert len({file for file, _ in way}) <= 7, way


def test_imports_run_in_one_direction() -> None:
    """No circle among our modules, save through a package's own list; samplers and models know nobody."""
    files = {}
    for folder in ("ella_kd", "samplers", "models"):
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if path.name != "__init__.py":
                files[name if folder == "ella_kd" else f"ella_kd.{name}"] = path
    graph = {name: imports_of(path) & files.keys() for name, path in files.items()}
    for name, others in graph.items():
        own = name.split(".")[1]
        if own in ("samplers", "models"):
            assert {other for other in others if not other.startswith(f"ella_kd.{own}.")} <= {"ella_kd.files"}, name
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports when it is imported itself."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
    return {module for node in nodes for name in node.names
            for module in (str(node.module), f"{node.module}.{name.name}")}


def test_no_file_is_longer_than_350_lines() -> None:
    long = {str(path): n for folder in ("ella_kd", "samplers", "models", "benchmarks")
            for path in (ROOT / folder).rglob("*.py") if (n := len(path.read_text().splitlines())) > 350}
    assert not long


class Foreign:
    """Anybody's model around a denoiser: it has not heard of `bind`."""

    def __init__(self, inner: CFGDenoiser) -> None:
        self.inner = inner

    def __call__(self, x: Tensor, sigma: Tensor, **args: Any) -> Tensor:
        return self.inner(x, sigma, **args)


class ForeignWithPredict(Foreign):
    def predict(self, x: Tensor, sigma: Tensor, need_uncond: bool = False, **args: Any) -> Any:
        return self.inner.predict(x, sigma, need_uncond, **args)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun", "dpmpp_sde", "euler_cfg_pp", "dpmpp_2m_cfg_pp"])
def test_a_model_without_bind_gives_the_same_answer(name: str) -> None:
    inner = CFGDenoiser(ELLADenoiser(PointwiseUNet(), PointwiseTSC()))  # type: ignore[arg-type]
    row, sigmas = SAMPLERS[name], get_sigmas_karras(5, 0.1, 10.0)
    seeds: Any = {"seeds": [1, 2]} if row.stochastic else {}
    args = {**ARGS, "cond_scale": 0.6}
    want = row.function(inner, X, sigmas, extra_args=args, disable=True, **seeds)
    modes: list[Any] = [{}, {"scale": "normalised"}] if row.cfg_pp else [{}]
    for mode in modes:
        want = row.function(inner, X, sigmas, extra_args=args, disable=True, **seeds, **mode)
        models = [ForeignWithPredict(inner)] if row.cfg_pp else [Foreign(inner), ForeignWithPredict(inner)]
        for model in models:
            assert torch.equal(row.function(model, X, sigmas, extra_args=args, disable=True, **seeds, **mode), want)
    if row.cfg_pp:
        with pytest.raises(TypeError, match="Foreign has none"):
            row.function(Foreign(inner), X, sigmas, extra_args=args, disable=True)


def test_rows_at_different_levels_reach_a_model_without_bind() -> None:
    inner = CFGDenoiser(ELLADenoiser(PointwiseUNet(), PointwiseTSC()))  # type: ignore[arg-type]
    bound = bind(Foreign(inner), X, None, extra_args=ARGS)
    assert torch.equal(bound(X, (5.0, float(SIGMA[1]))).denoised, inner(X, SIGMA, **ARGS))
    ours, theirs = (sample_dpm_adaptive(m, X, 0.1, 5.0, ARGS, disable=True) for m in (inner, Foreign(inner)))
    assert torch.equal(ours, theirs)


# A network input of a user's own: a field, a conditioning that sets it, a network that reads it.


@dataclass(frozen=True, eq=False)
class Styled(Context):
    style: Tensor | None = per_row("a style")  # noqa: RUF009


class Style(With):
    """A conditioning in a style [B, 3]."""

    context = Styled


class StyledUNet(nn.Module):
    """A Network whose answer is shifted by the style, or by 7 without one; it varies with sigma."""

    in_channels = out_channels = 4
    dtype, places = torch.float32, ()

    def __init__(self, level: float | None = None) -> None:
        super().__init__()
        self.level, self.unet = level, PointwiseUNet()

    def at(self, levels: Levels) -> "StyledUNet":
        twin = StyledUNet(max(levels))
        twin.unet = self.unet
        return twin

    def forward(self, x: Tensor, t: Tensor, context: Context, patches: Any = ()) -> Tensor:
        style = getattr(context, "style", None)
        shift = 7.0 if style is None else style.sum(1)[:, None, None, None]
        assert self.level is not None
        return self.unet(x, t, context.tokens) + shift * self.level


def test_a_network_input_of_ones_own_reaches_the_network_row_by_row() -> None:
    net = StyledUNet()
    inner = LDMDenoiser(net)
    a, b = (Constant(features(3, width=WIDTH, seed=seed)) for seed in (5, 6))
    styles = noise(2, 3, seed=8)
    plain = LDMDenoiser(PointwiseUNet())
    x, level = X, 5.0
    sigma = torch.full((2,), level)

    def want(cond: Constant, style: Tensor) -> Tensor:
        return plain(x, sigma, cond) - level * level * style.sum(-1).view(-1, 1, 1, 1)

    assert relative(inner(x, sigma, Style(a, style=styles)), want(a, styles)) < 1e-5
    cond, uncond = Style(Stack(a, b), style=styles), Style(a, style=styles[:1])
    guided = CFGDenoiser(inner)(x, sigma, cond=cond, uncond=uncond, cond_scale=3.0)
    c, u = want(Stack(a, b), styles), want(a, styles[:1].expand(2, 3))  # type: ignore[arg-type]
    assert relative(guided, u + 3 * (c - u)) < 1e-5
    beside = Concat(Style(a, style=styles), b)
    assert relative(inner(x, sigma, beside), inner(x, sigma, Style(Concat(a, b), style=styles))) < 1e-6
    with pytest.raises(ValueError, match="one UNet call has a style for all of its conditionings or for none"):
        CFGDenoiser(inner)(x, sigma, cond=Style(a, style=styles), uncond=b, cond_scale=3.0)
    with pytest.raises(ValueError, match="two parts of one conditioning have a style"):
        inner(x, sigma, Concat(Style(a, style=styles), Style(b, style=styles)))
    with pytest.raises(TypeError, match=r"Style takes the inputs channels, .*, style, got mood"):
        Style(a, mood=styles)

    @dataclass(frozen=True, eq=False)
    class Posed(Context):
        pose: Tensor | None = per_row("a pose")  # noqa: RUF009

    class Pose(With):
        context = Posed

    for both in (Style(Pose(a, pose=styles), style=styles), Pose(Style(a, style=styles), pose=styles)):
        with pytest.raises(TypeError, match="are two contexts of their own"):
            inner(x, sigma, both)


def test_a_network_is_asked_for_the_levels_of_each_call() -> None:
    seen: list[Levels] = []

    class Noting(StyledUNet):
        def at(self, levels: Levels) -> StyledUNet:
            seen.append(levels)
            return super().at(levels)

    denoiser = CFGDenoiser(LDMDenoiser(Noting()))
    args: dict[str, Any] = {"cond": features(3, width=WIDTH), "uncond": features(1, width=WIDTH), "cond_scale": 2.0}
    denoiser(X, SIGMA, **args)
    sigmas = get_sigmas_karras(3, 0.5, 8.0)
    sample_euler(denoiser, X, sigmas, args, disable=True)
    assert seen == [tuple(SIGMA.tolist()), *((level,) for level in sigmas[:-1].tolist())]
    seen.clear()
    denoiser.inner_model.loss(X, noise(2, 4, 8, 8), SIGMA, args["cond"])
    assert seen == [tuple(SIGMA.tolist())]


class Late(CFG):
    """A rule that guides below a sigma only, and does not say that it varies."""

    def at(self, levels: Levels) -> Guidance:
        return CFG(3.0) if max(levels) < 1 else CFG(1.0)


def test_a_rule_that_decides_by_sigma_is_asked_at_each() -> None:
    inner = LDMDenoiser(PointwiseUNet())
    args: dict[str, Any] = {"cond": features(3, width=2), "uncond": features(1, width=2)}
    bound = GuidedDenoiser(inner, Late(0.0)).bind(X, (5.0, 0.5), **args)
    for level, scale in ((5.0, 1.0), (0.5, 3.0)):
        want = CFGDenoiser(inner).bind(X, (5.0, 0.5), cond_scale=scale, **args)(X, level).denoised
        assert torch.equal(bound(X, level).denoised, want)


def test_a_bound_run_is_of_its_own_latents_and_says_what_else_is_wrong() -> None:
    denoiser = CFGDenoiser(LDMDenoiser(PointwiseUNet()))
    args: dict[str, Any] = {"cond": features(3, width=2), "uncond": features(1, width=2)}
    bound = denoiser.bind(X, cond_scale=2.0, **args)
    assert torch.equal(bound(X, 5).denoised, denoiser(X, torch.full((2,), 5.0), args["cond"], args["uncond"], 2.0))
    for other in (X[:1], X[..., :4], X.double()):
        with pytest.raises(ValueError, match=r"this run is bound to 2 latents .* bind the denoiser to x"):
            bound(other, 5.0)
    with pytest.raises(TypeError, match=r"unknown argument cond_scal: .* got float; a CFGDenoiser takes cond_scale"):
        denoiser(X, SIGMA, cond_scal=3.0, **args)
    assert repr(denoiser) == "CFGDenoiser(LDMDenoiser(PointwiseUNet))"


class Twice(CFG):
    """A rule of a user's own, by inheritance."""

    def __call__(self, answers: Any) -> Tensor:
        return super().__call__(answers) * 2


def test_bound_runs_are_what_the_call_says_for_any_rule_and_composition() -> None:
    inner = ELLADenoiser(tiny_unet(), tiny_tsc())
    cond = And((features(4, 2), 0.7), (features(3, seed=4), 0.5))
    args: Mapping[str, Any] = {"cond": cond, "uncond": features(1, seed=9)}
    for rule in (CFG(2.0), Twice(lambda sigma: 1 + sigma)):
        guided = GuidedDenoiser(inner, rule)
        assert relative(planned(guided, X, SIGMA, **args).denoised, guided(X, SIGMA, **args)) < 1e-5
