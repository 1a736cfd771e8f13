"""Stable Diffusion 2, SDXL and its refiner from prompt to picture: diffusers' own pipelines are the judge."""

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ella_kd import CFG, PAG, And, Box, Concat, Pipeline, Regions, Switch, draw, generate
from ella_kd.conditioning import Conditioning, Constant, Lerp, Stack, With, window
from ella_kd.models import CLIPTextEncoder, NoiseSchedule, UNet
from ella_kd.models.text import TextFeatures
from ella_kd.samplers import sample_euler
from families import BOS, EOS, LENGTH, POOLED, Family, byte_tokenizer, family, text_model
from tiny import noise, randomised, relative

PROMPT, NEGATIVE = "a red fox, sitting", "bad"
FAMILIES = ("sd2", "sdxl", "refiner")


def theirs(name: str) -> Any:
    of = family(name)
    bang = byte_tokenizer("!")
    if name == "sd2":
        return of.theirs(diffusers.StableDiffusionPipeline, text_encoder=of.texts[0], tokenizer=bang,
                         safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if name == "refiner":
        return of.theirs(diffusers.StableDiffusionXLImg2ImgPipeline, text_encoder=None, tokenizer=None,
                         text_encoder_2=of.texts[0], tokenizer_2=bang, requires_aesthetics_score=True)
    return of.theirs(diffusers.StableDiffusionXLPipeline, text_encoder=of.texts[0], text_encoder_2=of.texts[1],
                     tokenizer=byte_tokenizer(), tokenizer_2=bang)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_equals_diffusers(name: str) -> None:
    """The same latents after three steps of Euler, at a size that is not the model's own."""
    pipe, sd = theirs(name), family(name).ours
    start = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(7))
    args: dict[str, Any] = {"prompt": [PROMPT, "the sea"], "negative_prompt": [NEGATIVE] * 2, "guidance_scale": 5.0,
                            "num_inference_steps": 3, "output_type": "latent"}
    if name == "refiner":
        args |= {"image": torch.zeros_like(start), "strength": 1.0, "generator": torch.Generator().manual_seed(7)}
    else:
        args |= {"latents": start, "height": 48, "width": 64}
    want = pipe(**args).images
    sigmas = pipe.scheduler.sigmas
    conds = {"cond": sd.encode([PROMPT, "the sea"], "clip"),
             "uncond": sd.encode(NEGATIVE, "clip", score=2.5)}
    got = sample_euler(sd.denoiser(), start * sigmas[0], sigmas, extra_args={**conds, "cond_scale": 5.0}, disable=True)
    assert relative(got, want) < 1e-4
    other = {**conds, "cond": sd.encode([PROMPT, "1"], "clip")}
    changed = sample_euler(sd.denoiser(), start * sigmas[0], sigmas, extra_args={**other, "cond_scale": 5.0},
                           disable=True)
    assert relative(changed[1:], want[1:]) > 1e-2, "the text is seen"
    if name == "sdxl":  # and so are the sizes
        small = {key: With(cond, sizes=torch.tensor([[512.0, 512, 0, 0, 64, 64]])) for key, cond in conds.items()}
        args |= {"latents": start, "original_size": (512, 512), "target_size": (64, 64)}
        want = pipe(**args).images
        got = sample_euler(sd.denoiser(), start * sigmas[0], sigmas, extra_args={**small, "cond_scale": 5.0},
                           disable=True)
        assert relative(got, want) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("skip", [None, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_is_diffusers(name: str, skip: int | None) -> None:
    prompts = [PROMPT, ""]
    pipe, clip = theirs(name), family(name).ours.clip
    assert clip is not None
    features = clip(prompts, clip_skip=(skip or 0) + 1)
    more = {} if name == "sd2" else {"prompt_2": None}
    if name == "sd2" and skip:  # this transformers has no text_model where diffusers looks for the norm
        model = pipe.text_encoder
        ids = pipe.tokenizer(prompts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        found = [model.final_layer_norm(model(ids, output_hidden_states=True).hidden_states[-1 - skip])]
    else:
        found = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False,
                                   clip_skip=skip, **more)
    assert relative(features.tokens, found[0]) < 1e-6
    assert (features.vector is None) == (name == "sd2")
    if features.vector is not None:
        assert relative(features.vector, found[2]) < 1e-6
    weighted = clip.weighted(prompts, clip_skip=(skip or 0) + 1)
    assert relative(weighted.tokens, features.tokens) < 1e-6


def test_an_exclamation_mark_is_a_word() -> None:
    """The published tokenizers of SD2 and SDXL pad with "!", and read it as padding everywhere."""
    bang, clean = byte_tokenizer("!"), byte_tokenizer()
    assert bang("hi!").input_ids == [BOS, 71, 328, 0, EOS] and clean("hi!").input_ids == [BOS, 71, 328, 256, EOS]
    clip = family("refiner").ours.clip
    assert clip is not None
    model: Any = clip.model
    ids = torch.tensor([[BOS, 71, 328, 256, EOS, *[0] * (LENGTH - 5)]])
    with torch.no_grad():
        said = model(ids, output_hidden_states=True)
    for read in (clip, clip.weighted):
        features = read("hi!")
        assert torch.equal(features.tokens, said.hidden_states[-2])
        assert features.vector is not None and torch.equal(features.vector, said.text_embeds)
    assert relative(clip("hi").tokens, clip("hi!").tokens) > 1e-2


def test_sd2_may_lack_its_last_layer() -> None:
    model = text_model(False, 24)
    whole = CLIPTextEncoder.sd2(model, byte_tokenizer())
    short = text_model(False, 23)
    short.load_state_dict({name: x for name, x in model.state_dict().items() if ".23." not in name})
    cut = CLIPTextEncoder.sd2(short, byte_tokenizer())
    for skip in (1, 2):
        assert torch.equal(whole("a fox", skip).tokens, cut("a fox", skip).tokens)
    with pytest.raises(ValueError, match=r"clip_skip must be from 1 .* to 23, got 24"):
        whole("a fox", 24)


def test_long_prompts_keep_the_first_chunks_vector() -> None:
    clip = family("sdxl").ours.clip
    assert clip is not None
    long = "a cat, " * 3 + "(a big dog:1.5), " + "the sea " * 4
    both = clip.weighted([long, "a cat"])
    assert both.tokens.shape[1] % LENGTH == 0 and both.tokens.shape[1] > 2 * LENGTH
    assert both.mask is not None and both.mask.sum(1).tolist() == [both.tokens.shape[1], LENGTH]
    assert both.vector is not None and both.vector.shape == (2, POOLED)
    for row, prompt in enumerate((long, "a cat")):
        alone = clip.weighted(prompt)
        assert alone.vector is not None
        assert relative(both.tokens[row, :alone.tokens.shape[1]], alone.tokens[0]) < 1e-6
        assert relative(both.vector[row:row + 1], alone.vector) < 1e-6


SIZES = torch.tensor([[512.0, 256, 0, 8, 64, 64]])


def trees(sd: Pipeline) -> dict[str, Conditioning]:
    """Each with two rows: what SDXL is told beside tokens goes through the whole tree."""
    ella, clip = sd.encode(["a cat", "the sea"]), sd.encode(["a red fox", "a dog"], "clip")
    left = Box(0, 0, 0.5, 1)
    return {
        "ella": ella, "clip": clip, "beside": Concat(ella, clip), "window": Concat(ella, window(clip, sigma_lo=2.0)),
        "switch": Switch(ella, clip, at=2.0), "lerp": Lerp(ella, sd.encode("a dog"), 0.3),
        "stack": Stack(sd.encode("a cat"), sd.encode("the sea", "clip")), "and": And((ella, 1.0), (clip, -0.3)),
        "regions": Regions((ella, left), background=And((clip, 0.5), (ella, 0.5))),
        "sizes": With(ella, sizes=SIZES),
    }


@torch.no_grad()
def test_vectors_go_through_the_whole_tree() -> None:
    """Planned equals unplanned, and a batch its rows alone, one at each sigma."""
    sd = family("sdxl").ours
    denoiser, x, levels = sd.denoiser(), noise(2, 4, 8, 8) * 5, (7.0, 1.0)
    uncond = sd.encode("")
    for name, cond in trees(sd).items():
        against = With(uncond, sizes=SIZES) if name == "sizes" else uncond
        args: dict[str, Any] = {"cond": cond, "uncond": against, "cond_scale": 3.0}
        bound = denoiser.bind(x, levels, **args)
        for level in levels:
            sigma = torch.full((2,), level)
            want = denoiser(x, sigma, **args)
            assert relative(bound(x, level).denoised, want) < 1e-5, name
            if cond.of_answers:
                continue
            context = cond.at((level,))(denoiser.sigma_to_t(sigma))
            assert context.vector is not None and context.vector.shape == (2, POOLED)
            for row in range(2):
                alone = With(Row(context.take(torch.tensor([row]))), vector=context.vector[row:row + 1])
                one = denoiser(x[row:row + 1], sigma[:1], cond=alone, uncond=against, cond_scale=3.0)
                assert relative(want[row:row + 1], one) < 1e-5, name


class Row(Conditioning):
    """A context of one row."""

    def __init__(self, context: Any) -> None:
        self.context = context

    @property
    def rows(self) -> int:
        return 1

    def __call__(self, t: Tensor) -> Any:
        return self.context

    def repeat(self, n: int) -> "Row":
        raise AssertionError


def test_which_vector_holds() -> None:
    sd = family("sdxl").ours
    a, b, v = sd.encode("a cat"), sd.encode("a dog", "clip"), torch.ones(1, POOLED)
    t = torch.zeros(1)

    def vector(cond: Conditioning) -> Tensor:
        found = cond(t).vector
        assert found is not None
        return found

    assert sd.clip is not None
    assert torch.equal(vector(a), sd.clip("a cat").vector)  # type: ignore[arg-type]
    assert torch.equal(vector(Concat(a, b)), vector(a)) and torch.equal(vector(Concat(b, a)), vector(b))
    assert torch.equal(vector(With(a, vector=v)), v)
    c = sd.encode("a dog")
    assert relative(vector(Lerp(a, c, 0.25)), 0.75 * vector(a) + 0.25 * vector(c)) < 1e-6
    assert relative(vector(sd.encode("a (cat:2)", weighted=True)), vector(a)) < 1e-6
    with pytest.raises(ValueError, match=r"needs a vector .*: give it beside the tokens, With\(cond, vector=...\)"):
        draw(sd, sd.t5("a cat"), uncond=sd.t5(""), steps=2, progress=False)  # type: ignore[misc]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_generate_draws_them_all(name: str) -> None:
    sd = family(name).ours
    mode: Any = "flexible" if sd.tsc else "clip"
    args: dict[str, Any] = {"mode": mode, "steps": 2, "seeds": 3, "progress": False}
    first = generate(sd, PROMPT, **args)[0].image
    assert first.size == (64, 64)
    changes: list[dict[str, Any]] = [
        {"sampler": "dpmpp_2m_cfg_pp", "scale": 0.6}, {"guidance": PAG(CFG(3.0), 2.0)}, {"negative": "blue"},
        {"syntax": True, "prompts": "a (red:1.4) fox AND a dog :0.5"}, {"prompts": "a dog"},
        {"width": 48, "height": 80}, *([{"tags": "dark"}] if sd.tsc else [])]
    for change in changes:
        image = generate(sd, **{"prompts": PROMPT, **args, **change})[0].image
        assert image.size != (64, 64) or (np.asarray(image) != np.asarray(first)).any(), change
    a, b = (sd.encode(text, mode) for text in ("a cat", "a dog"))
    drawn = draw(sd, Regions((a, Box(0, 0, 0.5, 1)), (b, Box(0.5, 0, 1, 1))), uncond=sd.encode("", mode), steps=2,
                 seeds=[3], progress=False)
    assert (np.asarray(drawn[0]) != np.asarray(first)).any()
    batch = generate(sd, [PROMPT, "a dog"], **{**args, "seeds": [3, 4]})
    assert np.abs(np.asarray(batch[0].image, int) - np.asarray(first, int)).max() <= 1


def watched(network: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The contexts that a network is called with from now on."""
    seen: list[Any] = []
    forward = network.forward

    def keep(x: Tensor, t: Tensor, context: Any, patches: Any = ()) -> Tensor:
        seen.append(context)
        return forward(x, t, context, patches)

    monkeypatch.setattr(network, "forward", keep)
    return seen


def test_the_negative_prompt_is_told_a_low_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's refiner: 6 for the prompt, 2.5 for the negative one; the base model has no place for a score."""
    for name, want in (("refiner", [6.0, 2.5]), ("sdxl", None)):
        sd = family(name).ours
        seen = watched(sd.unet, monkeypatch)
        generate(sd, "a cat", mode="clip", steps=1, seeds=1, progress=False)
        assert [None if context.score is None else context.score.tolist() for context in seen] == [want]


def test_a_connector_of_sdxls_width_is_trained() -> None:
    """No weights exist for it: the loss of one batch falls, and CLIP's vector goes beside."""
    sd = family("sdxl").ours
    assert sd.tsc is not None and sd.t5 is not None
    tsc = randomised(type(sd.tsc)(32, 32, 128, 1, 2, 4, 32), 1).requires_grad_(True)
    training = replace(sd, tsc=tsc)
    denoiser = training.denoiser().inner_model
    x, z, sigma = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=9), torch.tensor([3.0, 0.7])
    optimizer = torch.optim.Adam(tsc.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = denoiser.loss(x, z, sigma, training.encode(["a cat", "the sea"])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert all(parameter.grad is not None for parameter in tsc.parameters())
    assert losses[-1] < 0.98 * losses[0]


def test_a_fast_copy_draws_the_same() -> None:
    sd: Family = family("sdxl")
    fast = sd.ours.fast_on_cpu()
    a, b = (generate(each, PROMPT, steps=2, seeds=5, progress=False)[0].image for each in (sd.ours, fast))
    assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
    half = sd.ours.to(dtype=torch.bfloat16)
    assert half.clip is not None and half.clip("a cat").tokens.dtype == torch.bfloat16
    assert "TwoTextEncoders" in repr(half.clip) and "clip 0." in repr(half)
    generate(half, PROMPT, steps=1, seeds=5, progress=False)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_lcm_passes_its_boundary(prediction: Any) -> None:
    """diffusers' LCMScheduler, at the lowest timesteps above all: from 20 on the boundary is less than 1e-5."""
    named = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    scheduler: Any = diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       prediction_type=named, clip_sample=False)
    scheduler.set_timesteps(50)
    schedule = replace(NoiseSchedule.sd15(prediction), consistency=True)
    x, out = noise(1, 4, 2, 2), noise(1, 4, 2, 2, seed=4)
    for t in (0, 1, 5, 400, 999):
        scheduler._step_index = 49
        want = scheduler.step(out, t, x, return_dict=False)[1]
        sigma = schedule.t_to_sigma(torch.tensor(float(t), dtype=torch.float64))
        c_skip, c_out, c_in = schedule.scalings(sigma)
        assert relative(c_skip * (x / c_in) + c_out * out, want) < 1e-5
    assert schedule.zero_terminal_snr().consistency


@torch.no_grad()
def test_a_network_that_is_told_the_scale_runs_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    sd = family("sd2").ours
    config: Any = sd.unet.config
    told = randomised(UNet(replace(config, guidance_dim=16)), 0, 0.1)
    lcm = replace(sd, unet=told, noise_schedule=replace(NoiseSchedule.sd15(), consistency=True))
    seen = watched(told, monkeypatch)
    generate(lcm, [PROMPT, "the sea"], mode="clip", steps=2, scale=7.5, sampler="lcm", seeds=1, progress=False)
    assert [context.guidance.tolist() for context in seen] == [[7.5, 7.5]] * 2


def test_an_added_vector_needs_a_projection() -> None:
    with pytest.raises(ValueError, match="a pooled text needs a CLIPTextModelWithProjection, got CLIPTextModel"):
        CLIPTextEncoder(text_model(False), byte_tokenizer(), pooled=True)
    with pytest.raises(ValueError, match=r"the vector of text features must be floats \[1, D\], got .* \[2, 3\]"):
        Constant(TextFeatures(torch.zeros(1, 2, 128), vector=torch.zeros(2, 3)))
