"""Prompts that change from step to step: what is read, and what is drawn."""

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ella_kd import And, Concat, Pipeline, Switch, draw, generate
from ella_kd.prompt_editing import edits
from ella_kd.samplers import get_sigmas_karras

TEXT = st.text("ab ()\\:|[].15", max_size=24)


@pytest.mark.parametrize(("prompt", "said"), [
    ("a [b:c:0.5] d", ["a b d", "a b d", "a c d", "a c d"]),
    ("[b:2]", ["", "", "b", "b"]),
    ("[b::2]x", ["bx", "bx", "x", "x"]),
    ("[:x:1]", ["", "x", "x", "x"]),
    ("[a|b|]", ["a", "b", "", "a"]),
    ("[a:[b:c:3]:1]", ["a", "b", "b", "c"]),
    ("[[a|b]:c:2]", ["a", "b", "c", "c"]),
    ("([a|b]:1.3) [x]", ["(a:1.3) [x]", "(b:1.3) [x]", "(a:1.3) [x]", "(b:1.3) [x]"]),
    ("[(a:1.2):b: .25 ]", ["(a:1.2)", "b", "b", "b"]),
    ("[a:b:1.0] [a:b:9]", ["a a"] * 4),
    ("[a:b:-1]", ["b"] * 4),
    ("[a:1|b]", ["a:1", "b", "a:1", "b"]),
    (r"\[a:b:2\] [a\|b] [a\:b:c:1]", [r"\[a:b:2\] [a\|b] a\:b", *[r"\[a:b:2\] [a\|b] c"] * 3]),
    ("[a (b:c:2]", ["[a (b:c:2]"] * 4),
    ("a [b, (c [d) e] :)", ["a [b, (c [d) e] :)"] * 4),
    ("[a:b:c:2] [a:b]", ["[a:b:c:2] [a:b]"] * 4),
])
def test_as_the_web_ui_reads_it(prompt: str, said: list[str]) -> None:
    assert edits(prompt, 4) == said


@given(TEXT, st.integers(1, 5))
def test_what_is_said_is_made_of_the_prompt(prompt: str, steps: int) -> None:
    said = edits(prompt, steps)
    assert len(said) == steps
    for text in said:  # a part of the prompt's characters, in their order
        rest = iter(prompt)
        assert all(letter in rest for letter in text)
    if "[" not in prompt:
        assert said == [prompt] * steps


@pytest.mark.parametrize("prompt", ["[" * 4000, "(" * 4000 + "]" * 4000, "[" * 2000 + "a" + "]" * 2000, "[a|b]" * 500])
def test_strange_prompts_take_no_time(prompt: str) -> None:
    start = time.process_time()
    edits(prompt, 20)
    assert time.process_time() - start < 2


def test_editing_is_a_switch_at_the_schedules_sigmas(pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"steps": 4, "seeds": 3, "sampler": "heun", "progress": False}
    denoiser = pipeline.denoiser()
    sigmas = get_sigmas_karras(4, denoiser.sigma_min, denoiser.sigma_max).tolist()
    red, blue = pipeline.encode("a red circle"), pipeline.encode("a blue circle")
    tags = [pipeline.encode(text, "clip", weighted=True) for text in ("red", "blue")]
    empty = pipeline.encode("", "clip")
    wanted = {
        "a [red:blue:0.5] circle": ({}, Switch(red, blue, at=sigmas[2]), pipeline.encode("")),
        "a [red|blue] circle": ({}, Switch(red, blue, red, blue, at=sigmas[1:4]), pipeline.encode("")),
        "a [red:blue:3] circle AND a blue circle :-0.5": (
            {}, And((Switch(red, blue, at=sigmas[3]), 1.0), (blue, -0.5)), pipeline.encode("")),
        "a red circle": ({"tags": "[red:blue:1]"}, Concat(red, Switch(*tags, at=sigmas[1])),
                         Concat(pipeline.encode(""), empty)),
        "a blue circle": ({"negative": "a [red ::2]circle"}, blue,
                          Switch(red, pipeline.encode("a circle"), at=sigmas[2])),
    }
    drawn = {}
    for prompt, (more, cond, uncond) in wanted.items():
        asked: dict[str, Any] = {**options, **more}
        [picture] = generate(pipeline, prompt, syntax=True, scale=3.0, **asked)
        [expected] = draw(pipeline, cond, uncond=uncond, guidance=3.0, **options)
        drawn[prompt] = np.asarray(picture.image, int)
        assert np.abs(drawn[prompt] - np.asarray(expected, int)).max() <= 1, prompt
    assert len({image.tobytes() for image in drawn.values()}) == len(wanted)
    rows = generate(pipeline, list(drawn)[:2], syntax=True, scale=3.0, **options)  # each with switches of its own
    for picture in rows:
        assert np.abs(np.asarray(picture.image, int) - drawn[picture.settings.prompt]).max() <= 1
