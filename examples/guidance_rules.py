"""Guidance rules are values that nest: what a high scale burns, and what keeps it from burning."""

from ella_kd import APG, CFG, PAG, Interval, Pipeline, Rescale, draw
from ella_kd.images import contact_sheet, save_image

sd = Pipeline.miniature()
prompts = ["The picture shows snow. A red heart sits in the center.",
           "The scene is set in a dark night. A green cross sits in the top left corner."]
rules = {
    "CFG 3": CFG(3),
    "CFG 14": CFG(14),
    "rescaled": Rescale(CFG(14), 0.7),
    "in an interval": Interval(CFG(14), sigma_lo=0.5, sigma_hi=8),
    "APG": APG(14),
    "falling with sigma": CFG(lambda sigma: 1 + 13 * min(sigma, 5) / 5),
    "CFG 3 and PAG 2": PAG(CFG(3), 2),
}
drawn = [draw(sd, sd.encode(prompts), uncond=sd.encode(""), guidance=rule, seeds=[1, 2]) for rule in rules.values()]
save_image(contact_sheet(list(zip(prompts, zip(*drawn))), list(rules)), "guidance_rules.png")
