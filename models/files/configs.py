"""diffusers' configurations of our networks: what config.json, scheduler_config.json and model_index.json say."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ella_kd.models.files.kinds import Kind
from ella_kd.models.noise_schedule import EDMSchedule, NoiseSchedule
from ella_kd.models.unet import UNetConfig
from ella_kd.models.vae import VAEConfig

VERSION = "0.30.0"  # of diffusers, the oldest that these are for
PIPELINES = {"inpainting": "StableDiffusionInpaintPipeline",
             "InstructPix2Pix": "StableDiffusionInstructPix2PixPipeline", "depth": "StableDiffusionDepth2ImgPipeline",
             "x4 upscaler": "StableDiffusionUpscalePipeline", "LCM": "LatentConsistencyModelPipeline"}
XL = ("sdxl", "ssd-1b", "vega", "playground")


def unet_config(config: UNetConfig, kind: Kind, side: int) -> dict[str, Any]:
    """UNet2DConditionModel's; side: of the latents it was trained on. Raises ValueError for what it cannot be."""
    widths = [mult * config.model_channels for mult in config.channel_mult]
    down, up = config.depths
    attended = [any(each) for each in down]
    heads: Any = config.num_heads or [width // (config.head_dim or width) for width in widths]
    found: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": VERSION, "in_channels": config.in_channels,
        "out_channels": config.out_channels, "block_out_channels": widths, "layers_per_block": config.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attended)],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if config.middle_depth else "UNetMidBlock2D",
        "cross_attention_dim": config.context_dim, "attention_head_dim": heads,
        "use_linear_projection": config.linear_proj, "sample_size": side,
        "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0,
        "center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1,
        "upcast_attention": kind.family == "sd2"}
    if any(config.cross_only):
        found["only_cross_attention"] = list(config.cross_only)
    if config.vector_dim is not None:
        found |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                  "projection_class_embeddings_input_dim": config.vector_dim}
    if config.classes is not None:
        found["num_class_embeds"] = config.classes
    if config.guidance_dim is not None:
        found["time_cond_proj_dim"] = config.guidance_dim
    return found | _depths(config, down, up)


def _depths(config: UNetConfig, down: Sequence[Sequence[int]], up: Sequence[Sequence[int]]) -> dict[str, Any]:
    """transformer_layers_per_block, whose last entry is also the middle's depth."""
    even = all(len({*a, *b}) == 1 for a, b in zip(down, up))
    levels: list[Any] = [each[0] if len(set(each)) == 1 else list(each) for each in down]
    if config.middle_depth and not levels[-1]:
        levels[-1] = config.middle_depth
    last = levels[-1] if isinstance(levels[-1], int) else levels[-1][0]
    if config.middle_depth not in (0, last):
        raise ValueError(f"diffusers has no UNet whose middle has {config.middle_depth} transformer blocks and whose "
                         f"coarsest level has {last}")
    if even:
        numbers = [each or 1 for each in levels]
        return {"transformer_layers_per_block": numbers[0] if len(set(numbers)) == 1 else numbers}
    return {"transformer_layers_per_block": levels,
            "reverse_transformer_layers_per_block": [list(each) if any(each) else 0 for each in reversed(up)]}


def vae_config(config: VAEConfig, kind: Kind, size: int) -> dict[str, Any]:
    """AutoencoderKL's."""
    widths = [mult * config.channels for mult in config.channel_mult]
    found: dict[str, Any] = {
        "_class_name": "AutoencoderKL", "_diffusers_version": VERSION, "in_channels": config.in_channels,
        "out_channels": config.in_channels, "latent_channels": config.latent_channels, "block_out_channels": widths,
        "layers_per_block": config.num_res_blocks, "act_fn": "silu", "norm_num_groups": 32,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths), "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "scaling_factor": config.scale, "sample_size": size, "force_upcast": kind.family in (*XL, "refiner")}
    if config.std is None and len(set(config.mean or ())) == 1:
        found["shift_factor"] = config.mean[0] if config.mean else 0.0
    elif config.mean or config.std:
        n = config.latent_channels
        found |= {"latents_mean": list(config.mean or [0.0] * n), "latents_std": list(config.std or [1.0] * n)}
    return found


def scheduler_config(schedule: NoiseSchedule | EDMSchedule) -> dict[str, Any]:
    """A scheduler with our noise levels and prediction type; which steps are taken is anyone's choice."""
    said = "v_prediction" if schedule.prediction == "v" else "epsilon"
    if isinstance(schedule, EDMSchedule):
        return {"_class_name": "EDMEulerScheduler", "_diffusers_version": VERSION, "prediction_type": said,
                "sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max, "sigma_data": schedule.sigma_data}
    table = schedule.alphas_cumprod
    zero = float(table[-1]) < 1e-6
    name = "LCMScheduler" if schedule.consistency else "EulerDiscreteScheduler"
    return {"_class_name": name, "_diffusers_version": VERSION, "prediction_type": said,
            "num_train_timesteps": len(table), "steps_offset": 1,
            "timestep_spacing": "trailing" if zero else "leading", "rescale_betas_zero_snr": zero, **_betas(table)}


def _betas(table: Tensor) -> dict[str, Any]:
    """beta_schedule and its ends, where the table is one of the usual ones; otherwise each beta."""
    sd15 = NoiseSchedule.sd15()
    usual = ((sd15, "scaled_linear", 0.012), (sd15.zero_terminal_snr(), "scaled_linear", 0.012),
             (NoiseSchedule.kolors(), "scaled_linear", 0.014), (NoiseSchedule.paints_undo(), "linear", 0.020))
    for known, kind, end in usual:
        if known.alphas_cumprod.shape == table.shape and torch.allclose(known.alphas_cumprod, table, 1e-6, 0):
            return {"beta_schedule": kind, "beta_start": 0.00085, "beta_end": end, "trained_betas": None}
    betas = 1 - table / torch.cat([torch.ones(1, dtype=table.dtype), table[:-1]])
    return {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}


def model_index(kind: Kind, schedule: Mapping[str, Any], texts: Mapping[str, Any],
                tokenizers: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's class and its parts."""
    xl = kind.family in (*XL, "refiner")
    usual = "StableDiffusionXLImg2ImgPipeline" if kind.family == "refiner" else "StableDiffusionXLPipeline"
    name = usual if xl else "StableDiffusionPipeline"
    if kind.purpose in PIPELINES:
        name = PIPELINES[kind.purpose].replace("StableDiffusion", "StableDiffusionXL" if xl else "StableDiffusion")
    found: dict[str, Any] = {
        "_class_name": name, "_diffusers_version": VERSION, "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", schedule["_class_name"]]}
    for each, part in [*texts.items(), *tokenizers.items()]:
        if part is not None or xl or not each.endswith("_2"):
            library = "CLIPTokenizer" if each.startswith("tokenizer") else type(part).__name__
            found[each] = ["transformers", library] if part is not None else [None, None]
    if xl:
        return found | {"image_encoder": [None, None], "feature_extractor": [None, None],
                        "force_zeros_for_empty_prompt": kind.family != "refiner"}
    return found | {"safety_checker": [None, None], "feature_extractor": [None, None],
                    "requires_safety_checker": False}

