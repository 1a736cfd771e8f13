"""Requests with add-ons, where something else is near: another pipeline, a refiner, a paused run, other prompts."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from ella_kd import Pipeline, generate
from ella_kd.addon_words import AddOn, words_in
from ella_kd.addons import AddOns
from ella_kd.digests import digest
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.pipeline import MINIATURE
from ella_kd.request import Request
from tiny import randomised

ADD_ONS = MINIATURE / "addons"
EDGES = Image.new("RGB", (48, 48))


def test_a_conditions_digest_is_the_same_after_it_was_drawn(pipeline: Pipeline) -> None:
    net = ControlNet.of(pipeline.unet)  # type: ignore[arg-type]
    cond = pipeline.encode("a red circle", "clip").with_control(net, EDGES)
    before = digest(cond)
    pipeline.denoiser(1.0).predict(*_at(2.0), cond=cond, uncond=cond)
    assert digest(cond) == before == digest(pipeline.encode("a red circle", "clip").with_control(net, EDGES))
    assert digest(cond) != digest(pipeline.encode("a red circle", "clip").with_control(net, EDGES, 0.5))


def test_a_shelf_for_two_models_keeps_their_controls_apart() -> None:
    shelf, one, other = AddOns(ADD_ONS), Pipeline.miniature(), Pipeline.miniature()
    randomised(other.unet, 0, 0.1)
    edges = AddOn("control", "edges", "room.png")
    first, second = shelf._network(one, edges), shelf._network(other, edges)
    assert first is shelf._network(one, edges)
    names = [name for name, x in first.state_dict().items() if not x.equal(second.state_dict()[name])]
    assert names, "the file is a difference to the model's own weights"


def test_what_does_not_reach_the_refiner_is_said(tmp_path: Path) -> None:
    sd = Pipeline.miniature()
    with pytest.warns(UserWarning, match=r"the refiner draws without the add-ons: azure:0\.5"):
        generate(sd, "a red heart", mode="clip", steps=2, lora=["azure:0.5"], models_dir=ADD_ONS, refiner=sd,
                 refiner_at=0.5, progress=False)


def test_every_add_on_is_found_before_anything_is_drawn() -> None:
    steps: list[int] = []
    with pytest.raises(FileNotFoundError, match="missing"):
        generate(Pipeline.miniature(), ["a red heart", "a ring <lora:missing:1>"], models_dir=ADD_ONS, steps=2,
                 batch_size=1, callback=lambda told: steps.append(told["i"]), progress=False)
    assert not steps


@pytest.mark.parametrize("prompt", ["", "a red heart"])
def test_a_door_is_read_back_once(prompt: str) -> None:
    request = Request(prompt, lora=("azure.safetensors:0.8",))
    again = Request.from_text(request.parameters())
    assert (again.prompt, again.lora) == (prompt, request.lora)


def test_a_word_is_no_longer_one_that_begins_like_it() -> None:
    assert words_in("embedding:mascot2, embedding:mascot", ["mascot"]) == [AddOn("embedding", "mascot2")]


def _at(sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 4, 8, 8), torch.tensor([sigma])
