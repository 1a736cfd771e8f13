"""From one prompt to another: between the tokens of two prompts, at every timestep."""

from ella_kd import Lerp, Pipeline, Stack, draw
from ella_kd.images import contact_sheet, save_image

sd = Pipeline.miniature()
a = "The scene is set in a dark night. A red heart sits in the center."
b = "The scene is set in a dark night. A yellow heart sits in the center."
weights = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
travel = Stack(*(Lerp(sd.encode(a), sd.encode(b), weight) for weight in weights))  # one batch, one row each
images = draw(sd, travel, uncond=sd.encode(""), guidance=3.0, seeds=[1] * len(weights))
save_image(contact_sheet([(f"{a}\n{b}", images)], [f"{weight:g}" for weight in weights]), "prompt_travel.png")
