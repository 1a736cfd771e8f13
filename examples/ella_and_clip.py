"""Sentences for ELLA and tags for CLIP: tokens side by side, at all noise levels or at some."""

from ella_kd import Concat, Pipeline, draw, window
from ella_kd.images import contact_sheet, save_image

sd = Pipeline.miniature()
sentence, tags = "The scene is set in a dark night. A red heart sits at the middle left.", "yellow cross top right"
ella, clip = sd.encode(sentence), sd.encode(tags, "plain")
nothing, no_tags = sd.encode(""), sd.encode("", "plain")
beside = Concat(nothing, no_tags)
conds = {
    "the sentence, by ELLA": (ella, nothing),
    "the tags, by CLIP": (clip, no_tags),
    "both, side by side": (Concat(ella, clip), beside),
    "tags above sigma 1 only": (Concat(ella, window(clip, sigma_lo=1)), beside),
    "tags below sigma 1 only": (Concat(ella, window(clip, sigma_hi=1)), beside),
}
images = [draw(sd, cond, uncond=uncond, guidance=3.0, seeds=1)[0] for cond, uncond in conds.values()]
save_image(contact_sheet([(f"sentence: {sentence}\ntags: {tags}", images)], list(conds)), "ella_and_clip.png")
