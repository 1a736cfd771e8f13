"""All the networks of one text-to-image system, loaded together."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ella_kd.conditioning import ELLA, Conditioning, Constant, With
from ella_kd.denoiser import ELLADenoiser, LDMDenoiser
from ella_kd.guidance import CFG, CFGDenoiser, Guidance, GuidedDenoiser
from ella_kd.models import TSC, AutoencoderKL, Checkpoint, NoiseSchedule, UNet, fast_on_cpu, load_checkpoint, load_tsc
from ella_kd.models.added import POSITIVE_SCORE, WIDTH
from ella_kd.models.addons.embeddings import Embedding
from ella_kd.models.addons.lora.merging import Given, as_list, merged
from ella_kd.models.clip import CLIPTextEncoder, TwoTextEncoders
from ella_kd.models.devices import check_device, check_dtype
from ella_kd.models.emphasis import escape
from ella_kd.models.files.connector import check_connector
from ella_kd.models.files.from_diffusers import from_modules
from ella_kd.models.files.hub import find, find_all, with_preset
from ella_kd.models.files.metadata import size_of
from ella_kd.models.files.saving import save
from ella_kd.models.noise_schedule import EDMSchedule, PredictionType
from ella_kd.models.seamless import seamless
from ella_kd.models.t5 import T5TextEncoder
from ella_kd.models.tokenizers import published_clip_tokenizer
from ella_kd.placement import Name, Placement, carried, moved_part
from ella_kd.request import Mode, mode_named
from ella_kd.scale import Scale

File = str | Path
MINIATURE = Path(str(files("ella_kd.models") / "miniature"))
FIXED_LENGTH = 128  # the T5 tokens that ELLA was trained on, padding included


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A UNet with its autoencoder and noise schedule, and the text side: CLIP, or the connector with its T5, or both.

    unet: ours, diffusers' as `DiffusersUNet(...)`, or any `unet(x, t, tokens)`. size: the side in pixels of the square
    pictures the model was trained on, and the default of `generate`. name: what the pictures' settings call the model.
    LoRAs and words of `with_lora` and `with_embeddings` are added to it; whoever puts a UNet in, `Inside(sd.unet, ...)`
    by `replace`, says so in it. What settings are to draw again is an argument of `generate`, lora= and so on.
    """

    unet: nn.Module
    vae: AutoencoderKL
    noise_schedule: NoiseSchedule | EDMSchedule
    clip: CLIPTextEncoder | TwoTextEncoders | None = None
    tsc: TSC | None = None
    t5: T5TextEncoder | None = None
    size: int = 512
    name: str = ""
    placement: Placement | None = None
    text_models: tuple[nn.Module | None, ...] = ()  # text encoders whose tokenizer is not known, for `save`
    purpose: str = ""  # what the UNet is for, as `models.files.kinds` has it: "inpainting", "IC-Light"

    @classmethod
    def load(
        cls,
        checkpoint: File,
        *,
        tsc: File | None = None,
        t5: File | None = None,
        vae: File | None = None,
        text_encoder: File | None = None,
        offset: File | None = None,
        clip_tokenizer: File | None = None,
        prediction: PredictionType | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        placement: Placement | None = None,
    ) -> "Pipeline":
        """Read a Stable Diffusion checkpoint, a single file or a diffusers folder, and, for ELLA, the connector's file
        and the T5 folder.

        Each is a path, `org/repo:file` or `org/repo` on the Hugging Face hub, or the name of a preset that has it
        (`ella_kd.models.files.hub.find`); for a preset's name as checkpoint, its other parts need not be named:
        `Pipeline.load("ella-sd15")`. vae, text_encoder: instead of the checkpoint's. offset: differences to add
        to its UNet (IC-Light's files). clip_tokenizer: CLIP's tokenizer folder; None: a diffusers folder's own, that of
        an installed open_clip or clip package, or of the hub's cache, and where nothing is drawn without CLIP it is
        fetched. prediction: "eps" or "v", where the files do not say which (`load_checkpoint`, which takes the networks
        from any files).
        device None: cuda if there is one, else the CPU; dtype (torch.float16 or "float16") None: fp16 on a GPU, fp32 on
        a CPU. placement, instead of these two: the dtype of each part and where it is when (`Placement`; by default T5
        leaves once `generate` has encoded a batch). The size is the first number of `modelspec.resolution` in the
        file's metadata, or in the configuration of the folder's UNet, otherwise the family's: 64 latents (512 px), 96
        of Stable Diffusion 2.x that predicts v, or SDXL's 128 (1024 px).
        Raises FileNotFoundError, or ValueError for files that do not hold what they should.
        """
        if placement is not None and (device, dtype) != (None, None):
            raise ValueError("device and dtype belong to the placement, Placement(device=..., dtype=...): give either")
        placement = placement or Placement(device, dtype)
        at, t5_at = placement.of("unet"), placement.of("t5")
        specs = with_preset({"checkpoint": checkpoint, "tsc": tsc, "t5": t5, "vae": vae,
                             "text_encoder": text_encoder, "clip_tokenizer": clip_tokenizer})
        if (specs["tsc"] is None) != (specs["t5"] is None):
            raise ValueError("ELLA takes both the connector (tsc) and the T5 it was trained with (t5), "
                             f"got tsc={tsc} and t5={t5}")
        found = find_all(specs)
        path, more = found["checkpoint"], None if offset is None else find(offset)
        assert path is not None
        waiting = at.rest or at.device
        with warnings.catch_warnings():
            if placement.offload:
                warnings.filterwarnings("ignore", "float16 on a CPU")  # where it only waits
            parts = load_checkpoint(path, vae=found["vae"], text_encoder=found["text_encoder"], dtype=at.dtype,
                                    device=waiting, prediction=prediction,
                                    vae_dtype=lambda family: placement.of("vae", family).dtype,
                                    clip_tokenizer=found["clip_tokenizer"], offset=more)
            connector = None if found["tsc"] is None else load_tsc(found["tsc"], dtype=at.dtype, device=waiting)
        if parts.clip_tokenizer is None and parts.text_model is not None:
            needed = found["tsc"] is None or parts.unet.config.vector_dim is not None
            words = published_clip_tokenizer(parts.text_model.config.vocab_size, fetch=needed)
            parts = replace(parts, clip_tokenizer=words)
        encoder = None
        if connector is not None and found["t5"] is not None:
            check_connector(connector, found["tsc"], parts.unet.config.context_dim, found["t5"])
            encoder = T5TextEncoder.from_folder(found["t5"], dtype=t5_at.dtype, device=t5_at.device)
        usual = parts.kind.size(parts.noise_schedule.prediction) * parts.vae.factor // 8
        sided = size_of(path, parts.vae.factor) or usual
        name = (path.name if path.is_dir() else path.stem) + (f" + {more.stem}" if more else "")
        system = cls.of(parts, connector, encoder, sided, name)
        return replace(system, placement=placement)

    @classmethod
    def of(cls, parts: Checkpoint, tsc: TSC | None = None, t5: T5TextEncoder | None = None, size: int = 512,
           name: str = "") -> "Pipeline":
        """The system of what `load_checkpoint` read; CLIP is in it if its tokenizer is known."""
        clip = None if parts.clip_tokenizer is None or parts.text_model is None else parts.text_encoder
        texts = (parts.text_model, parts.text_model_2) if clip is None else ()
        return cls(parts.unet, parts.vae, parts.noise_schedule, clip, tsc, t5, size, name, text_models=texts,
                   purpose=parts.kind.purpose)

    @classmethod
    def from_diffusers(cls, pipe: Any, *, tsc: TSC | None = None, t5: T5TextEncoder | None = None) -> "Pipeline":
        """A loaded diffusers pipeline's own UNet, autoencoder and text encoders as a Pipeline, on the same tensors.

        Nothing is copied and nothing is changed: what is trained or merged there later is seen here, unless it makes
        new tensors, as `pipe.to(...)` does. Devices and dtypes are the pipe's. The noise levels and the prediction are
        its scheduler's. Raises TypeError for an object without unet and vae, ValueError for networks that are no
        Stable Diffusion, have a LoRA loaded and not fused, or are offloaded.
        """
        parts = from_modules(pipe)
        side = getattr(pipe.unet.config, "sample_size", None)
        usual = parts.kind.size(parts.noise_schedule.prediction)
        return cls.of(parts, tsc, t5, side * parts.vae.factor if type(side) is int else usual,
                      Path(str(getattr(pipe.config, "_name_or_path", ""))).name or "diffusers")

    def save(self, path: File, *, dtype: str | torch.dtype | None = None) -> None:
        """Write the UNet, the autoencoder and CLIP: `path.safetensors` in LDM's layout, any other path as a diffusers
        folder, which appear whole or not at all; dtype None keeps each part's. The connector: `models.save_tsc`.

        Raises TypeError for networks that are not ours, OSError naming the path if it cannot be written.
        """
        if not isinstance(self.unet, UNet):
            raise TypeError(f"a UNet of ours can be saved, got {type(self.unet).__name__}")
        clip: Any = self.clip
        texts: list[Any] = [clip.first, clip.second] if isinstance(clip, TwoTextEncoders) else [clip]
        models: list[Any] = [*(self.text_models if clip is None else (each.model for each in texts)), None, None]
        words: list[Any] = [*(each and each.tokenizer for each in texts), None]
        parts = Checkpoint(self.unet, self.vae, models[0], self.noise_schedule, words[0], models[1], words[1])
        save(path, parts, {"modelspec.title": self.name, "modelspec.resolution": f"{self.size}x{self.size}"},
             dtype=None if dtype is None else check_dtype(dtype, "meta"))

    @classmethod
    def miniature(cls, *, device: str | torch.device | None = None,
                  dtype: str | torch.dtype = torch.float32) -> "Pipeline":
        """The small system that comes with the package: coloured shapes in 48 px, every part of the real one."""
        pipeline = cls.load(MINIATURE / "sd.safetensors", tsc=MINIATURE / "tsc.safetensors", t5=MINIATURE / "t5",
                            clip_tokenizer=MINIATURE / "clip", placement=Placement(device, dtype, keep_t5=True))
        return replace(pipeline, name="miniature")

    def fast_on_cpu(self) -> "Pipeline":
        """The same system, faster on a CPU and larger in memory: `models.fast_on_cpu` of the UNet and the connector."""
        return replace(self, unet=fast_on_cpu(self.unet), tsc=None if self.tsc is None else fast_on_cpu(self.tsc))

    def with_embeddings(self, embeddings: Iterable[Embedding | File]) -> "Pipeline":
        """A twin whose CLIP knows these words too, `Embedding`s or their files; none gives the pipeline itself.

        A word is the file's name without its ending, in texts that CLIP reads: `mode="clip"`, tags, SDXL's prompts.
        Raises ValueError for a pipeline without CLIP and for another model's embedding.
        """
        words = [each if isinstance(each, Embedding) else Embedding.load(each) for each in embeddings]
        if words and self.clip is None:
            raise ValueError(f"the embedding {words[0].name} is CLIP's, and this pipeline lacks CLIP or its tokenizer: "
                             "load it with clip_tokenizer=<folder>")
        if not words or self.clip is None:
            return self
        return replace(self, clip=self.clip.with_embeddings(words), name=_and(self.name, [each.name for each in words]))

    def with_lora(self, loras: "Given | Sequence[Given]", *, partial: bool = False) -> "Pipeline":
        """The same system with LoRAs in its UNet and its text encoders: `models.addons.lora.with_lora`.

        A text encoder's part changes what CLIP says, so ELLA alone does not see it: mode "clip", or tags beside ELLA.
        """
        pairs = as_list(loras)
        texts = list(self.text_models) if self.clip is None else _models(self.clip)
        networks: dict[str, Any] = {"unet": self.unet}
        for i, model in enumerate(texts):
            if model is not None:
                networks["text_2" if i or hasattr(model, "text_projection") else "text"] = model
        twins = merged(networks, pairs, partial=partial)
        new = {id(network): twins[part] for part, network in networks.items()}
        told = [f"{lora.name}:{strength}" for lora, strength in pairs if strength.unet or strength.text]
        return replace(self, unet=twins["unet"], name=_and(self.name, told),
                       clip=self.clip and self.clip.moved(lambda model: new[id(model)]),
                       text_models=tuple(model and new[id(model)] for model in self.text_models))

    def seamless(self) -> "Pipeline":
        """The same system for textures that meet themselves: `models.seamless` of the UNet and the autoencoder."""
        return replace(self, unet=seamless(self.unet), vae=seamless(self.vae))

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
            unet=moved_part(self.unet, device, dtype),
            vae=moved_part(self.vae, device, dtype),
            clip=clip and clip.moved(lambda model: moved_part(model, device, dtype)),
            text_models=tuple(each and moved_part(each, device, dtype) for each in self.text_models),
            tsc=self.tsc and moved_part(self.tsc, device, dtype),
            t5=t5.moved(lambda model: moved_part(model, device, dtype)) if isinstance(t5, T5TextEncoder) else t5,
            placement=self.placement and replace(self.placement, device=device or self.placement.device,
                                                 dtype=dtype or self.placement.dtype),
        )

    @contextmanager
    def at_work(self, *parts: Name) -> Iterator[None]:
        """The parts on the device where they run, for the block, if the placement lets them wait elsewhere.

        `generate`, `draw` and `encode` do it themselves; around a sampler of yours: `with sd.at_work("unet", "tsc")`.
        """
        with ExitStack() as stack:
            for part in parts if self.placement is not None and self.placement.offload else ():
                module = getattr(self, part)
                module = getattr(module, "model", module)
                if isinstance(module, nn.Module):
                    stack.enter_context(carried(module, self.device))
            yield

    def rest(self) -> None:
        """Let T5 go until the next prompt, as the placement says; `generate` does it when a batch is encoded."""
        release = getattr(self.t5, "release", None)
        if release is not None and self.placement is not None and not self.placement.keep_t5:
            release(self.placement.of("t5").rest)

    def __repr__(self) -> str:
        modules = {"unet": self.unet, "vae": self.vae, "clip": getattr(self.clip, "model", self.clip), "tsc": self.tsc,
                   "t5": self.t5.model if isinstance(self.t5, T5TextEncoder) and self.t5.loaded else self.t5}
        parts = ", ".join(f"{name} {_count(part)}" for name, part in modules.items() if part is not None)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<Pipeline {self.name!r}: {parts}; {self.size} px, {dtype} on {self.device}>"

    def encode(self, prompts: str | Sequence[str], mode: Mode = "flexible", *, weighted: bool = False,
               clip_skip: int = 1, score: float = POSITIVE_SCORE) -> Conditioning:
        """Prompts as a conditioning of one row each; a prompt that comes more than once is encoded once.

        mode: "flexible", ELLA on the prompt's own T5 tokens; "fixed", ELLA on 128 of them, padded or cut, as it was
        trained; "clip", CLIP and no ELLA. weighted: read `(phrase:1.3)` and `[phrase]` as weights; in mode "clip" also
        in prompts of more than 77 tokens. clip_skip: CLIP's layer, 1 the one that the UNet knows; mode "clip" only.

        SDXL sees CLIP's pooled text too, in every mode (the first 75 tokens'), and the picture's size, that of the
        latents unless `With(cond, sizes=...)` says another. "" is encoded as any text: an empty negative is not zeros.
        score: the aesthetic score that SDXL's refiner is told, usually 2.5 for negative prompts.
        Raises ValueError if the pipeline lacks the part the mode needs.
        """
        mode = mode_named(mode)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = list(dict.fromkeys(prompts))
        row = torch.tensor([texts.index(prompt) for prompt in prompts], device=self.device)
        if mode == "clip":
            if self.clip is None and not any(self.text_models):
                raise ValueError('mode "clip" needs a text encoder, which the checkpoint lacks: load the pipeline with '
                                 "text_encoder=<file or folder>, --text-encoder for the command")
            if self.clip is None:
                raise ValueError('mode "clip" needs CLIP\'s tokenizer: load the pipeline with clip_tokenizer=<folder>, '
                                 'or "clip-tokenizer" to fetch it, or install open_clip_torch, which brings it')
            with self.at_work("clip"):
                read = (self.clip.weighted if weighted else self.clip)(texts, clip_skip)
            return self._scored(Constant(read.take(row)), score)
        if self.tsc is None or self.t5 is None:
            raise ValueError(f'mode "{mode}" needs ELLA: load the pipeline with tsc=<file> and t5=<folder>, or use '
                             'mode "clip"')
        length = FIXED_LENGTH if mode == "fixed" else None
        cond: Conditioning = ELLA(self.tsc, (self.t5.weighted if weighted else self.t5)(texts, length), row)
        if self.clip is not None and self.clip.vector_dim is not None:
            with self.at_work("clip"):
                vector = self.clip.weighted(texts if weighted else [escape(text) for text in texts]).vector
            assert vector is not None
            cond = With(cond, vector=vector[row])
        return self._scored(cond, score)

    def _scored(self, cond: Conditioning, score: float) -> Conditioning:
        """With the score, if the network is told one: five numbers follow the text's vector."""
        known, pooled = getattr(self.unet, "vector_dim", None), self.clip and self.clip.vector_dim
        scored = known is not None and pooled is not None and known - pooled == 5 * WIDTH
        return With(cond, score=torch.tensor([score], device=self.device)) if scored else cond

    @property
    def device(self) -> torch.device:
        """That of the UNet's weights, at work."""
        if self.placement is not None and self.placement.offload:
            return self.placement.of("unet").device
        return next((x.device for x in self.unet.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """That of the UNet's weights."""
        return next((x.dtype for x in self.unet.parameters() if x.is_floating_point()), torch.float32)


def _and(name: str, more: Sequence[str]) -> str:
    """A model's name with those of what was added to it."""
    return " + ".join(filter(None, (name, *more)))


def _models(clip: CLIPTextEncoder | TwoTextEncoders) -> list[nn.Module]:
    return [clip.first.model, clip.second.model] if isinstance(clip, TwoTextEncoders) else [clip.model]


def _count(part: object) -> str:
    if not isinstance(part, nn.Module):
        return type(part).__name__
    return f"{sum(x.numel() for x in part.parameters()) / 1e6:.3g} M"
