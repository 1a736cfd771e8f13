"""T5 features that stay on disk between runs, so that a prompt once encoded needs no encoder in memory."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock

import torch

from ella_kd.models.context import pile
from ella_kd.models.devices import check_device
from ella_kd.models.features import FeatureMode, load_features, save_features
from ella_kd.models.t5 import T5TextEncoder
from ella_kd.models.text import TextFeatures


class FeatureCache:
    """A text encoder with a folder: `t5(prompts, max_length)` reads what it knows and encodes only what is new.

        t5 = FeatureCache("features", "flan-t5-xl", lambda: T5TextEncoder.from_folder("flan-t5-xl"))

    folder: made if it does not exist; one file per prompt, as `save_features` writes them. encoder: the name under
    which the features are kept; other weights or another dtype need another name. load: makes the encoder, and is
    called at the first prompt that is not in the folder, if there is one. Prompts are encoded one by one, so that
    features do not depend on what a prompt was first drawn with.
    Raises as the encoder does, and ValueError for a damaged file or an encoder without a name.
    """

    def __init__(self, folder: str | Path, encoder: str, load: Callable[[], T5TextEncoder],
                 device: str | torch.device = "cpu") -> None:
        if not encoder.strip():
            raise ValueError(f'name the encoder, such as "flan-t5-xl", got {encoder!r}')
        self.folder, self.encoder, self.device = Path(folder), encoder, check_device(device)
        self._load, self._loading = load, Lock()
        self._t5: T5TextEncoder | None = None

    @property
    def t5(self) -> T5TextEncoder:
        """The encoder, loaded when it is first needed, once, whichever thread asks."""
        with self._loading:
            self._t5 = self._t5 or self._load()
            return self._t5

    def release(self, rest: torch.device | None = None) -> None:
        """Let the encoder go until the next prompt that the folder lacks: `T5TextEncoder.release`."""
        if self._t5 is not None:
            self._t5.release(rest)

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.folder)!r}, {self.encoder!r})"

    def __call__(self, prompts: str | Sequence[str], max_length: int | None = None) -> TextFeatures:
        """Prompts -> features [B, L, D] as `T5TextEncoder` gives them: flexible with None, fixed with a number."""
        return self._read([prompts] if isinstance(prompts, str) else list(prompts), max_length, weighted=False)

    def weighted(self, prompts: str | Sequence[str], max_length: int | None = None) -> TextFeatures:
        """Prompts with weights, as `T5TextEncoder.weighted` reads them."""
        return self._read([prompts] if isinstance(prompts, str) else list(prompts), max_length, weighted=True)

    def path(self, prompt: str, max_length: int | None = None, weighted: bool = False) -> Path:
        """The file of a prompt."""
        key = json.dumps([self.encoder, max_length, weighted, prompt])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def _read(self, prompts: list[str], max_length: int | None, weighted: bool) -> TextFeatures:
        if not prompts:
            return self.t5(prompts, max_length)  # says what is wrong
        return TextFeatures(*pile([self._one(prompt, max_length, weighted) for prompt in prompts]))

    def _one(self, prompt: str, max_length: int | None, weighted: bool) -> TextFeatures:
        path = self.path(prompt, max_length, weighted)
        if path.is_file():
            saved = load_features(path, device=self.device)
            if (saved.prompts, saved.encoder) != ((prompt,), self.encoder):
                raise ValueError(f"{path} holds the features of {saved.prompts} by {saved.encoder!r}, not of "
                                 f"{prompt!r} by {self.encoder!r}: remove it")
            return saved.features
        features = (self.t5.weighted if weighted else self.t5)(prompt, max_length)
        self.folder.mkdir(parents=True, exist_ok=True)
        mode: FeatureMode = "flexible" if max_length is None else "fixed"
        save_features(path, features, prompt, encoder=self.encoder, mode=mode)
        tokens, mask = features.tokens, features.mask
        return TextFeatures(tokens.to(self.device), None if mask is None else mask.to(self.device))
