"""`(phrase:1.3)` weighs the attention of ELLA's connector: of two sentences the heavier one is drawn."""

from ella_kd import Pipeline, draw
from ella_kd.images import contact_sheet, save_image

sd = Pipeline.miniature()
rows = []
weights = (0.3, 1, 3, 10)
for shape in ("heart", "ring", "cross"):
    said = f"A blue {shape} sits in the center. (A red {shape} sits in the center.:w)"
    prompts = [f"The scene is set in a dark night. {said}".replace(":w", f":{w}") for w in weights]
    cond = sd.encode(prompts, weighted=True)  # four prompts, one batch
    rows.append((said, draw(sd, cond, uncond=sd.encode(""), guidance=3.0, seeds=[5] * len(weights))))
save_image(contact_sheet(rows, [f"w = {w}" for w in weights]), "weights.png")
