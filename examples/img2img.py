"""Image to image: the same noise level on every schedule, and still the tokens of exactly each step's timestep."""

from ella_kd import Pipeline, draw
from ella_kd.images import contact_sheet, save_image

sd = Pipeline.miniature()
before = "The scene is set in a dark night. A red heart sits in the center."
after = "The scene is set in a deep forest. A red heart sits in the center."
text, nothing = sd.encode(after), sd.encode("")
[image] = draw(sd, sd.encode(before), uncond=nothing, guidance=3.0, seeds=1)
[edited] = draw(sd, text, uncond=nothing, guidance=3.0, seeds=7, start=image, strength=0.8)
save_image(contact_sheet([(after, [image, edited])], ["before", "strength 0.8"]), "img2img.png")
