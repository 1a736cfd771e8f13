"""Which module a LoRA's name means, on the shapes of the real networks, and what is refused or named."""

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from safetensors.torch import save_file
from torch import Tensor, nn

from ella_kd.models import NoiseSchedule, UNet, UNetConfig
from ella_kd.models.addons.lora import LoRA, Strength, with_lora
from ella_kd.models.addons.lora.names import Dictionary, modules_of
from ella_kd.models.addons.lora.strength import LISTS, place_of
from ella_kd.models.clip import clip_text_model
from ella_kd.models.files.hub import read
from ella_kd.models.files.names import to_open_clip, unet_to_diffusers
from ella_kd.models.files.presets import FEW_STEPS, HubFile
from ella_kd.request import Request
from ella_kd.samplers import get_schedule
from families import family, text_model
from test_addons_lora import assert_agree, factors, layers, random, weights
from tiny import randomised, relative, tiny_unet

SDXL = UNetConfig(4, 4, 320, (1, 2, 4), 2, (0, 2, 10), 2048, None, 64, True, 10, vector_dim=2816)
SD2 = UNetConfig(4, 4, 320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 1024, None, 64, True)


@cache
def whole(name: str) -> dict[str, nn.Module]:
    """The networks of a real model, without numbers."""
    def text(width: int, count: int, projected: bool = False) -> nn.Module:
        shapes = {"embeddings.token_embedding.weight": (49408, width),
                  "embeddings.position_embedding.weight": (77, width)}
        shapes |= {f"encoder.layers.{n}.mlp.fc1.weight": (4 * width, width) for n in range(count)}
        return clip_text_model(shapes | ({"text_projection.weight": (width, width)} if projected else {}))

    with torch.device("meta"):
        if name == "sd1":
            return {"unet": UNet(), "text": text(768, 12)}
        if name == "sd2":
            return {"unet": UNet(SD2), "text": text(1024, 23)}
        return {"unet": UNet(SDXL), "text": text(768, 12), "text_2": text(1280, 32, True)}


def kohya_names(name: str) -> list[str]:
    """The names that kohya's trainer gives: every linear layer and 1x1 convolution of the transformers, and of CLIP's
    attention and feed-forward. It walks diffusers' UNet, of SDXL its own in LDM's names."""
    found = []
    for part, network in whole(name).items():
        ours = [module for module, layer in layers(network) if part != "unet" or ".transformer_blocks." in module
                or module.endswith((".proj_in", ".proj_out"))]
        if part == "unet":
            spelled = unet_to_diffusers(f"{module}.weight" for module in modules_of(network))
            paths = [module if name == "sdxl" else spelled[f"{module}.weight"].removesuffix(".weight")
                     for module in ours]
            found += [f"lora_unet_{path.replace('.', '_')}" for path in paths]
        else:
            te = "lora_te_" if name != "sdxl" else "lora_te1_" if part == "text" else "lora_te2_"
            paths = [f"text_model.{path.removeprefix('text_model.')}" for path in ours if path != "text_projection"]
            found += [te + path.replace(".", "_") for path in paths]
    return found


@pytest.mark.parametrize(("name", "counts"), [("sd1", {"unet": 192, "text": 72}), ("sd2", {"unet": 192, "text": 138}),
                                              ("sdxl", {"unet": 722, "text": 72, "text_2": 192})])
def test_every_name_of_the_real_models_is_a_module(name: str, counts: dict[str, int]) -> None:
    """As many as kohya's trainer counts, each once; and where diffusers' table takes a name, ours is the same."""
    names, dictionary = kohya_names(name), Dictionary(whole(name))
    found = [dictionary.find(each) for each in names]
    assert len({modules for part, modules in found}) == len(names) or name == "sdxl"
    assert {part: sum(each == part for each, _ in found) for part in whole(name)} == counts
    assert all(len(modules) == 1 for _, modules in found)
    if name == "sd1":
        keys = {f"{each}.lora_down.weight": torch.zeros(4, 1) for each in names}
        keys |= {f"{each}.lora_up.weight": torch.zeros(1, 4) for each in names}
        theirs, _ = _convert_non_diffusers_lora_to_diffusers(dict(keys))
        again = [dictionary.find(module) for module in LoRA.of(theirs).changes]
        assert sorted(again) == sorted(found)


OLD = {  # spellings in the wild of two modules of Stable Diffusion 1.x
    ("unet", "input_blocks.4.1.transformer_blocks.0.attn1.to_q"): (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "lycoris_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
    ("unet", "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0"): (
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0",
        "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.processor.to_out"),
    ("unet", "output_blocks.8.2.conv"): ("lora_unet_up_blocks_2_upsamplers_0_conv",),
    ("unet", "time_embed.2"): ("lora_unet_time_embedding_linear_2", "lora_unet_time_embed_2"),
    ("text", "encoder.layers.3.self_attn.q_proj"): (
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj", "lora_te1_text_model_encoder_layers_3_self_attn_q_proj",
        "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
        "text_encoder.encoder.layers.3.self_attn.q_proj", "text_encoder.text_model.encoder.layers.3.self_attn.to_q",
        "base_model.model.text_model.encoder.layers.3.self_attn.q_proj"),
    ("text", "encoder.layers.3.mlp.fc2"): ("text_encoder.text_model.encoder.layers.3.mlp.fc2",
                                           "lora_te_model_transformer_resblocks_3_mlp_c_proj"),
}


@pytest.mark.parametrize("wanted", OLD, ids=lambda wanted: wanted[1])
def test_old_and_new_spellings_are_one_module(wanted: tuple[str, str]) -> None:
    part, module = wanted
    dictionary = Dictionary(whole("sd1"))
    for name in OLD[wanted]:
        found, modules = dictionary.find(name)
        assert (found, [each.removeprefix("text_model.") for each in modules]) == (part, [module]), name


def test_q_k_and_v_in_one_go_to_their_thirds() -> None:
    """A file for OpenCLIP's own in_proj, whose rows are q, k and v, changes what it says there."""
    model = text_model(True)
    tensors = {f"lora_te2_transformer_resblocks_1_attn_in_proj.{end}": x
               for end, x in factors(nn.Linear(64, 192), 3).items()}
    twin = with_lora(model, LoRA.of(tensors))
    before, after = (to_open_clip({name.removeprefix("text_model."): x for name, x in each.state_dict().items()})
                     for each in (model, twin))
    wide = next(iter(tensors)).removesuffix(".lora_down.weight")
    added = 2 / 3 * tensors[f"{wide}.lora_up.weight"] @ tensors[f"{wide}.lora_down.weight"]
    name = "transformer.resblocks.1.attn.in_proj_weight"
    assert relative(after[name], before[name] + added) < 1e-6
    assert [each for each in before if not torch.equal(before[each], after[each])] == [name]


def test_shapes_that_mean_the_same() -> None:
    """Factors of four dimensions for a linear layer and of two for a 1x1 convolution; four channels into nine."""
    inpainting = randomised(UNet(UNetConfig(9, 4, 32, (1, 2), 1, (1, 1), 24, 2)), 0, 0.1)
    plain = tiny_unet()
    name = "middle_block.1.transformer_blocks.0.attn1.to_q"
    tensors = {f"lora_unet_{name.replace('.', '_')}.{end}": x[..., None, None] if x.ndim else x
               for end, x in factors(inpainting.get_submodule(name), 5).items()}
    tensors |= {f"lora_unet_middle_block_1_proj_in.{end}": x.flatten(1) if x.ndim else x
                for end, x in factors(inpainting.get_submodule("middle_block.1.proj_in"), 6).items()}
    tensors |= {f"lora_unet_conv_in.{end}": x for end, x in factors(plain.get_submodule("input_blocks.0.0"), 7).items()}
    twin, small = (with_lora(unet, LoRA.of(tensors)) for unet in (inpainting, plain))
    for module, before in (("input_blocks.0.0", inpainting), (name, inpainting), ("middle_block.1.proj_in", plain)):
        wide = {inpainting: twin, plain: small}[before]
        added = wide.get_submodule(module).weight - before.get_submodule(module).weight
        short = "conv_in" if module == "input_blocks.0.0" else module.replace(".", "_")
        up, down = (tensors[f"lora_unet_{short}.lora_{end}.weight"].flatten(1) for end in ("up", "down"))
        product = 2 / 3 * (up @ down)
        assert relative(added.flatten(1)[:, :product.shape[1]], product) < 1e-5
        assert not added.flatten(1)[:, product.shape[1]:].any()


def files(**changes: Any) -> dict[str, Tensor]:
    """A small LoRA for tiny_unet, with tensors taken away (None) or put in."""
    tensors = {f"lora_unet_middle_block_1_proj_in.{end}": x
               for end, x in factors(tiny_unet().get_submodule("middle_block.1.proj_in"), 6).items()}
    tensors |= {f"unet.middle_block.1.{end}": x for end, x in changes.items() if x is not None}
    return tensors


def test_what_is_no_lora_is_refused_by_name(tmp_path: Path) -> None:
    good = files()
    first = next(iter(good)).rpartition(".lora_")[0]
    bad: list[tuple[dict[str, Tensor], str]] = [
        ({**good, "wat": torch.ones(1)}, r"unexpected: wat \[1\]"),
        ({key: x for key, x in good.items() if "up" not in key}, f"incomplete: {first} has .* without lora_up"),
        ({**good, f"{first}.lora_up.weight": good[f"{first}.lora_up.weight"] * float("nan")}, "not finite: .*lora_up"),
        ({**good, f"{first}.hada_t1": torch.ones(1)}, "hada_t1 beside lora_up"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3)}, "is no LoRA that is known"),
        ({}, "holds no tensors")]
    for tensors, message in bad:
        with pytest.raises(ValueError, match=message):
            LoRA.of(tensors, "style")
    save_file(bad[0][0], tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"(?s)style\.safetensors is no LoRA that is known.*wat"):
        LoRA.load(tmp_path / "style.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "style.safetensors").read_bytes()[:90])
    with pytest.raises(ValueError, match=r"cut\.safetensors"):
        LoRA.load(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match="no LoRA in the folder"):
        LoRA.load(tmp_path)


def test_what_this_model_has_not_is_named() -> None:
    unet, good = tiny_unet(), files()
    renamed = {key.replace("block_1", "block_7"): x for key, x in good.items()}
    with pytest.raises(ValueError, match="modules that this model has not: lora_unet_middle_block_7_proj_in"):
        with_lora(unet, LoRA.of({**good, **renamed}))
    with pytest.warns(UserWarning, match="in part, this model has no lora_unet_middle_block_7_proj_in"):
        partly = with_lora(unet, LoRA.of({**good, **renamed}), partial=True)
    assert_agree(partly, weights(with_lora(unet, LoRA.of(good))), weights(unet))
    with pytest.raises(ValueError, match="has not"):
        with_lora(unet, LoRA.of(renamed), partial=True)  # nothing would be left
    text = {f"lora_te_text_model_encoder_layers_0_mlp_fc1.{end}": x
            for end, x in factors(nn.Linear(64, 96), 3).items()}
    with pytest.warns(UserWarning, match="without 1 modules of the text encoder"):
        with_lora(unet, LoRA.of({**good, **text}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_lora(unet, (LoRA.of({**good, **text}), {"unet": 1, "text": 0}))
    wide = {key: torch.cat([x, x], 1) if "down" in key else x for key, x in good.items()}
    with pytest.raises(ValueError, match=r"does not fit this model: lora_unet_middle_block_1_proj_in: LoRA of .* for a "
                                         r"weight \[64, 64, 1, 1\]"):
        with_lora(unet, LoRA.of(wide))
    made = {"ss_base_model_version": "sdxl_base_v1-0"}
    with pytest.raises(ValueError, match="it was made for SDXL"):
        with_lora(unet, LoRA.of(renamed, metadata=made))
    with pytest.raises(ValueError, match=r"a bias \[3\] for none"):
        with_lora(unet, LoRA.of({"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.diff_b": torch.ones(3)}))
    for given, error in ((7, TypeError), ([7], TypeError), ([("x.safetensors", "much")], FileNotFoundError)):
        with pytest.raises(error):
            with_lora(unet, given)  # type: ignore[arg-type]


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    tags = {"10_cat": {"cat": 10, " best quality": 4}, "1_dog": {"dog": 7, "cat": 1}}
    header = {"modelspec.trigger_phrase": "ohwx cat", "ss_tag_frequency": json.dumps(tags),
              "modelspec.architecture": "stable-diffusion-v1/lora"}
    bundled = {"bundle_emb.word.emb_params": random(2, 24)}
    save_file({**files(), **bundled}, tmp_path / "cat.safetensors", header)
    lora = LoRA.load(tmp_path / "cat.safetensors")
    assert (lora.name, lora.kinds, lora.ranks, lora.family, lora.trigger) == ("cat", ("LoRA",), (3,), "sd1", "ohwx cat")
    assert lora.tags == ("cat", "dog", "best quality") and list(lora.embeddings) == ["word"]
    assert lora.described() == {"kind": "LoRA", "rank": "3", "base": "sd1", "modules": "1 of the UNet",
                                "trigger words": "ohwx cat", "most frequent tags": "cat, dog, best quality",
                                "embeddings": "word"}
    assert len(lora.sha256) == 64
    for broken in ("{", "[1]", '{"a": 3}', '{"a": {"b": "c"}}'):
        assert LoRA.of(files(), metadata={"ss_tag_frequency": broken}).tags == ()


def test_block_weights() -> None:
    """Every block of Stable Diffusion 1.x is one of kohya's 25, and the lists of A1111 name those with transformers."""
    modules = modules_of(whole("sd1")["unet"])
    places = {place_of(module) for module in modules}
    assert places - {""} == set(LISTS[25]) and {m.split(".")[0] for m in modules if not place_of(m)} == {
        "time_embed", "out"}
    with_attention = {place_of(module) for module in modules if "attn1" in module}
    assert set(LISTS[17]) == {"BASE", *with_attention} and LISTS[17][:2] == ("BASE", "IN01")
    assert set(LISTS[12]) == {"BASE", *(place_of(m) for m in modules_of(whole("sdxl")["unet"]) if "attn1" in m)}
    strength = Strength(0.5, 0.25, "2,0,1,1,1,1,1,3,1,1,1,1,1,1,1,1,4")
    assert [strength.at("unet", f"{m}.x") for m in (
        "input_blocks.1.1", "input_blocks.0.0", "middle_block.1", "output_blocks.11.1", "time_embed.0")] == [
            0, 0.5, 1.5, 2, 0.5]
    assert strength.at("text", "encoder.layers.0") == strength.at("text_2", "x") == 0.5
    named = Strength(blocks={"OUT03": 2, "OUT": 0, "IN": 0.5})
    assert [named.at("unet", m) for m in ("output_blocks.3.1", "output_blocks.4.1", "input_blocks.8.0",
                                          "middle_block.0")] == [2, 0, 0.5, 1]
    for bad in ([1] * 5, "1,2", {"IN77": 1}, {"IN": "a"}, [float("nan")] * 25):
        with pytest.raises(ValueError, match=r"block|number"):
            Strength(blocks=bad)  # type: ignore[arg-type]
    unet = tiny_unet()
    off = with_lora(unet, (LoRA.of(files()), {"blocks": {"MID": 0}}))
    assert off is unet


def test_a_pipeline_of_sdxl_has_two_texts() -> None:
    sd = family("sdxl").ours
    clip: Any = sd.clip
    tensors: dict[str, Tensor] = {}
    for te, model in (("te1", clip.first.model), ("te2", clip.second.model)):
        for i, (name, layer) in enumerate(layers(model)):
            tensors |= {f"lora_{te}_" + f"text_model.{name.removeprefix('text_model.')}".replace(".", "_").replace(
                "text_model_text_projection", "text_projection") + f".{end}": x
                for end, x in factors(layer, i).items()}
    changed: Any = sd.with_lora(LoRA.of(tensors)).clip
    for model, twin in ((clip.first.model, changed.first.model), (clip.second.model, changed.second.model)):
        different = {name for name, x in model.state_dict().items() if not torch.equal(x, twin.state_dict()[name])}
        assert different == {f"{name}.weight" for name, _ in layers(model)}


def test_few_step_presets_are_drawn_as_they_were_distilled() -> None:
    """Their settings are a Request's, and their timesteps diffusers' (LCM's own differ from trailing's by 14 at most).
    """
    schedule = NoiseSchedule.sd15()
    for name, preset in FEW_STEPS.items():
        settings = Request("a fox", **preset.settings)
        sigmas = get_schedule(settings.schedule).sigmas(settings.steps, family("sdxl").ours.denoiser())
        t = schedule.sigma_to_t(sigmas[:-1]).round().int().tolist()
        of: Any = {"lcm": diffusers.LCMScheduler(), "ddim": diffusers.DDIMScheduler(timestep_spacing="trailing"),
              "euler": diffusers.EulerDiscreteScheduler(timestep_spacing="trailing")}[settings.sampler]
        of.set_timesteps(settings.steps)
        assert len(t) == len(of.timesteps) and t[0] == of.timesteps[0] == 999
        assert max(abs(a - int(b)) for a, b in zip(t, of.timesteps)) <= (14 if name.startswith("lcm") else 0)
        assert str(settings.steps) in str(preset.parts["lora"]) or name.startswith("lcm")
        assert isinstance(read(name, "lora"), HubFile)
        with pytest.raises(ValueError, match="has no checkpoint, it has"):
            read(name)
