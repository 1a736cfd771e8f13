"""Guidance rules are values that nest: what a high scale burns at few steps, and what keeps it from burning."""

from ella_kd import CFG, TCFG, DynamicThreshold, Pipeline, Rescale, draw
from ella_kd.images import contact_sheet, save_image

sd = Pipeline.miniature()
prompts = [
    "The scene is set in a sandy desert. A red heart sits at the middle left. A blue ring sits at the middle right.",
    "The scene is set in a dark night. A green cross sits in the top left corner. A pink triangle is in the center.",
]
rules = {
    "CFG 3": CFG(3),
    "CFG 22": CFG(22),
    "rescaled": Rescale(CFG(22), 0.7),
    "thresholded": DynamicThreshold(CFG(22)),
    "TCFG 22": TCFG(22),
    "22 below sigma 1 only": CFG(lambda sigma: 22 if sigma < 1 else 3),
}
args = {"uncond": sd.encode(""), "steps": 10, "seeds": [1, 2]}
drawn = [draw(sd, sd.encode(prompts), guidance=rule, **args) for rule in rules.values()]
save_image(contact_sheet(list(zip(prompts, zip(*drawn))), list(rules)), "guidance_rules.png")
