"""Reading and writing weights: Stable Diffusion's single files (LDM layout) and ELLA's connector.

The architecture is read off the tensors' shapes, and every tensor must be there, once, with its shape.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ella_kd.models.devices import check_device, check_dtype
from ella_kd.models.kinds import CHECKPOINT, CONNECTOR, hint
from ella_kd.models.noise_schedule import NoiseSchedule, PredictionType
from ella_kd.models.shapes import Shapes, count_of, shape_of
from ella_kd.models.tensors import check_weights, read_tensors, write_tensors
from ella_kd.models.text import CLIPTextEncoder
from ella_kd.models.tokenizers import check_vocabulary, load_tokenizer
from ella_kd.models.tsc import TSC
from ella_kd.models.unet import UNet, UNetConfig
from ella_kd.models.vae import AutoencoderKL, VAEConfig

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase

Shape = Sequence[int]
Model = TypeVar("Model", bound=nn.Module)

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
# What training left in LDM files beside the networks; alphas_cumprod is read, the rest of the schedule follows from it.
IGNORED_PREFIXES = ("model_ema.", VAE + "loss.", "posterior_", "sqrt_")
IGNORED = {"betas", "alphas_cumprod", "alphas_cumprod_prev", "log_one_minus_alphas_cumprod", "logvar", "lvlb_weights",
           "scale_factor", CLIP + "embeddings.position_ids"}
PREDICTION = "modelspec.prediction_type"  # the ModelSpec name of this fact: "epsilon" or "v"
CONFIG = "ella_kd"  # JSON: what the shapes do not say


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The networks of one Stable Diffusion file, in eval mode and without gradients."""

    unet: UNet
    vae: AutoencoderKL
    text_model: "CLIPTextModel" = field(repr=False)
    noise_schedule: NoiseSchedule
    clip_tokenizer: "PreTrainedTokenizerBase | None" = field(default=None, repr=False)

    @property
    def text_encoder(self) -> CLIPTextEncoder:
        """CLIP, ready for prompts. Raises ValueError if the file was loaded without a tokenizer, which it lacks."""
        if self.clip_tokenizer is None:
            raise ValueError("an LDM checkpoint holds no tokenizer: pass clip_tokenizer=<folder> to load_checkpoint, "
                             "such as the tokenizer folder of stable-diffusion-v1-5 (ELLA alone needs no CLIP)")
        return CLIPTextEncoder(self.text_model, self.clip_tokenizer)


def load_checkpoint(path: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu",
                    clip_tokenizer: str | Path | None = None, prediction: PredictionType | None = None) -> Checkpoint:
    """Read a Stable Diffusion 1.x single file (`model.diffusion_model.*`, `first_stage_model.*`, `cond_stage_model.*`).

    dtype None: fp32 on a CPU, fp16 elsewhere, whatever the file holds. clip_tokenizer: a tokenizer folder.
    prediction: what the network returns, "eps" or "v"; None: as the file's metadata says, else "eps".
    Raises FileNotFoundError, or ValueError naming the first tensors that are missing, extra, misshapen or no floats,
    and saying what the file looks like if it is another kind.
    """
    device = check_device(device)
    dtype = check_dtype(dtype, device)
    tokenizer = None if clip_tokenizer is None else load_tokenizer(clip_tokenizer, "CLIP")
    tensors, metadata = read_tensors(path)
    config = _config(metadata, path)
    table = tensors.get("alphas_cumprod")
    schedule = _noise_schedule(table, prediction or _prediction(metadata, path), path)
    groups, extra = _split(tensors, path)
    told = f"{path} is not what this loads{hint(tensors, CHECKPOINT)}"
    heads = {key: config[key] for key in ("num_heads", "head_dim") if key in config}
    with torch.device("meta"):
        unet = _build(lambda shapes: UNet(UNetConfig.from_shapes(shapes, **heads)), groups[UNET], UNET, told)
        vae = _build(lambda shapes: AutoencoderKL(VAEConfig.from_shapes(shapes, config.get("scale", VAEConfig.scale))),
                     groups[VAE], VAE, told)
        text_model = _build(_clip, groups[CLIP], CLIP, told)
    clip_names = {_plain(name): name for name in text_model.state_dict()}
    expected = {prefix + _plain(name): x.shape for prefix, model in ((UNET, unet), (VAE, vae), (CLIP, text_model))
                for name, x in model.state_dict().items()}
    _refuse(expected, {prefix + name: x.shape for prefix in groups for name, x in groups[prefix].items()} | extra, told)
    for prefix, group in groups.items():
        check_weights({prefix + name: x for name, x in group.items()}, path)
    if tokenizer is not None:
        check_vocabulary(tokenizer, text_model.config.vocab_size, "CLIP", clip_tokenizer)

    _assign(unet, groups[UNET], dtype, device)
    _assign(vae, groups[VAE], dtype, device)
    _assign(text_model, {clip_names[name]: x for name, x in groups[CLIP].items()}, dtype, device)
    for module in text_model.modules():
        if hasattr(module, "position_ids"):  # a buffer that no file needs to hold, so it is still on meta
            module.position_ids = torch.arange(text_model.config.max_position_embeddings, device=device)[None]
    return Checkpoint(unet, vae, text_model, schedule, tokenizer)


def save_checkpoint(path: str | Path, unet: UNet, vae: AutoencoderKL, text_model: "CLIPTextModel",
                    metadata: Mapping[str, str] | None = None, *, noise_schedule: NoiseSchedule | None = None,
                    dtype: torch.dtype | None = None) -> None:
    """Write a Stable Diffusion 1.x single file as `load_checkpoint` reads it; what shapes do not say is metadata.

    dtype None: the parameters' own. The file appears whole or not at all.
    """
    schedule = noise_schedule or NoiseSchedule.sd15()
    tensors = {UNET + name: x for name, x in unet.state_dict().items()}
    tensors |= {VAE + name: x for name, x in vae.state_dict().items()}
    tensors |= {CLIP + _plain(name): x for name, x in text_model.state_dict().items()
                if not name.endswith("position_ids")}
    if dtype is not None:
        tensors = {name: x.to(dtype) for name, x in tensors.items()}
    tensors["alphas_cumprod"] = schedule.alphas_cumprod.float()
    config = {"num_heads": unet.config.num_heads, "head_dim": unet.config.head_dim, "scale": vae.config.scale}
    write_tensors(path, tensors, {PREDICTION: "epsilon" if schedule.prediction == "eps" else "v",
                                  CONFIG: json.dumps(config), **(metadata or {})})


def load_tsc(path: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu") -> TSC:
    """Read a connector, such as `ella-sd1.5-tsc-t5xl.safetensors`, in eval mode and without gradients.

    dtype None: fp32 on a CPU, fp16 elsewhere. The heads are not in the shapes: the file's metadata, else 8.
    Raises FileNotFoundError, or ValueError naming the first tensors that are missing, extra, misshapen or no floats,
    and saying what the file looks like if it is another kind.
    """
    device = check_device(device)
    dtype = check_dtype(dtype, device)
    tensors, metadata = read_tensors(path)
    heads = _config(metadata, path).get("heads", 8)
    told = f"{path} is not what this loads{hint(tensors, CONNECTOR)}"
    with torch.device("meta"):
        tsc = _build(lambda shapes: TSC(**TSC.arguments_from_shapes(shapes), heads=heads), tensors, "", told)
    _refuse({name: x.shape for name, x in tsc.state_dict().items()}, _shapes(tensors), told)
    check_weights(tensors, path)
    _assign(tsc, tensors, dtype, device)
    return tsc


def save_tsc(path: str | Path, tsc: TSC, metadata: Mapping[str, str] | None = None, *,
             dtype: torch.dtype | None = None) -> None:
    """Write a connector as `load_tsc` reads it. The file appears whole or not at all."""
    tensors = {name: x if dtype is None else x.to(dtype) for name, x in tsc.state_dict().items()}
    write_tensors(path, tensors, {CONFIG: json.dumps({"heads": tsc.heads}), **(metadata or {})})


def _split(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Shape]]:
    """The tensors of each network, named below its prefix, and the shapes of those that belong to none.

    CLIP's names come with `text_model.` (the published files) and without (written by some versions of transformers).
    """
    groups: dict[str, dict[str, Tensor]] = {UNET: {}, VAE: {}, CLIP: {}}
    extra: dict[str, Shape] = {}
    bare = CLIP.removesuffix("text_model.")
    for given, x in tensors.items():
        name = CLIP + _plain(given.removeprefix(bare)) if given.startswith(bare) else given
        if name in IGNORED or name.startswith(IGNORED_PREFIXES):
            continue
        prefix = next((prefix for prefix in groups if name.startswith(prefix)), None)
        if prefix is None:
            extra[name] = x.shape
        elif name.removeprefix(prefix) in groups[prefix]:
            raise ValueError(f"{path} holds {name} twice, with and without text_model.")
        else:
            groups[prefix][name.removeprefix(prefix)] = x
    return groups, extra


def _build(make: Callable[[Shapes], Model], tensors: Mapping[str, Tensor], prefix: str, told: str) -> Model:
    try:
        return make(_shapes(tensors))
    except ValueError as error:
        raise ValueError(f"{told}, at {prefix or 'the top'}: {error}") from error


def _clip(shapes: Shapes) -> "CLIPTextModel":
    """A CLIP text model of these shapes, with heads of 64 channels and quick_gelu, as in Stable Diffusion 1.x."""
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary, width = shape_of(shapes, "embeddings.token_embedding.weight", 2)
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, projection_dim=width, num_attention_heads=max(width // 64, 1),
        intermediate_size=shape_of(shapes, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=count_of(shapes, "encoder.layers"),
        max_position_embeddings=shape_of(shapes, "embeddings.position_embedding.weight", 2)[0],
        hidden_act="quick_gelu", bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=0))


def _plain(name: str) -> str:
    """A CLIP tensor's name without the `text_model.` that transformers before 5 puts first."""
    return name.removeprefix("text_model.")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: x.shape for name, x in tensors.items()}


def _refuse(expected: Shapes, got: Shapes, told: str) -> None:
    """Raise ValueError naming the first tensors that do not agree."""
    problems = [f"missing: {name} {list(expected[name])}" for name in expected if name not in got]
    problems += [f"misshapen: {name} is {list(got[name])}, must be {list(expected[name])}"
                 for name in expected if name in got and tuple(got[name]) != tuple(expected[name])]
    problems += [f"unexpected: {name} {list(got[name])}" for name in got if name not in expected]
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{told}:\n  " + "\n  ".join(problems[:5]) + more)


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    model.load_state_dict({name: x.to(device, dtype) for name, x in tensors.items()}, assign=True)
    model.eval().requires_grad_(False)


def _config(metadata: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    """What the shapes do not say, without what is null."""
    try:
        config = json.loads(metadata.get(CONFIG, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the metadata {CONFIG!r} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the metadata {CONFIG!r} must be a JSON object, got {config!r:.200}")
    config = {key: value for key, value in config.items() if value is not None}
    for key in {"num_heads", "head_dim", "heads"} & config.keys():  # 2.0 is 2 to einops' cache: later a 2 fails too
        if type(config[key]) is not int or config[key] < 1:
            raise ValueError(f"{path}: {key} in the metadata {CONFIG!r} must be a whole number of at least 1, got "
                             f"{config[key]!r}")
    if "scale" in config and not (type(config["scale"]) in (int, float) and 0 < config["scale"] < math.inf):
        raise ValueError(f"{path}: scale in the metadata {CONFIG!r} must be a number above 0, got {config['scale']!r}")
    return config


def _prediction(metadata: Mapping[str, str], path: str | Path) -> PredictionType:
    said = metadata.get(PREDICTION, "epsilon")
    if said == "epsilon":
        return "eps"
    if said == "v":
        return "v"
    raise ValueError(f'{path} says {PREDICTION} = {said!r}, known are "epsilon" and "v": pass prediction="eps" or "v"')


def _noise_schedule(table: Tensor | None, prediction: PredictionType, path: str | Path) -> NoiseSchedule:
    """The file's own schedule, if it differs from Stable Diffusion's by more than rounding.

    Files carry the table in fp32, pruned ones in fp16, where sigma_min is off by 15 %, or in bf16, where neighbours are
    equal: the exact one replaces all three, also where they were stored in a wider dtype later.
    """
    usual = NoiseSchedule.sd15(prediction)
    if table is None:
        return usual
    exact = table.double()
    rounded = [kind for kind in (torch.bfloat16, torch.float16) if torch.equal(exact.to(kind).double(), exact)]
    tolerance = torch.finfo(rounded[0]).eps if rounded else 0.0
    if exact.shape == usual.alphas_cumprod.shape and torch.allclose(exact, usual.alphas_cumprod, tolerance, 1e-3):
        return usual
    try:
        return NoiseSchedule(exact, prediction)
    except ValueError as error:
        why = f" (in {str(rounded[0]).removeprefix('torch.')}, which is coarse: give it in float32)" if rounded else ""
        raise ValueError(f"{path} has a noise schedule of its own that cannot be used{why}: {error}") from error
