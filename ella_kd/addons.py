"""The add-ons of requests: files found and read once in a run, the pipeline dressed in them, conditions wrapped."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ella_kd.addon_words import AddOn
from ella_kd.conditioning import as_conditioning
from ella_kd.denoiser import Condition
from ella_kd.models.addons.embeddings import Embedding
from ella_kd.models.addons.ip_adapter import IPAdapter
from ella_kd.models.addons.loading import load_control
from ella_kd.models.addons.lora import LoRA
from ella_kd.models.addons.preprocessing import preprocessor
from ella_kd.models.files import hub
from ella_kd.models.files.folders import look_up
from ella_kd.models.files.hashes import payload_sha256, sha256
from ella_kd.models.files.kinds import kind_of_path
from ella_kd.models.files.weights import SAFETENSORS, Weights
from ella_kd.models.networks import BySigma
from ella_kd.pictures.hires_options import WEB_UI, Upscaler, no_upscaler
from ella_kd.pictures.reading import read_picture
from ella_kd.pictures.upscalers import network_of
from ella_kd.pipeline import Pipeline
from ella_kd.request import Request

T = TypeVar("T")
WHAT = {"lora": "a LoRA", "embedding": "a textual-inversion embedding", "control": "a ControlNet or a T2I-Adapter",
        "image_prompt": "an IP-Adapter", "upscaler": "a network that enlarges pictures"}
KEPT = 3  # pipelines that wear something, of a run: each may hold a UNet


class AddOns:
    """What the requests of a run ask for, each file found and read once; models_dir: where names are looked up.

        shelf = AddOns("models")
        dressed = shelf.dressed(pipeline, request.add_ons, request)
    """

    def __init__(self, models_dir: str | Path | None = None) -> None:
        self.models_dir = models_dir
        self._once: dict[Any, Any] = {}

    def find(self, add_on: AddOn) -> Path:
        """Where its file lies: a path, a name in the models' folder, or a file of the hub, which is fetched.

        Raises FileNotFoundError, and ValueError for a file of another kind.
        """
        return self._keep(("path", add_on.place, add_on.file), lambda: self._found(add_on.place, add_on.file))

    def _found(self, place: Any, name: str) -> Path:
        missing: FileNotFoundError | None = None
        path = Path(name)
        if self.models_dir is not None and not os.path.lexists(name):
            wanted = WEB_UI.get(name.lower(), name) if place == "upscaler" else name
            try:
                path = look_up(wanted, place, self.models_dir)
            except FileNotFoundError as error:
                missing = error
        if not path.exists():
            meant = hub.read(name, place)
            if isinstance(meant, Path) and place == "upscaler":
                raise FileNotFoundError(f"{missing}; {no_upscaler(name)}" if missing else no_upscaler(name))
            if isinstance(meant, Path):
                advice = f"{place} takes a file, org/repo:file on the hub, or a name in the folder of --models-dir"
                raise missing or FileNotFoundError(f"no {place} at {name}: {advice}")
            path = hub.find(name, place)
        kind = kind_of_path(path)
        if kind.what and kind.place != place:
            raise ValueError(f"{place} takes {WHAT[place]}, and {path} looks like {kind}")
        return path

    def check(self, asked: Sequence[AddOn], hashes: Sequence[str] = ()) -> None:
        """Find the files and the pictures, before a large network is read.

        Warns of a file that is not the one whose sha256 a request remembers.
        """
        known = dict(each.rpartition("=")[::2] for each in hashes)
        for add_on in asked:
            path = self.find(add_on)
            if add_on.picture:
                self._picture(add_on)
            if add_on.place == "image_prompt":
                self._encoder(add_on)
            if add_on.place in ("lora", "embedding", "upscaler"):
                self._read(add_on)
            said = known.get(add_on.file) or known.get(add_on.name)
            if said and not (found := self._fingerprint(add_on)).startswith(said):
                self._keep(("told", path), partial(warnings.warn, f"the {add_on.place} {path} is not the file that "
                           f"drew the picture: its sha256 begins with {found[:12]}, that one's with {said[:12]}",
                           stacklevel=4))

    def hashes(self, asked: Sequence[AddOn]) -> tuple[str, ...]:
        """"NAME=SHA256" of every add-on's file."""
        return tuple({f"{each.file}={self._fingerprint(each)}": None for each in asked})

    def _fingerprint(self, add_on: AddOn) -> str:
        path = self.find(add_on)
        return self._keep(("sha256", path), lambda: fingerprint(add_on.place, path))

    def dressed(self, pipeline: Pipeline, asked: Sequence[AddOn], request: Request) -> Pipeline:
        """The pipeline with these LoRAs and words; itself without any.

        Warns of what reaches CLIP alone, if CLIP reads nothing of the request.
        """
        worn = tuple(add_on for add_on in asked if add_on.place in ("lora", "embedding"))
        if not worn:
            return pipeline
        key = "dressed", id(pipeline), worn
        if key not in self._once:
            for old in [each for each in self._once if each[0] == "dressed"][:-KEPT + 1]:
                del self._once[old]
        return self._keep(key, lambda: (pipeline, self._dress(pipeline, worn, request)))[1]

    def _dress(self, pipeline: Pipeline, worn: tuple[AddOn, ...], request: Request) -> Pipeline:
        asked = [add_on for add_on in worn if add_on.place == "lora"]
        loras = [(self._read(add_on), add_on.strength) for add_on in asked]
        words = [self._read(add_on) for add_on in worn if add_on.place == "embedding"]
        words += [Embedding.of(tensors, name) for lora, _ in loras for name, tensors in lora.embeddings.items()]
        if not _clip_reads(pipeline, request):
            deaf = [f"the word {each.name}" for each in words]
            deaf += [f"the text part of {lora.name}" for lora, _ in loras if lora.modules["text"]]
            if deaf:
                warnings.warn(f"{', '.join(deaf)} reaches CLIP, which reads nothing here: ELLA's encoder is T5; give "
                              "trigger words in tags (--tags), or draw with mode clip", stacklevel=5)
        dressed = pipeline.with_lora(loras) if loras else pipeline
        if any(add_on.window for add_on in asked):  # of the UNet: CLIP's part holds for the whole run
            windows = [add_on.window or (math.inf, 0.0) for add_on in asked]
            edges = sorted({edge for window in windows for edge in window if 0 < edge < math.inf}, reverse=True)
            parts = [[pair for pair, (high, low) in zip(loras, windows) if high >= above and low <= below]
                     for above, below in pairwise((math.inf, *edges, 0.0))]
            networks = [pipeline.with_lora(part).unet if part else pipeline.unet for part in parts]
            dressed = replace(dressed, unet=BySigma(*networks, at=edges) if edges else networks[0])
        return replace(dressed.with_embeddings(words), name=pipeline.name)  # the request says the rest

    def steered(self, pipeline: Pipeline, asked: Sequence[AddOn], cond: Condition, uncond: Condition,
                part: Callable[[Image.Image], Image.Image] = lambda picture: picture) -> tuple[Condition, Condition]:
        """The conditions beside these controls and image prompts: both sides see a control, but for guess mode and a
        pooled one; the uncond sees of an image prompt what its adapter makes of no picture.

        part: what is drawn on of a picture of the whole (`Canvas.part`).
        """
        for add_on in asked:
            how: dict[str, Any] = {"window": add_on.window} if add_on.window else {}
            guess, weight = dict(add_on.options).get("guess", ""), add_on.weight
            if add_on.place == "control":
                net, picture = self._network(pipeline, add_on), part(self._picture(add_on))
                cond = as_conditioning(cond).with_control(net, picture, weight, guess=guess, **how)
                if not guess and not net.pooled:
                    uncond = as_conditioning(uncond).with_control(net, picture, weight, **how)
            elif add_on.place == "image_prompt":
                adapter = self._network(pipeline, add_on)
                cond = as_conditioning(cond).with_image(adapter, self._picture(add_on), weight, **how)
                uncond = as_conditioning(uncond).with_image(adapter, None, weight, **how)
        return cond, uncond

    def _network(self, pipeline: Pipeline, add_on: AddOn) -> Any:
        """That of a control or an image prompt, where the pipeline is and in its numbers."""
        path = self.find(add_on)
        where: dict[str, Any] = {"device": pipeline.device, "dtype": pipeline.dtype}
        base = pipeline.unet
        if add_on.place == "control":
            key = "network", path, id(base), *where.values()  # base: of files that are a difference to it
            return self._keep(key, lambda: (base, load_control(path, base=base, **where)))[1]
        encoder = self._encoder(add_on)
        return self._keep(("network", path, encoder, *where.values()),
                          lambda: IPAdapter.load(path, image_encoder=encoder, **where))

    def _encoder(self, add_on: AddOn) -> Path | None:
        """The image encoder of an image prompt: what `encoder=` names, else the folder image_encoder beside the
        adapter, here, in the models' folder, or on the hub."""
        said, beside = dict(add_on.options).get("encoder"), self.find(add_on).parent / "image_encoder"
        if said is None and beside.exists():
            return None
        if said is not None and os.path.lexists(said):
            return Path(said)
        if self.models_dir is not None:
            try:
                return look_up(said or "image_encoder", "image_encoder", self.models_dir)
            except FileNotFoundError:
                if said is not None:
                    raise
        repo, colon, file = add_on.file.partition(":")
        if said is None and colon and not os.path.lexists(add_on.file):
            return hub.find(f"{repo}:{file.rpartition('/')[0]}/image_encoder".replace(":/", ":"), "image_prompt")
        raise FileNotFoundError(f"no image encoder for {add_on.file}: expected {said or beside}; name its folder or "
                                "file behind the picture, encoder=DIR, or lay it in the folder of --models-dir")

    def upscaler(self, request: Request) -> Upscaler:
        """What enlarges: a name of ours, a function, or the network of a file."""
        return next((self._read(each) for each in request.add_ons if each.place == "upscaler"), request.hires_upscaler)

    def _read(self, add_on: AddOn) -> Any:
        path = self.find(add_on)
        if add_on.place == "upscaler":
            return self._keep(("read", path), lambda: network_of(path))
        stem = None if Path(add_on.file).suffix or "/" in add_on.file else add_on.file
        read: Callable[..., Any] = LoRA.load if add_on.place == "lora" else Embedding.load
        return self._keep(("read", path), lambda: read(path, stem if add_on.place == "embedding" else None))

    def _picture(self, add_on: AddOn) -> Image.Image:
        name = dict(add_on.options).get("preprocess")

        def read() -> Image.Image:
            picture, _ = read_picture(add_on.picture)
            drawn: Image.Image = picture if name is None else preprocessor(name)(picture)
            return drawn

        return self._keep(("picture", add_on.picture, name), read)

    def _keep(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._once:
            self._once[key] = make()
        found: T = self._once[key]
        return found


def fingerprint(place: str, path: Path) -> str:
    """The sha256 of a file, or of a folder's weights; of a LoRA's safetensors without the header, as A1111's."""
    file = path if path.is_file() else Weights(path).files[0]
    return payload_sha256(file) if place == "lora" and file.suffix.lower() in SAFETENSORS else sha256(file)


def _clip_reads(pipeline: Pipeline, request: Request) -> bool:
    """Whether a text of the request goes to CLIP."""
    return (request.tags is not None or "clip" in (request.mode, request.negative_mode)
            or (pipeline.clip is not None and pipeline.clip.vector_dim is not None))
