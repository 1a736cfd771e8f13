"""One prompt while the noise is high, another below: a switch at a sigma, exact for every sampler and schedule."""

from ella_kd import Pipeline, Switch, draw
from ella_kd.images import contact_sheet, save_image

sd = Pipeline.miniature()
early = "The scene is set in a dark night. A blue ring sits in the top left corner."
late = "The scene is set in a snowy field. A red heart sits in the bottom right corner."
conds = {"late prompt alone": sd.encode(late)}
for sigma in (2.0, 1.5, 0.8):  # unguided, this model settles background and things between these
    conds[f"switch at sigma {sigma:g}"] = Switch(sd.encode(early), sd.encode(late), at=sigma)
conds["early prompt alone"] = sd.encode(early)
images = [draw(sd, cond, guidance=1.0, seeds=2)[0] for cond in conds.values()]
save_image(contact_sheet([(f"early: {early}\nlate: {late}", images)], list(conds)), "early_late.png")
