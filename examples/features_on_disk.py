"""T5 is needed once: its features go to a file, and sampling needs only the connector (67 M parameters, not 1.2 B)."""

from dataclasses import replace

from ella_kd import Pipeline, draw
from ella_kd.models import load_features, save_features

sd = Pipeline.miniature()
prompt = "The scene is set in a dark night. A red heart sits in the center."
save_features("heart.safetensors", sd.t5([prompt]), [prompt], encoder="miniature", mode="flexible")
save_features("empty.safetensors", sd.t5([""]), [""], encoder="miniature", mode="flexible")

without_t5 = replace(sd, t5=None)
cond, uncond = load_features("heart.safetensors"), load_features("empty.safetensors")
print(cond.prompts, cond.mode)
[image] = draw(without_t5, cond.features, uncond=uncond.features, guidance=3.0, seeds=1)
image.save("heart.png")
