"""Every kind of system in both layouts, diffusers and transformers as the judge: what they wrote loads here with equal
outputs, and what is saved here loads there bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ella_kd import Pipeline
from ella_kd.models import Checkpoint, EDMSchedule, NoiseSchedule, load_checkpoint
from ella_kd.models.context import Context
from ella_kd.models.files.names import ema_name
from ella_kd.models.files.report import report
from ella_kd.models.files.saving import save
from systems import RECIPES, System, system

IDS = torch.tensor([[97, 5, 17, 42, 98, 98, 98]])
ASKED: dict[str, Any] = {"sd1": "eps", "sd2": "eps", "sd2 v": "v"}  # where a single file says nothing


@pytest.fixture(scope="module", params=RECIPES)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, System, Path, Path]:
    """A kind, diffusers' networks, and the two layouts."""
    kind, folder = request.param, tmp_path_factory.mktemp("system")
    made = system(kind)
    scheduler = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5} if kind == "playground" else {
        "rescale_betas_zero_snr": "ztsnr" in made.recipe.markers}
    vae: Any = made.vae
    if kind == "playground":
        vae.register_to_config(latents_mean=[-1.6574, 1.886, -1.383, 2.5155],
                               latents_std=[8.4927, 5.9022, 6.5498, 5.2299])
    return kind, made, made.save_file(folder / "x.safetensors"), made.save_folder(folder / "folder", **scheduler)


def prediction(kind: str) -> Any:
    return ASKED.get(kind, None if RECIPES[kind].markers else "v" if RECIPES[kind].prediction[0] == "v" else "eps")


def inputs(made: System) -> tuple[Tensor, Context, dict[str, Any]]:
    """x, what ours sees and what diffusers' sees."""
    generator = torch.Generator().manual_seed(7)
    config: Any = made.unet.config
    x = torch.randn(2, config.in_channels, 8, 8, generator=generator)
    tokens = torch.randn(2, 5, config.cross_attention_dim, generator=generator)
    if config.num_class_embeds:
        label = torch.tensor([3, 8])
        return x, Context(tokens, label=label), {"class_labels": label}
    if config.time_cond_proj_dim:
        scale = torch.tensor([4.0, 8.0])
        pipe: Any = LatentConsistencyModelPipeline
        told = pipe.get_guidance_scale_embedding(None, scale - 1, config.time_cond_proj_dim)
        return x, Context(tokens, guidance=scale), {"timestep_cond": told}
    if not config.addition_embed_type:
        return x, Context(tokens), {}
    vector = torch.randn(2, 64, generator=generator)
    numbers = (config.projection_class_embeddings_input_dim - 64) // 256
    told = torch.tensor([[64.0, 64, 0, 8, 64, 64], [48.0, 64, 0, 0, 64, 64]])
    added = {"text_embeds": vector, "time_ids": told if numbers == 6 else torch.cat([told[:, :4], told[:, :1]], 1)}
    score = None if numbers == 6 else told[:, 0]
    return x, Context(tokens, vector=vector, sizes=told, score=score), {"added_cond_kwargs": added}


@torch.no_grad()
def agrees(loaded: Checkpoint, made: System) -> None:
    x, seen, told = inputs(made)
    t = torch.tensor([900.0, 33.0])
    want = made.unet(x, t, seen.tokens, **told).sample
    torch.testing.assert_close(loaded.unet(x, t, seen), want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))
    picture, vae = torch.randn(1, 3, 16, 16), made.vae
    scale: Any = vae.config
    mean, std = (None if getattr(scale, name) is None else torch.tensor(getattr(scale, name)).view(1, 4, 1, 1)
                 for name in ("latents_mean", "latents_std"))
    z = vae.encode(picture).latent_dist.mean
    z = z * scale.scaling_factor if mean is None or std is None else (z - mean) * scale.scaling_factor / std
    torch.testing.assert_close(loaded.vae.encode(picture), z, rtol=2e-5, atol=2e-5)
    back = z / scale.scaling_factor if mean is None or std is None else z * std / scale.scaling_factor + mean
    torch.testing.assert_close(loaded.vae.decode(z), vae.decode(back).sample, rtol=2e-5, atol=2e-5)
    models = [loaded.text_model, loaded.text_model_2][:len(made.texts)]
    for ours, theirs in zip(models, made.texts, strict=True):
        assert ours is not None
        got, hoped = (model(IDS, output_hidden_states=True) for model in (ours, theirs))
        for a, b in zip(got.hidden_states, hoped.hidden_states, strict=True):
            assert torch.equal(a, b)
        if "text_embeds" in hoped:
            assert torch.equal(got.text_embeds, hoped.text_embeds)


def test_both_layouts_load_with_equal_outputs(files: tuple[str, System, Path, Path]) -> None:
    kind, made, file, folder = files
    for loaded in (load_checkpoint(file, prediction=prediction(kind)), load_checkpoint(folder)):
        agrees(loaded, made)
        schedule = loaded.noise_schedule
        if kind == "playground":
            assert schedule == EDMSchedule()
            continue
        assert isinstance(schedule, NoiseSchedule)
        assert schedule.prediction == ("v" if made.recipe.prediction == "v_prediction" else "eps")
        assert schedule.consistency == (kind == "lcm")
        assert (schedule.sigma_max > 4000) == ("ztsnr" in made.recipe.markers)


def same_tensors(a: Any, b: Any) -> bool:
    one, two = ({name.removeprefix("text_model."): x for name, x in each.state_dict().items()} for each in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_saved_is_read_by_diffusers_bit_for_bit(files: tuple[str, System, Path, Path], tmp_path: Path) -> None:
    kind, made, file, _ = files
    loaded = load_checkpoint(file, prediction=prediction(kind))
    save(tmp_path / "folder", loaded)
    save(tmp_path / "x.safetensors", loaded)
    unet: Any = UNet2DConditionModel.from_pretrained(tmp_path / "folder" / "unet")
    assert same_tensors(unet, made.unet)
    x, seen, told = inputs(made)
    with torch.no_grad():
        want = made.unet(x, torch.tensor([900.0, 33.0]), seen.tokens, **told).sample
        got = unet(x, torch.tensor([900.0, 33.0]), seen.tokens, **told).sample
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    vae: Any = AutoencoderKL.from_pretrained(tmp_path / "folder" / "vae")
    ours: Any = made.vae.config
    assert same_tensors(vae, made.vae) and vae.config.scaling_factor == ours.scaling_factor
    names = ["text_encoder_2"] if kind == "refiner" else ["text_encoder", "text_encoder_2"]
    for name, theirs in zip(names, made.texts):
        reader = CLIPTextModelWithProjection if hasattr(theirs, "text_projection") else CLIPTextModel
        assert same_tensors(reader.from_pretrained(tmp_path / "folder" / name), theirs)
    config: Any = {"config": str(tmp_path / "folder"), "local_files_only": True}
    if kind != "lcm":  # whose guidance embedding diffusers' single-file reader does not know
        assert same_tensors(UNet2DConditionModel.from_single_file(
            str(tmp_path / "x.safetensors"), subfolder="unet", **config), made.unet)
    assert same_tensors(AutoencoderKL.from_single_file(
        str(tmp_path / "x.safetensors"), subfolder="vae", **config), made.vae)
    for again in (load_checkpoint(tmp_path / "folder"), load_checkpoint(tmp_path / "x.safetensors")):
        assert again.noise_schedule.prediction == loaded.noise_schedule.prediction
        assert torch.equal(again.noise_schedule.sigmas, loaded.noise_schedule.sigmas)
        assert (again.unet.config, again.vae.config) == (loaded.unet.config, loaded.vae.config)
        assert again.kind == loaded.kind
        for mine, before in ((again.unet, loaded.unet), (again.vae, loaded.vae)):
            assert same_tensors(mine, before)
        for text, was in ((again.text_model, loaded.text_model), (again.text_model_2, loaded.text_model_2)):
            assert text is was is None or same_tensors(text, was)
    saved, original = load_file(tmp_path / "x.safetensors"), load_file(file)
    assert original.keys() - saved.keys() == set()
    assert all(torch.equal(saved[name].flatten(), original[name].flatten()) for name in original)


def test_variants_shards_and_pickles_of_a_folder(tmp_path: Path) -> None:
    made = system("sd1")
    folder = made.save_folder(tmp_path / "folder")
    want = load_checkpoint(folder)
    unet: Any = made.unet
    for place in (folder / "unet").glob("*.safetensors"):
        place.unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="300KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 2
    assert same_tensors(load_checkpoint(folder).unet, want.unet)
    unet.save_pretrained(folder / "unet", max_shard_size="300KB", variant="fp16")
    with pytest.raises(FileNotFoundError, match=r"no weights of the variant 'fp16' in the folder .*vae"):
        load_checkpoint(folder, variant="fp16")
    first = next(iter(sorted((folder / "unet").glob("diffusion_pytorch_model-00001-of-*"))))
    first.rename(first.with_suffix(".gone"))
    with pytest.raises(FileNotFoundError, match=rf"names \d+ files, and {first.name} is missing"):
        load_checkpoint(folder)


def test_a_legacy_variant_of_shards_and_a_pickle(tmp_path: Path) -> None:
    made = system("sd1")
    folder = made.save_folder(tmp_path / "folder")
    whole = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    halves = [dict(list(whole.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves, 1):
        save_file(half, folder / "unet" / f"diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors")
    index = {name: f"diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors"
             for i, half in enumerate(halves, 1) for name in half}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(
        str({"metadata": {}, "weight_map": index}).replace("'", '"'))
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(vae, folder / "vae" / "diffusion_pytorch_model.bin")
    agrees(load_checkpoint(folder), made)


def test_parts_come_from_files_of_their_own(tmp_path: Path) -> None:
    made = system("sd1")
    other = system("sd1", seed=9)
    folder = made.save_folder(tmp_path / "folder")
    tensors = made.ldm()
    bare = {name.removeprefix("first_stage_model."): x for name, x in other.ldm().items()
            if name.startswith("first_stage_model.")}
    save_file({name: x.clone() for name, x in (bare | {"loss.logvar": torch.zeros(1)}).items()},
              tmp_path / "vae.safetensors")
    save_file({name: x.clone() for name, x in tensors.items() if name.startswith("model.")},
              tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"the UNet of a Stable Diffusion 1.x checkpoint alone: give an autoencoder"):
        load_checkpoint(tmp_path / "unet.safetensors")
    loaded = load_checkpoint(tmp_path / "unet.safetensors", vae=tmp_path / "vae.safetensors", prediction="eps",
                             text_encoder=folder / "text_encoder")
    agrees(loaded, System(made.recipe, made.unet, other.vae, made.texts))
    mixed = load_checkpoint(folder, vae=other.save_folder(tmp_path / "other") / "vae")
    agrees(mixed, System(made.recipe, made.unet, other.vae, made.texts))
    assert load_checkpoint(folder / "unet", vae=folder / "vae").text_model is None
    with pytest.raises(ValueError, match=r"is not the autoencoder that was asked for, it looks like the UNet of"):
        load_checkpoint(folder, vae=tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"it looks like an autoencoder .* its place is vae"):
        load_checkpoint(tmp_path / "vae.safetensors")


def test_moving_averages_are_a_choice(tmp_path: Path) -> None:
    made, prefix = system("sd1"), "model.diffusion_model."
    averaged = system("sd1", seed=5)
    tensors = made.ldm()
    tensors |= {ema_name(name.removeprefix(prefix)): x for name, x in averaged.ldm().items() if name.startswith(prefix)}
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    save_file({name: x.clone() for name, x in tensors.items()}, tmp_path / "both.safetensors")
    agrees(load_checkpoint(tmp_path / "both.safetensors", prediction="eps"), made)
    agrees(load_checkpoint(tmp_path / "both.safetensors", prediction="eps", ema=True),
           System(made.recipe, averaged.unet, made.vae, made.texts))
    with pytest.raises(ValueError, match=r"holds no moving averages of its weights \(EMA\)"):
        load_checkpoint(made.save_file(tmp_path / "one.safetensors"), ema=True)


def test_the_768_px_of_stable_diffusion_2_are_known_everywhere(tmp_path: Path) -> None:
    path = system("sd2 v").save_file(tmp_path / "x.safetensors", {"modelspec.prediction_type": "v"})
    assert Pipeline.load(path).size == 768 and report(path).resolution == "usually 768x768"
    save(tmp_path / "folder", load_checkpoint(path))
    assert Pipeline.load(tmp_path / "folder").size == 768
    assert Pipeline.load(path, prediction="eps").size == 512
