"""All the networks of one text-to-image system, loaded together."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ella_kd.conditioning import ELLA, Conditioning, Constant
from ella_kd.denoiser import ELLADenoiser, LDMDenoiser
from ella_kd.guidance import CFG, CFGDenoiser, Guidance, GuidedDenoiser
from ella_kd.models import TSC, AutoencoderKL, NoiseSchedule, fast_on_cpu
from ella_kd.models.checkpoint import load_checkpoint, load_tsc
from ella_kd.models.devices import check_device, check_dtype
from ella_kd.models.text import CLIPTextEncoder, T5TextEncoder, TextFeatures
from ella_kd.models.winograd import WinogradConv2d
from ella_kd.request import Mode, mode_named
from ella_kd.scale import Scale

File = str | Path
M = TypeVar("M", bound=nn.Module)
MINIATURE = Path(str(files("ella_kd.models") / "miniature"))
FIXED_LENGTH = 128  # the T5 tokens that ELLA was trained on, padding included


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A UNet with its autoencoder and noise schedule, and the text side: CLIP, or the connector with its T5, or both.

    unet: ours, diffusers' as `DiffusersUNet(...)`, or any `unet(x, t, tokens)`. size: the side in pixels of the square
    pictures the model was trained on, and the default of `generate`. name: what the pictures' settings call the model.
    """

    unet: nn.Module
    vae: AutoencoderKL
    noise_schedule: NoiseSchedule
    clip: CLIPTextEncoder | None = None
    tsc: TSC | None = None
    t5: T5TextEncoder | None = None
    size: int = 512
    name: str = ""

    @classmethod
    def load(
        cls,
        checkpoint: File,
        *,
        tsc: File | None = None,
        t5: File | None = None,
        clip_tokenizer: File | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> "Pipeline":
        """Read a single-file Stable Diffusion checkpoint and, for ELLA, the connector's file and the T5 folder.

        clip_tokenizer, a tokenizer folder, is needed for plain Stable Diffusion only. device None: cuda if there is
        one, else the CPU; dtype (torch.float16 or "float16") None: fp16 on a GPU, fp32 on a CPU. The size is the first
        number of `modelspec.resolution` in the file's metadata, otherwise 64 latents (512 px for SD1.5).
        Raises FileNotFoundError, or ValueError for files that do not hold what they should.
        """
        device = check_device(device)
        dtype = check_dtype(dtype, device)
        if (tsc is None) != (t5 is None):
            raise ValueError("ELLA takes both the connector (tsc) and the T5 it was trained with (t5), "
                             f"got tsc={tsc} and t5={t5}")
        parts = load_checkpoint(checkpoint, dtype=dtype, device=device, clip_tokenizer=clip_tokenizer)
        return cls(
            unet=parts.unet,
            vae=parts.vae,
            noise_schedule=parts.noise_schedule,
            clip=None if clip_tokenizer is None else parts.text_encoder,
            tsc=None if tsc is None else load_tsc(tsc, dtype=dtype, device=device),
            t5=None if t5 is None else T5TextEncoder.from_folder(t5, dtype=dtype, device=device),
            size=image_size(Path(checkpoint)) or 64 * parts.vae.factor,
            name=Path(checkpoint).stem,
        )

    @classmethod
    def miniature(cls, *, device: str | torch.device | None = None,
                  dtype: str | torch.dtype = torch.float32) -> "Pipeline":
        """The small system that comes with the package: coloured shapes in 48 px, every part of the real one."""
        pipeline = cls.load(MINIATURE / "sd.safetensors", tsc=MINIATURE / "tsc.safetensors", t5=MINIATURE / "t5",
                            clip_tokenizer=MINIATURE / "clip", device=device, dtype=dtype)
        return replace(pipeline, name="miniature")

    def fast_on_cpu(self) -> "Pipeline":
        """The same system, faster on a CPU and larger in memory: `models.fast_on_cpu` of the UNet and the connector."""
        return replace(self, unet=fast_on_cpu(self.unet), tsc=None if self.tsc is None else fast_on_cpu(self.tsc))

    def denoiser(self, guidance: Guidance | Scale | None = None) -> GuidedDenoiser:
        """The denoiser that belongs to the files, their noise schedule and prediction type (eps or v) included.

        guidance: a rule, or the scale of classifier-free guidance. None: a `CFGDenoiser`, whose scale comes with each
        call, as in k-diffusion's scripts: `extra_args=dict(cond=..., uncond=..., cond_scale=7.0)`.
        """
        inner = (LDMDenoiser(self.unet, self.noise_schedule) if self.tsc is None
                 else ELLADenoiser(self.unet, self.tsc, self.noise_schedule))
        if guidance is None:
            return CFGDenoiser(inner)
        return GuidedDenoiser(inner, guidance if isinstance(guidance, Guidance) else CFG(guidance))

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> "Pipeline":
        """The same system on another device or in another dtype; None leaves one as it is.

        This pipeline stays as it is: what has to be moved or cast is copied, the rest is shared. An encoder that is
        not ours (a `FeatureCache`) stays as it is.
        """
        device = None if device is None else check_device(device)
        dtype = None if dtype is None else check_dtype(dtype, device or self.device)
        clip, t5 = self.clip, self.t5
        return replace(
            self,
            unet=_moved(self.unet, device, dtype),
            vae=_moved(self.vae, device, dtype),
            clip=clip and CLIPTextEncoder(_moved(clip.model, device, dtype), clip.tokenizer),
            tsc=self.tsc and _moved(self.tsc, device, dtype),
            t5=T5TextEncoder(_moved(t5.model, device, dtype), t5.tokenizer) if isinstance(t5, T5TextEncoder) else t5,
        )

    def __repr__(self) -> str:
        modules = {"unet": self.unet, "vae": self.vae, "clip": getattr(self.clip, "model", self.clip), "tsc": self.tsc,
                   "t5": getattr(self.t5, "model", self.t5)}
        parts = ", ".join(f"{name} {_count(part)}" for name, part in modules.items() if part is not None)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<Pipeline {self.name!r}: {parts}; {self.size} px, {dtype} on {self.device}>"

    def encode(self, prompts: str | Sequence[str], mode: Mode = "flexible", *, weighted: bool = False,
               clip_skip: int = 1) -> Conditioning:
        """Prompts as a conditioning of one row each; a prompt that comes more than once is encoded once.

        mode: "flexible", ELLA on the prompt's own T5 tokens; "fixed", ELLA on 128 of them, padded or cut, as it was
        trained; "clip", CLIP and no ELLA. weighted: read `(phrase:1.3)` and `[phrase]` as weights; in mode "clip" also
        in prompts of more than 77 tokens. clip_skip: CLIP's layer, 1 the last; mode "clip" only.
        Raises ValueError if the pipeline lacks the part the mode needs.
        """
        mode = mode_named(mode)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = list(dict.fromkeys(prompts))
        row = torch.tensor([texts.index(prompt) for prompt in prompts], device=self.device)
        if mode == "clip":
            if self.clip is None:
                raise ValueError('mode "clip" needs CLIP\'s tokenizer: load the pipeline with clip_tokenizer=<folder>')
            read = (self.clip.weighted if weighted else self.clip)(texts, clip_skip)
            return Constant(TextFeatures(read.tokens[row], None if read.mask is None else read.mask[row]))
        if self.tsc is None or self.t5 is None:
            raise ValueError(f'mode "{mode}" needs ELLA: load the pipeline with tsc=<file> and t5=<folder>, or use '
                             'mode "clip"')
        length = FIXED_LENGTH if mode == "fixed" else None
        return ELLA(self.tsc, (self.t5.weighted if weighted else self.t5)(texts, length), row)

    @property
    def device(self) -> torch.device:
        return next((x.device for x in self.unet.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """That of the UNet's weights."""
        return next((x.dtype for x in self.unet.parameters() if x.is_floating_point()), torch.float32)


def _moved(module: M, device: str | torch.device | None, dtype: torch.dtype | None) -> M:
    """A copy of the module there; tensors that need no change are shared, which stays below two copies in memory."""
    if dtype is not None and any(isinstance(part, WinogradConv2d) and part.into.dtype != dtype
                                 for part in module.modules()):
        raise ValueError(f"the filters of a network that is fast_on_cpu are rounded once: cast it to {dtype} first, "
                         "sd.to(dtype=...).fast_on_cpu()")

    def there(x: torch.Tensor) -> torch.Tensor:
        return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

    moved: dict[int, Any] = {id(x): nn.Parameter(there(x.data), x.requires_grad) for x in module.parameters()}
    moved |= {id(x): there(x) for x in module.buffers()}
    return copy.deepcopy(module, moved)


def _count(part: object) -> str:
    if not isinstance(part, nn.Module):
        return type(part).__name__
    return f"{sum(x.numel() for x in part.parameters()) / 1e6:.3g} M"


def image_size(path: Path) -> int | None:
    """The side that a file's `modelspec.resolution` names. ValueError for a file that is not whole."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            resolution = (file.metadata() or {}).get("modelspec.resolution", "")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error
    side = resolution.partition("x")[0]
    return int(side) if side.isdecimal() else None
