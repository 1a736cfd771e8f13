"""CLIP's image encoder: what IP-Adapters see of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from ella_kd.models.addons.preprocessing import Picture, pixels
from ella_kd.models.files.layout import json_in
from ella_kd.models.files.weights import Weights
from ella_kd.models.shapes import Shapes, count_of, shape_of

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BUFFERS = ("position_ids",)


class ImageEncoder(nn.Module):
    """transformers' CLIPVisionModelWithProjection, from pictures of any size."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    @classmethod
    def load(cls, source: "str | Path | nn.Module | ImageEncoder", *, dtype: torch.dtype,
             device: torch.device) -> "ImageEncoder":
        """Of a folder, a file or a model. Raises FileNotFoundError, ValueError naming tensors that do not agree."""
        if isinstance(source, nn.Module):
            return source if isinstance(source, ImageEncoder) else cls(source)
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        path = Path(source)
        weights = Weights(path)
        names = {_plain(name): name for name in weights if not name.endswith(BUFFERS) and _of_vision(name)}
        shapes = {name: tuple(weights.shapes[theirs]) for name, theirs in names.items()}
        config = json_in((path if path.is_dir() else path.parent) / "config.json")
        config = config.get("vision_config", config)
        try:
            known = CLIPVisionConfig(**config) if "hidden_size" in config else _config(shapes)
            with torch.device("meta"):
                model = CLIPVisionModelWithProjection(known)
        except ValueError as error:
            raise ValueError(f"{path} is not a CLIP image encoder: {error}") from error
        expected = {_plain(name): (name, tuple(x.shape)) for name, x in model.state_dict().items()
                    if not name.endswith(BUFFERS)}
        wrong = [f"missing: {name}" for name in expected if name not in shapes]
        wrong += [f"misshapen: {name} is {list(shapes[name])}, must be {list(shape)}"
                  for name, (_, shape) in expected.items() if name in shapes and shapes[name] != shape]
        wrong += [f"unexpected: {name}" for name in shapes if name not in expected]
        if wrong:
            raise ValueError(f"{path} is not a CLIP image encoder with its projection:\n  " + "\n  ".join(wrong[:5]))
        tensors = {mine: weights[names[name]].to(device, dtype) for name, (mine, _) in expected.items()}
        model.load_state_dict(tensors, strict=False, assign=True)
        for module in model.modules():
            ids: Any = getattr(module, "position_ids", None)
            if ids is not None:
                module.position_ids = torch.arange(ids.shape[-1], device=device)[None]
        return cls(model.eval().requires_grad_(False))

    def width(self, whole: bool) -> int:
        """Of what it gives: a hidden state, or the embedding."""
        config = self.model.config
        return int(config.hidden_size if whole else config.projection_dim)

    @torch.no_grad()
    def forward(self, pictures: Sequence[Picture] | None, whole: bool) -> Tensor:
        """The embeddings [P, E] of pictures; whole: their hidden states before the last layer, [P, L, H]. None: of one
        whose numbers are all 0 after normalisation."""
        size, weight = self.model.config.image_size, next(self.model.parameters())
        x = torch.zeros(1, 3, size, size) if pictures is None else torch.cat([
            normalised(picture, size) for each in pictures for picture in pixels(each)])
        said = self.model(pixel_values=x.to(weight.device, weight.dtype), output_hidden_states=whole)
        return said.hidden_states[-2] if whole else said.image_embeds


def normalised(picture: Tensor, size: int) -> Tensor:
    """A picture [3, H, W] in [0, 1] as CLIP is shown it, [1, 3, size, size]: the square in its middle, bicubic."""
    image = Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    width, height = image.size
    short = min(width, height)
    width, height = (int(size * side / short) for side in (width, height))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    x = pixels(image.crop((left, top, left + size, top + size)))
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEAN, STD))
    return (x - mean) / std


def _plain(name: str) -> str:
    return name.removeprefix("vision_model.")


def _of_vision(name: str) -> bool:
    """Whether a tensor is the image encoder's, in a file that may hold the text encoder too."""
    return not name.startswith(("text_model.", "text_projection.", "logit_scale"))


def _config(shapes: Shapes) -> "CLIPVisionConfig":
    """ViT-H, bigG and L have 16 heads; OpenAI's L has quick_gelu."""
    from transformers import CLIPVisionConfig

    width, _, patch = shape_of(shapes, "embeddings.patch_embedding.weight", 4)[:3]
    places = shape_of(shapes, "embeddings.position_embedding.weight", 2)[0] - 1
    return CLIPVisionConfig(
        hidden_size=width, intermediate_size=shape_of(shapes, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        projection_dim=shape_of(shapes, "visual_projection.weight", 2)[0],
        num_hidden_layers=count_of(shapes, "encoder.layers"), num_attention_heads=16 if width >= 1024 else width // 64,
        image_size=patch * round(places**0.5), patch_size=patch, hidden_act="quick_gelu" if width == 1024 else "gelu")
