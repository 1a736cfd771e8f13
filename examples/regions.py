"""Each half of the picture by its own prompt, with a soft border."""

from ella_kd import Box, Pipeline, Regions, draw
from ella_kd.images import contact_sheet, save_image

sd = Pipeline.miniature()  # or Pipeline.load(checkpoint, tsc=..., t5=...)
night = "The scene is set in a dark night."
a = f"{night} A red heart sits in the top left corner. A yellow cross sits in the bottom right corner."
b = f"{night} A blue ring sits in the bottom left corner. A green triangle sits in the top right corner."
one, two = sd.encode(a), sd.encode(b)
left, right = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)  # left, top, right, bottom, in fractions of the sides
conds = {
    "A": one,
    "B": two,
    "A left, B right": Regions((one, left), (two, right), feather=0.1),
    "B left, A right": Regions((two, left), (one, right), feather=0.1),
}
images = [draw(sd, cond, uncond=sd.encode(""), guidance=3.0, seeds=1)[0] for cond in conds.values()]
save_image(contact_sheet([(f"A: {a}\nB: {b}", images)], list(conds)), "regions.png")
