"""`(phrase:1.3)` weighs the attention that ELLA's connector pays to a phrase."""

from ella_kd import Pipeline, draw
from ella_kd.images import contact_sheet, save_image

sd = Pipeline.miniature()
rows = []
weights = (0.3, 1, 4, 10)
for shape in ("heart", "ring", "cross"):
    prompts = [f"The scene is set in a dark night. A (red:{w}) blue {shape} sits in the center." for w in weights]
    cond = sd.encode(prompts, weighted=True)  # four prompts, one batch
    images = draw(sd, cond, uncond=sd.encode(""), guidance=3.0, seeds=[5] * len(weights))
    rows.append((f"A (red:w) blue {shape} sits in the center.", images))
save_image(contact_sheet(rows, [f"w = {w}" for w in weights]), "weights.png")
