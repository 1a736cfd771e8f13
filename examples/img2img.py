"""Image to image: any part of any schedule, and still the tokens of exactly each step's timestep."""

import torch

from ella_kd import CFGDenoiser, ELLADenoiser, Pipeline, draw
from ella_kd.images import contact_sheet, save_image, to_images
from ella_kd.samplers import get_sigmas_karras, randn, sample_dpmpp_2m

sd = Pipeline.miniature()
before = "The scene is set in a dark night. A red heart sits in the center."
after = "The scene is set in a deep forest. A red heart sits in the center."
[image] = draw(sd, sd.encode(before), uncond=sd.encode(""), guidance=3.0, seeds=1)
pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 48, 48, 3).permute(0, 3, 1, 2)
denoiser = CFGDenoiser(ELLADenoiser(sd.unet, sd.tsc, sd.noise_schedule))
sigmas = get_sigmas_karras(20, denoiser.sigma_min, denoiser.sigma_max)[8:]  # the last 12 steps
with torch.no_grad():
    latents = sd.vae.encode(pixels / 127.5 - 1)
    x = latents + randn(latents.shape, [7]) * sigmas[0]
    args = {"cond": sd.t5(after), "uncond": sd.t5(""), "cond_scale": 3.0}
    [edited] = to_images(sd.vae.decode(sample_dpmpp_2m(denoiser, x, sigmas, extra_args=args)))
save_image(contact_sheet([(after, [image, edited])], ["before", "after"]), "img2img.png")
