"""What add-ons are for, on the bundled miniature, read back from the pictures' pixels.

The files in models/miniature/addons were trained by `benchmarks.miniature.addons`: two LoRAs, a word, a ControlNet.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import studio
from benchmarks import addons
from benchmarks.miniature import captions
from benchmarks.miniature.addons import BUNDLED, MASCOT
from benchmarks.miniature.scenes import Scene, Thing, parse, render
from ella_kd import CFG, PAG, Pipeline, generate
from ella_kd.addons import AddOns
from ella_kd.conditioning import Concat, Stack
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.inside import Inside
from ella_kd.models.networks import ByRow, BySigma
from ella_kd.models.seamless import seamless
from ella_kd.models.tome import ToMe
from ella_kd.request import Request

COUNT = 6
LORAS = {name: BUNDLED / f"{name}.safetensors" for name in ("striped", "azure")}
SAMPLERS = ("euler", "heun", "euler_ancestral", "dpmpp_2m_sde", "euler_cfg_pp")


def with_loras(**weights: float) -> Pipeline:
    return studio.miniature().with_lora([(LORAS[name], weight) for name, weight in weights.items()])


def drawn(sd: Pipeline, sampler: str = "dpmpp_2m") -> list[np.ndarray]:
    """Pictures of prompts of all colours and fills, by ELLA."""
    prompts = addons.written(addons.held_out(COUNT), captions.dense)
    return addons.drawn(sd, sd.encode(prompts), COUNT, sampler)


def look(pictures: list[np.ndarray]) -> addons.Look:
    return addons.look(addons.held_out(COUNT), pictures)


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def near(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Equal but for rounding: by one step of 255."""
    return max(np.abs(x.astype(int) - y).max() for x, y in zip(a, b, strict=True)) <= 1


def test_a_lora_does_it_at_one_and_half_at_half_and_leaves_nothing_behind() -> None:
    before = drawn(studio.miniature())
    plain = look(before)
    half, one = (look(drawn(with_loras(striped=weight))) for weight in (0.5, 1.0))
    assert plain.striped < 0.5 and one.striped >= 0.95 and min(half.layout, one.layout) >= 5 / 6
    assert plain.stripes + 0.15 < half.stripes < one.stripes - 0.15
    half, one = (look(drawn(with_loras(azure=weight))) for weight in (0.5, 1.0))
    assert one.from_azure < 25 < half.from_azure < plain.from_azure - 15 and one.layout >= 5 / 6
    assert same(drawn(with_loras(striped=0.0, azure=0.0)), before)
    assert same(drawn(studio.miniature()), before)


@pytest.mark.parametrize("sampler", SAMPLERS[-3:])
def test_two_loras_at_once_with_every_sampler(sampler: str) -> None:
    found = look(drawn(with_loras(striped=1.0, azure=1.0), sampler))
    assert found.striped >= 0.9 and found.from_azure < 30 and found.layout >= 5 / 6


def test_a_lora_below_a_sigma_and_one_per_row() -> None:
    """What is decided late needs the LoRA late; rows of one batch have strengths of their own."""
    plain, half, striped = studio.miniature(), with_loras(striped=0.5), with_loras(striped=1.0)
    late, early = (replace(plain, unet=BySigma(*networks, at=2.0)) for networks in (
        (plain.unet, striped.unet), (striped.unet, plain.unet)))
    assert look(drawn(late)).striped >= 0.9 and look(drawn(early)).striped < 0.5
    rows = replace(plain, unet=ByRow([(plain, half, striped)[i % 3].unet for i in range(COUNT)]))
    alone = [drawn(system) for system in (plain, half, striped)]
    assert near(drawn(rows), [alone[i % 3][i] for i in range(COUNT)])


def test_loras_agree_in_any_order_and_on_a_fast_network() -> None:
    once = drawn(with_loras(striped=0.7, azure=0.6))
    other = drawn(with_loras(azure=0.6).with_lora([(LORAS["striped"], 0.7)]).fast_on_cpu())
    assert near(once, other)


def test_a_word_is_drawn_where_the_prompt_says_and_beside_ella() -> None:
    plain = studio.miniature()
    known = plain.with_embeddings([BUNDLED / "mascot.safetensors"])
    assert sum(a == b for a, b in addons.mascots(known, ["night"])) >= 8
    assert sum(a == b for a, b in addons.mascots(plain, ["night"])) == 0
    both = Concat(known.encode("The scene is set in a dark night."), known.encode("mascot center, night", "clip"))
    [found] = map(parse, addons.drawn(known, both, 1))
    assert [(thing.shape, thing.colour, thing.place) for thing in found.things] == [(MASCOT.shape, MASCOT.colour, 4)]


@cache
def edges() -> ControlNet:
    return ControlNet.load(BUNDLED / "edges.safetensors", base=studio.miniature().unet)


def where(**options: object) -> float:
    """The share of things that stand where the edges say; the prompts say nowhere."""
    wanted = addons.held_out(COUNT)
    return addons.placement(wanted, addons.steered(studio.miniature(), edges(), wanted, **options))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_edges_place_what_the_prompt_does_not(sampler: str) -> None:
    assert where(sampler=sampler) >= 0.85


def test_edges_under_pag_and_only_while_they_are_shown() -> None:
    assert where(guidance=PAG(CFG(3.0), 1.0)) >= 0.85
    assert where(strength=0.0) <= 0.2


def test_rows_with_and_without_a_control_are_as_they_would_be_alone() -> None:
    sd, wanted = studio.miniature(), addons.held_out(2)
    prompts = addons.written(wanted, captions.placeless)
    plain = sd.encode(prompts)
    hint = render(wanted[0])
    with_hint = sd.encode(prompts[0]).with_control(edges(), hint, preprocess="canny")
    together = addons.drawn(sd, Stack(with_hint, sd.encode(prompts[1])), 2)
    alone = addons.drawn(sd, with_hint, 1) + addons.drawn(sd, plain, 2)[1:]
    assert near(together, alone)
    above_every_sigma = (200.0, 100.0)
    off = (plain.with_control(edges(), hint, strength=0.0), plain.with_control(edges(), hint, window=above_every_sigma))
    assert all(same(addons.drawn(sd, cond, 2), addons.drawn(sd, plain, 2)) for cond in off)


def test_everything_at_once() -> None:
    """A LoRA, a word and a control in one batch of one picture."""
    sd = with_loras(azure=1.0).with_embeddings([BUNDLED / "mascot.safetensors"])
    hint = render(Scene("night", (Thing(2, "ring", "red"),)))
    cond = sd.encode("mascot, night", "clip").with_control(edges(), hint, preprocess="canny")
    [picture] = addons.drawn(sd, cond, 1, mode="clip")
    assert [(thing.shape, thing.place) for thing in parse(picture).things] == [("ring", 2)]


def test_by_name_in_the_text() -> None:
    picture, other = generate(studio.miniature(), ["A red heart sits in the center. <lora:striped:1>",
                                                   "A red heart sits in the center."], models_dir=BUNDLED, steps=10,
                              scale=3.0, progress=False)
    assert [parse(np.asarray(each.image)).things for each in (picture, other)] == [
        (Thing(4, "heart", "red", fill),) for fill in ("striped", "plain")]


@torch.no_grad()
@pytest.mark.parametrize("lora", [False, True])
def test_a_control_is_told_against_what_a_fast_or_changed_network_was_made_of(lora: bool) -> None:
    """A Control-LoRA finds its base's weights, a merged LoRA's among them, in whatever the pipeline draws with."""
    sd = with_loras(azure=1.0) if lora else studio.miniature()
    want = ControlNet.load(BUNDLED / "edges.safetensors", base=sd.unet).state_dict()
    fast: Any = sd.fast_on_cpu().unet
    for unet in (fast, seamless(fast), Inside(fast, ToMe(0.5)), BySigma(sd.unet, fast, at=2.0), ByRow([fast, sd.unet])):
        shelf, asked = AddOns(), Request("a", control=(f"{BUNDLED / 'edges.safetensors'}:room.png",))
        found = shelf._network(replace(sd, unet=unet), asked.add_ons[0]).state_dict()
        assert all(torch.equal(found[name], x) for name, x in want.items()) and found.keys() == want.keys()
    plain = ControlNet.load(BUNDLED / "edges.safetensors", base=studio.miniature().unet).state_dict()
    assert lora == any(not torch.equal(plain[name], x) for name, x in want.items())
