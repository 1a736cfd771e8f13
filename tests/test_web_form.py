"""The page's form: what it asks for, and that a picture's settings fill it so that it asks for the same again."""

from dataclasses import replace
from typing import Any

import pytest

from ella_kd.app.web.form import COMPARE, Form, Limits, filled, requests
from ella_kd.guidance.text import parse
from ella_kd.request import Request

REQUESTS = [
    Request("a red circle", seed=3),
    Request("two\nlines, $x {y} <b>", "blue", "fixed", "euler_ancestral", "ays", 7, 2.5, 2**32 - 1, 64, 32),
    Request("a", sampler="heun_cfg_pp", scale=0.4, mode="clip", tags="", tiling=True, clip_skip=2),
    Request("a", guidance=repr(parse("Rescale(CFG(7), 0.7)")), scale=7.0, tags="word", negative_mode="clip"),
    Request("a", hires="2:0.5", hires_steps=4, hires_prompt="two\nlines", hires_scale=3.0, freeu=True, tome=0.5),
    Request("(a:1.2) [b]", syntax=True, eta=0.5, variation=0.25, variation_seed=9, reuse="3:2", width=48, height=48),
    Request("a <lora:x:0.5>", lora=("y:0.8", "z:unet=0.8:text=0.5"), embedding=("w",)),
    Request("a", start="in.png", mask="mask.png", strength=0.8, crop_to_mask=True, padding=8, mask_grow=-2),
    Request("a", start="in.png", extend="left=64", fill="noise", convention="a1111", repeats=2),
    Request("a", control=("edges:in.png:0.8:preprocess=canny",), sigmas=(14.6, 5.0, 1.0, 0.0), dtype="float32"),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_filled_form_asks_for_the_same_again(request_: Request) -> None:
    form, left = filled(request_)
    assert left == []
    asked = requests(form, Limits())
    wanted = replace(request_, model="", dtype="", tags=request_.tags or None)
    assert asked == {request_.mode: [wanted]}


def test_compare_draws_every_mode_from_the_same_seeds() -> None:
    asked = requests(Form("a", mode=COMPARE, seed=5, count=2), Limits())
    assert list(asked) == ["clip", "fixed", "flexible"]
    assert all([each.seed for each in column] == [5, 6] for column in asked.values())
    assert list(requests(Form("a", mode=COMPARE), Limits(), modes=("clip",))) == ["clip"]


@pytest.mark.parametrize(("given", "message"), [
    ({"steps": 10**9}, "steps must be a whole number from 1 to 200, got 1000000000"),
    ({"steps": 2.5}, "steps must be a whole number"),
    ({"steps": "7"}, "steps must be a whole number"),
    ({"steps": float("nan")}, "steps must be a whole number"),
    ({"count": 17}, "count must be a whole number from 1 to 16"),
    ({"seed": 2**32}, "seed must be a whole number from 0 to 4294967295"),
    ({"seed": 2**32 - 1, "count": 2}, "seed must be a whole number from 0 to 4294967294"),
    ({"seed": -2}, "seed must be"),
    ({"width": 4096}, "width must be a whole number from 1 to 2048"),
    ({"scale": float("inf")}, "scale must be a number from -50 to 50"),
    ({"cfg_pp": True, "lam": 7}, "lambda must be a number from 0 to 2, got 7"),
    ({"prompt": "a" * 20001}, "prompt may have 20000 letters"),
    ({"prompt": None}, "prompt must be text"),
    ({"sampler": "eulr"}, "unknown sampler 'eulr': did you mean"),
    ({"guidance": "__import__('os')"}, "unknown guidance rule"),
    ({"mode": "paint"}, "unknown mode 'paint'"),
    ({"more": "lora: x"}, "more options are lines such as hires: 2:0.5, got 'lora: x'"),
    ({"more": "start: /etc/passwd"}, "more options are lines"),
    ({"more": "hires: 2:0.5\nhires_upscaler: /etc/passwd"}, "unknown upscaler '/etc/passwd'"),
    ({"more": "tome: lots"}, "tome is a number, got 'lots'"),
    ({"more": "repeats: 1000", "start": "in.png"}, "repeats may be 20 here"),
    ({"more": "sigmas: " + ",".join(map(str, range(500, -1, -1)))}, "the number of sigmas may be 201 here, got 501"),
    ({"prompt": "a" + " AND b" * 16, "more": "syntax: on"}, "the number of prompts between AND may be 16 here, got 17"),
    ({"control": "edges"}, "the control edges needs a picture"),
    ({"mode": COMPARE, "tags": "x"}, "compare reads the prompt in each way"),
])
def test_what_cannot_be_is_said_in_a_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        requests(replace(Form("a"), **given), Limits())
    assert message in str(error.value) and len(str(error.value)) < 1200


def test_what_a_form_cannot_ask_for_is_named() -> None:
    request = Request("a", seed=2**40, image_prompt=("ip:cat.png",), refiner="other.safetensors")
    assert filled(request)[1] == ["the seed 1099511627776, which is beyond 4294967295", "refiner",
                                  "the image prompt ip:cat.png"]
