"""What a model predicts and the noise levels it was trained on, and how that is known.

No shape tells. In this order: an argument; marker tensors; the file's metadata; a configuration beside the file; a rule
about one tensor; a guess, which is told as one.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ella_kd.models.files import presets
from ella_kd.models.files.kinds import FAMILIES, Kind
from ella_kd.models.files.layout import TABLE, Part, json_in
from ella_kd.models.files.weights import Weights
from ella_kd.models.noise_schedule import EDMSchedule, NoiseSchedule, PredictionType

PREDICTION, PREDICT_KEY = "modelspec.prediction_type", "modelspec.predict_key"  # ModelSpec's name, ComfyUI's
SAID: dict[str, PredictionType] = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v"}
# What the presence of a tensor says, the first that is there (layout.MARKERS).
PREDICTS = {"edm_mean": "edm", "edm_vpred.sigma_max": "v", "v_pred": "v", "ztsnr": "v"}
# diffusers' schedulers that predict epsilon unless they say another.
DISCRETE = re.compile("EDM|PNDM|DDIM|DDPM|LMS|Euler|DPM|UniPC|Heun|KDPM2|DEIS|LCM|TCD")
BASE_2_STEPS = 875000  # of training, after which Stable Diffusion 2's 512 px model was published (diffusers' rule)
V_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"  # spread above .09: a 2.x of 768 px (ComfyUI's rule)


@dataclass(frozen=True)
class Known:
    """What the network returns, "eps", "v" or "edm", and how that is known; guess: it is not."""

    prediction: str
    how: str
    guess: bool = False


def known_prediction(path: Path, weights: Weights, unet: Part, family: str, purpose: str,
                     argument: PredictionType | None = None, scheduler: Mapping[str, Any] | None = None) -> Known:
    """What a model predicts. Raises ValueError for a file that says what nobody knows."""
    if argument is not None:
        if argument not in ("eps", "v"):
            raise ValueError(f'prediction must be "eps" or "v", got {argument!r}')
        if argument == "eps" and "edm_vpred.sigma_max" in weights:
            raise ValueError(f"{path} has the tensor edm_vpred.sigma_max, noise levels of a model that predicts v: "
                             'prediction="eps" cannot be')
        return Known(argument, "as asked")
    config = scheduler_config(path) if scheduler is None else scheduler
    return next(_told(path, weights, unet, family, purpose, config))


def _told(path: Path, weights: Weights, unet: Part, family: str, purpose: str,
          scheduler: Mapping[str, Any]) -> Iterator[Known]:
    marker = next((name for name in PREDICTS if name in weights), None)
    for key in (PREDICTION, PREDICT_KEY):
        if said := weights.metadata.get(key):
            if said not in SAID:
                raise ValueError(f'{path} says {key} = {said!r}, known are "epsilon" and "v": pass prediction="eps" or '
                                 '"v"')
            if marker is None or SAID[said] == PREDICTS[marker]:
                yield Known(SAID[said], f"the file's metadata {key}")
            else:  # metadata outlives a merge or a training, a marker is put there on purpose
                warnings.warn(f"{path.name} says {key} = {said!r}, and its tensor {marker} says {PREDICTS[marker]}, "
                              "which holds; prediction=... (--prediction) says otherwise", stacklevel=1)
                yield Known(PREDICTS[marker], f"the file's tensor {marker}")
    if marker is not None:
        yield Known(PREDICTS[marker], f"the file's tensor {marker}")
    name = str(scheduler.get("_class_name"))
    if "FlowMatch" in name:
        raise ValueError(f"{path}: its scheduler is a {name}, and flow matching is not read: expected a model that "
                         "predicts eps or v")
    if said := scheduler.get("prediction_type", "epsilon" if DISCRETE.match(name) else None):
        if name.startswith("EDM"):
            yield Known("edm" if said == "epsilon" else "v", "scheduler_config.json")
        if said not in SAID:
            raise ValueError(f"{path}: scheduler_config.json says prediction_type = {said!r}, known are epsilon and "
                             'v_prediction: pass prediction="eps" or "v"')
        yield Known(SAID[said], "scheduler_config.json")
    yaml = path.with_suffix(".yaml")
    if yaml.is_file() and yaml != path and (said := _in_yaml(yaml)):
        yield Known(said, f"{yaml.name} beside it")
    if (published := presets.file_at(path)) and published.prediction:
        yield Known(published.prediction, f"its sha256 is that of {published}")
    if family == "sd2":
        yield from _second(weights, unet, purpose)
    if family == "playground":
        yield Known("edm", "the network's family")
    yield Known("eps", f"a guess: most of {FAMILIES[family]} do", guess=True)


def _in_yaml(yaml: Path) -> str | None:
    """What LDM's or sgm's configuration says; one that names neither a prediction nor LDM's classes says nothing."""
    text = yaml.read_text("utf-8", "replace")
    if found := re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE):
        if found[1] not in SAID:
            raise ValueError(f"{yaml} says parameterization: {found[1]}, known are eps and v: pass "
                             'prediction="eps" or "v"')
        return SAID[found[1]]
    if found := re.search(r"^\s*target:\s*[\"']?[\w.]*\.(V|Eps|EDM)Scaling\b", text, re.MULTILINE):
        return found[1].lower()
    return "eps" if re.search(r"^\s*target:\s*[\"']?ldm\.", text, re.MULTILINE) else None


def _second(weights: Weights, unet: Part, purpose: str) -> Iterator[Known]:
    """Stable Diffusion 2.x, of which the 768 px models and the x4 upscaler predict v."""
    if purpose == "x4 upscaler":
        yield Known("v", "an x4 upscaler does")
    if purpose:
        yield Known("eps", f"Stable Diffusion 2.x for {purpose} does")
    if weights.metadata.get("global_step") == str(BASE_2_STEPS):
        yield Known("eps", f"its training ended at step {BASE_2_STEPS}")
    if V_BIAS in unet.sources:
        spread = float(unet.read(V_BIAS).float().std(correction=0))
        yield Known("v" if spread > 0.09 else "eps", f"a guess by the spread of {V_BIAS}, {spread:.3f} (v is above "
                    ".09)", guess=True)


def warn_of_guess(known: Known, path: Path) -> None:
    if known.guess:
        other = "eps" if known.prediction == "v" else "v"
        warnings.warn(f"nothing says whether {path.name} predicts eps or v: {known.prediction} is {known.how}. If "
                      f'pictures are noise or flat, give prediction="{other}" (--prediction {other})', stacklevel=1)


def noise_schedule(path: Path, weights: Weights, known: Known, kind: Kind,
                   scheduler: Mapping[str, Any] | None = None) -> NoiseSchedule | EDMSchedule:
    """The noise levels. Raises ValueError for a table or a configuration that cannot be used, naming the file."""
    scheduler = scheduler_config(path) if scheduler is None else scheduler
    try:
        if known.prediction == "edm":
            low, high, data = (float(scheduler.get(name, usual)) for name, usual in (
                ("sigma_min", 0.002), ("sigma_max", 80.0), ("sigma_data", 0.5)))
            return EDMSchedule(low, high, data)
        prediction: PredictionType = "v" if known.prediction == "v" else "eps"
        if "edm_vpred.sigma_max" in weights:
            low, high = (_number(weights, f"edm_vpred.sigma_{end}", usual)
                         for end, usual in (("min", 0.002), ("max", 120.0)))
            return EDMSchedule(low, high, 1.0, prediction="v")
        if "EDM" in str(scheduler.get("_class_name")) and prediction == "v":
            low, high, data = (float(scheduler.get(name, usual)) for name, usual in (
                ("sigma_min", 0.002), ("sigma_max", 120.0), ("sigma_data", 1.0)))
            return EDMSchedule(low, high, data, prediction="v")
        schedule = (_table(weights[TABLE], prediction) if TABLE in weights
                    else _of_config(scheduler, prediction))
        zero = "ztsnr" in weights or scheduler.get("rescale_betas_zero_snr") is True
        if zero and float(schedule.alphas_cumprod[-1]) > 1e-6:  # else it is so already
            schedule = schedule.zero_terminal_snr()
        return replace(schedule, consistency=True) if kind.purpose == "LCM" else schedule
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} has a noise schedule of its own that cannot be used: {error}") from error


def scheduler_config(path: Path) -> dict[str, Any]:
    """The scheduler's configuration in a diffusers folder, or beside a file; {} without one."""
    folder = path if path.is_dir() else path.parent
    places = [folder / "scheduler_config.json"]
    if path.is_dir():  # its own, or beside the folder of a UNet alone
        places += [each / "scheduler" / "scheduler_config.json" for each in (folder, folder.parent)]
    return next((json_in(place) for place in places if place.is_file()), {})


def _of_config(config: Mapping[str, Any], prediction: PredictionType) -> NoiseSchedule:
    start, end = float(config.get("beta_start", 0.00085)), float(config.get("beta_end", 0.012))
    n, kind = int(config.get("num_train_timesteps", 1000)), config.get("beta_schedule", "scaled_linear")
    if not 2 <= n <= 100_000:
        raise ValueError(f"num_train_timesteps is {n}")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        return NoiseSchedule((1 - betas).cumprod(0), prediction)
    if kind == "scaled_linear":
        return NoiseSchedule.scaled_linear(start, end, n, prediction)
    if kind == "linear":
        return NoiseSchedule.linear(start, end, n, prediction)
    raise ValueError(f"beta_schedule {kind!r} is not known, expected scaled_linear, linear or trained_betas")


def _table(table: Tensor, prediction: PredictionType) -> NoiseSchedule:
    """The file's own schedule, if it differs from Stable Diffusion's, with zero terminal SNR or without, by more than
    rounding.

    Files carry the table in fp32, pruned ones in fp16, where sigma_min is off by 15 %, or in bf16, where neighbours are
    equal: the exact one replaces all three, also where they were stored in a wider dtype later.
    """
    exact = table.double()
    rounded = [kind for kind in (torch.bfloat16, torch.float16) if torch.equal(exact.to(kind).double(), exact)]
    rounding = torch.finfo(rounded[0]).eps if rounded else 0.0
    for usual in (NoiseSchedule.sd15(prediction), NoiseSchedule.sd15(prediction).zero_terminal_snr()):
        known = usual.alphas_cumprod
        # log sigma to 1e-3; 6e-8 because a zero terminal SNR's last is 0, or any tiny number
        near = 2e-3 * known * (1 - known) + rounding * known + 6e-8
        if exact.shape == known.shape and bool(((exact - known).abs() <= near).all()):
            return usual
    try:
        return NoiseSchedule(exact, prediction)
    except ValueError as error:
        why = f" ({str(rounded[0]).removeprefix('torch.')} is coarse: give the table in float32)" if rounded else ""
        raise ValueError(f"{error}{why}") from error


def _number(weights: Weights, name: str, usual: float) -> float:
    """A marker's value, where it has one."""
    if name not in weights or weights[name].numel() != 1:
        return usual
    value = float(weights[name])
    return value if math.isfinite(value) else usual
