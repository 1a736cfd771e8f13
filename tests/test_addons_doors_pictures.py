"""Controls and image prompts through the doors of `generate`: followed, cut and extended as the start picture is."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import save_file

import ella_kd
from addon_files import PROMPT, draw
from ella_kd import Pipeline, addons
from ella_kd.models import UNet
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.addons.ip_adapter import IPAdapter
from ella_kd.pictures.canvas import Canvas
from ella_kd.pictures.options import FromPicture
from test_addons_ip_adapter import made, vision


def test_a_control_is_followed_where_it_is_asked_for(pipeline: Pipeline, files: Path) -> None:
    plain = draw(pipeline)
    assert draw(pipeline, control="edges.safetensors:room.png:0") == plain
    assert draw(pipeline, control="edges.safetensors:room.png:1:0.001-0") == plain
    drawn = draw(pipeline, control="edges.safetensors:room.png:0.8", mode="flexible")
    assert drawn != draw(pipeline, mode="flexible")
    net = ControlNet.load("edges.safetensors")
    cond, uncond = (pipeline.encode(text).with_control(net, "room.png", 0.8) for text in (PROMPT, ""))
    [wanted] = ella_kd.draw(pipeline, cond, uncond=uncond, seeds=1, steps=2, progress=False)
    assert drawn == [wanted.tobytes()]
    assert draw(pipeline, control="edges.safetensors:room.png:0.8:preprocess=canny", mode="flexible") != drawn


def test_a_control_is_of_the_whole_picture_where_a_part_is_drawn(pipeline: Pipeline, files: Path) -> None:
    mask = Image.new("L", (24, 24))
    mask.paste(255, (4, 8, 16, 20))
    options: dict[str, Any] = {"start": "room.png", "mask": mask, "crop_to_mask": True, "padding": 0, "width": 16,
                               "height": 16, "mask_blur": 0.0}
    with Image.open("room.png") as room:
        room.crop((4, 8, 16, 20)).save("part.png")
    seen: list[Any] = []
    steer = addons.as_conditioning

    def spy(cond: Any) -> Any:
        class Seen:
            def with_control(self, net: Any, picture: Image.Image, *more: Any, **how: Any) -> Any:
                seen.append(picture.tobytes())
                return steer(cond).with_control(net, picture, *more, **how)
        return Seen()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(addons, "as_conditioning", spy)
        draw(pipeline, control="edges.safetensors:room.png", **options)
    with Image.open("part.png") as part:
        assert seen == [part.tobytes()] * 2


@pytest.mark.parametrize(("asked", "size", "hint", "at"), [  # at: the left edge and the width of the square
    ({}, (48, 48), (96, 48), (12, 24)),
    ({}, (48, 48), (192, 96), (12, 24)),
    ({}, (96, 48), (192, 96), (72, 48)),  # nothing is cut: as it came
    ({"extend": "left=96"}, (96, 48), (96, 48), (132, 24)),
    ({"extend": "left=96"}, (96, 48), (192, 48), (36, 24)),  # of the canvas
    ({"extend": "left=96"}, (48, 48), (96, 48), (108, 24)),
])
def test_a_control_is_cut_and_extended_as_the_start_is(asked: dict[str, Any], size: tuple[int, int],
                                                       hint: tuple[int, int], at: tuple[int, int]) -> None:
    start = Image.new("RGB", (96, 48))
    start.paste((255, 255, 255), (36, 12, 60, 36))
    canvas = Canvas.of(FromPicture(start=start, **asked), size, (48, 48), 8)
    picture = start if hint == start.size else Image.new("RGB", hint)
    if picture is not start:
        picture.paste(start.resize((hint[1] * 2, hint[1])), (0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = canvas.part(picture)
    box = part.point(lambda value: 255 * (value > 127)).getbbox()
    assert box is not None and (box[0], box[2] - box[0]) == at
    if hint != (192, 48):
        theirs = canvas.image.resize(part.size).point(lambda value: 255 * (value > 127)).getbbox()
        assert theirs is not None and max(abs(a - b) for a, b in zip(theirs, box)) <= 1
    with pytest.warns(UserWarning, match="the control's picture is 40x90 and what is drawn .*: it is stretched"):
        canvas.part(Image.new("RGB", (40, 90)))


def test_a_picture_prompts(pipeline: Pipeline, files: Path) -> None:
    assert isinstance(pipeline.unet, UNet)
    adapter = made("base", pipeline.unet.config)
    save_file({name: x.clone() for name, x in adapter.state_dict().items()}, "ip.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no image encoder for ip.safetensors: expected image_encoder; name"):
        draw(pipeline, image_prompt="ip.safetensors:room.png")
    vision().save_pretrained(files / "comfy" / "clip_vision" / "vit")
    asked = "ip.safetensors:room.png:0.6"
    drawn = draw(pipeline, image_prompt=f"{asked}:encoder=vit", models_dir="comfy", mode="flexible")
    vision().save_pretrained(files / "image_encoder")
    assert drawn == draw(pipeline, image_prompt=[asked], mode="flexible") != draw(pipeline, mode="flexible")
    net = IPAdapter.load("ip.safetensors")
    cond, uncond = (pipeline.encode(text) for text in (PROMPT, ""))
    [wanted] = ella_kd.draw(pipeline, cond.with_image(net, "room.png", 0.6), uncond=uncond.with_image(net, None, 0.6),
                            seeds=1, steps=2, progress=False)
    assert drawn == [wanted.tobytes()]
    assert draw(pipeline, image_prompt=f"{asked}:0.001-0") == draw(pipeline)
