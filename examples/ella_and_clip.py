"""Sentences for ELLA and tags for CLIP: tokens side by side, CLIP's only while the noise is high."""

from ella_kd import Concat, Pipeline, draw, window
from ella_kd.images import contact_sheet, save_image

sd = Pipeline.miniature()
sentences = "The scene is set in a dark night. A red heart sits at the middle left."
ella, clip = sd.encode(sentences), sd.encode("red heart middle left, night", "plain")
empty = Concat(sd.encode(""), sd.encode("", "plain"))
conds = {
    "ELLA": (ella, sd.encode("")),
    "ELLA + CLIP": (Concat(ella, clip), empty),
    "CLIP above sigma 5 only": (Concat(ella, window(clip, sigma_lo=5)), empty),
    "ELLA, negative prompt by CLIP": (ella, sd.encode("blue ring", "plain")),
}
images = [draw(sd, cond, uncond=uncond, guidance=3.0, seeds=2)[0] for cond, uncond in conds.values()]
save_image(contact_sheet([(sentences, images)], list(conds)), "ella_and_clip.png")
