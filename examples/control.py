"""A ControlNet: the prompt says what and in which colours, the edges of a picture say where."""

from ella_kd import Pipeline, draw
from ella_kd.images import contact_sheet, save_image
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.addons.preprocessing import canny
from ella_kd.pipeline import MINIATURE

sd = Pipeline.miniature()  # or Pipeline.load(checkpoint, tsc=..., t5=...)
edges = ControlNet.load(MINIATURE / "addons" / "edges.safetensors", base=sd.unet)  # base: it is a Control-LoRA
rows = []
for seen, prompt in (("A red heart sits in the center. A yellow ring sits at the top left.",
                      "The scene is set in snow. There is a pink ring. There is a green heart."),
                     ("A pink cross sits at the middle right. A cyan square sits at the bottom left.",
                      "The scene is set in a dark night. There is a red cross. There is a yellow square.")):
    [picture] = draw(sd, sd.encode(f"The scene is set in a desert. {seen}"), uncond=sd.encode(""), guidance=3.0)
    hint = canny(picture)
    plain, nothing = sd.encode(prompt), sd.encode("")
    [without] = draw(sd, plain, uncond=nothing, guidance=3.0)
    [steered] = draw(sd, plain.with_control(edges, hint), uncond=nothing.with_control(edges, hint), guidance=3.0)
    rows.append((prompt, [picture, hint, without, steered]))
save_image(contact_sheet(rows, ["a picture", "its edges", "the prompt alone", "with the edges"]), "control.png")
