"""LoRAs by weight, one alone and two together; each system is a value, and none of them changes another."""

from ella_kd import Pipeline, draw
from ella_kd.images import contact_sheet, save_image
from ella_kd.pipeline import MINIATURE

sd = Pipeline.miniature()  # or Pipeline.load(checkpoint, tsc=..., t5=...)
striped, azure = (MINIATURE / "addons" / f"{name}.safetensors" for name in ("striped", "azure"))
systems = {
    "no LoRA": sd,
    "striped 0.5": sd.with_lora([(striped, 0.5)]),
    "striped 1": sd.with_lora([(striped, 1.0)]),
    "azure 1": sd.with_lora([(azure, 1.0)]),
    "both": sd.with_lora([(striped, 1.0), (azure, 1.0)]),
}
rows = []
for prompt in ("The scene is set in a dark night. A red heart sits in the center. A yellow ring sits at the top left.",
               "The scene is set in snow. A green square sits in the center. A pink cross sits at the bottom right."):
    cond = sd.encode(prompt)
    rows.append((prompt, [draw(system, cond, uncond=sd.encode(""), guidance=3.0, seeds=1)[0]
                          for system in systems.values()]))
save_image(contact_sheet(rows, list(systems)), "lora.png")
