"""A part of a picture drawn anew, and a picture drawn on beyond its side; what is kept is kept pixel for pixel."""

from PIL import Image

from ella_kd import Pipeline, draw
from ella_kd.images import contact_sheet, save_image

sd, night = Pipeline.miniature(), "The scene is set in a dark night. A red heart sits at the middle left."
ring, cross = (f"{night} A {thing} sits at the middle right." for thing in ("blue ring", "yellow cross"))
nothing = sd.encode("")
[image] = draw(sd, sd.encode(ring), uncond=nothing, guidance=3.0, seeds=1)
width, height = image.size
edge = round(2 * width / 3 / sd.vae.factor) * sd.vae.factor  # in whole latents
mask = Image.new("L", image.size)
mask.paste(255, (edge, 0, width, height))
text = sd.encode(cross)
[repainted] = draw(sd, text, uncond=nothing, guidance=3.0, seeds=2, start=image, mask=mask, mask_blur=0)
part = image.crop((0, 0, edge, height))
[extended] = draw(sd, text, uncond=nothing, guidance=3.0, seeds=3, start=part, extend=f"right={width - edge}")
columns = ["before", "mask", "repainted", "a part", "drawn on to the right"]
save_image(contact_sheet([(cross, [image, mask, repainted, part, extended])], columns), "inpainting.png")
