"""Each half of the picture by its own prompt, with a soft border."""

from ella_kd import Box, Pipeline, Regions, draw
from ella_kd.images import contact_sheet, save_image

sd = Pipeline.miniature()  # or Pipeline.load(checkpoint, tsc=..., t5=...)
left = "The scene is set in a dark night. A red heart sits at the middle left."
right = "The scene is set in a dark night. A blue ring sits at the middle right."
cond = Regions(
    (sd.encode(left), Box(0, 0, 0.5, 1)),  # left, top, right, bottom, in fractions of the sides
    (sd.encode(right), Box(0.5, 0, 1, 1)),
    feather=0.1,
)
images = draw(sd, cond, uncond=sd.encode(""), guidance=3.0, seeds=[1, 2, 3, 4])
save_image(contact_sheet([(f"{left}\n{right}", images)], [f"seed {seed}" for seed in (1, 2, 3, 4)]), "regions.png")
