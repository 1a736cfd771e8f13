"""What stays out of the graph of a compiled UNet. Imported where it is needed: torch._dynamo takes a second."""

import torch

from ella_kd.models import controls, image_prompts

added = torch.compiler.disable(controls.added)  # it runs networks of its own, which may be compiled by themselves
ready = torch.compiler.disable(image_prompts.ready)
