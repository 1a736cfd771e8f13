"""Composable prompts: `AND` with weights; what two prompts differ in is taken out of a third."""

from ella_kd import And, Pipeline, draw, generate
from ella_kd.images import contact_sheet, save_image

sd = Pipeline.miniature()
heart = "The scene is set in a dark night. A red heart sits at the middle left."
ring = "The scene is set in a dark night. A blue ring sits at the middle right."
both = f"{heart} A blue ring sits at the middle right."
a, b, c = (sd.encode(text) for text in (both, heart, ring))
conds = {"both": a, "both + heart - ring": And((a, 1), (b, 1), (c, -1)),
         "both + ring - heart": And((a, 1), (b, -1), (c, 1))}
images = [draw(sd, cond, uncond=sd.encode(""), guidance=3.0, seeds=3)[0] for cond in conds.values()]
save_image(contact_sheet([(both, images)], list(conds)), "and_prompts.png")

# The same as text, with the settings kept in the picture:
picture = generate(sd, f"{both} AND {heart} AND {ring} :-1", syntax=True, scale=3.0, seeds=3)[0]
assert picture.image.tobytes() == images[1].tobytes()
