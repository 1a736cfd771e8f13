"""One prompt while the noise is high, another below: a switch at a sigma, exact for every sampler and schedule."""

from ella_kd import Pipeline, Switch, draw
from ella_kd.images import contact_sheet, save_image

sd = Pipeline.miniature()
early, late = "The scene is set in a dark night.", "A red heart sits in the center."
conds = {"late alone": sd.encode(late)}
for sigma in (8.0, 4.0, 1.0):  # the background is settled at sigma 4, the object still free at 1
    conds[f"switch at sigma {sigma:g}"] = Switch(sd.encode(early), sd.encode(late), at=sigma)
columns = [draw(sd, cond, uncond=sd.encode(""), guidance=3.0, seeds=[0, 1, 2]) for cond in conds.values()]
rows = [(f"early: {early}\nlate: {late}", images) for images in zip(*columns)]
save_image(contact_sheet(rows, list(conds)), "early_late.png")
