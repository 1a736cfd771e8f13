"""Pictures that somebody gives to the page."""

from typing import Any

from PIL import Image


def start_and_mask(value: dict[str, Any]) -> tuple[Image.Image | None, Image.Image | None]:
    """What an editor holds: the picture below, and white where somebody painted; None for none."""
    below, layers = value.get("background"), value.get("layers") or []
    if below is None or below.convert("RGBA").getextrema()[3][1] == 0:
        return None, None
    mask = Image.new("L", below.size)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A").resize(below.size)
        mask.paste(255, mask=alpha)
    return below, mask if mask.getbbox() else None


def painted(start: str, mask: str | None) -> dict[str, Any]:
    """The same the other way."""
    with Image.open(start) as image:
        below = image.convert("RGBA")
    layers = []
    if mask is not None:
        with Image.open(mask) as image:
            layers = [Image.new("RGBA", below.size, "white")]
            layers[0].putalpha(image.convert("L").resize(below.size))
    return {"background": below, "layers": layers, "composite": Image.alpha_composite(below, layers[0]) if layers else
            below}
