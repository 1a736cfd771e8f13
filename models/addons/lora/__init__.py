"""LoRA and its relatives: files of changes to weights.

`LoRA.load(path)` reads every spelling, `with_lora(pipeline_or_network, [(lora, 0.8), ...])` gives a twin.
"""

from ella_kd.models.addons.lora.merging import with_lora
from ella_kd.models.addons.lora.reading import LoRA
from ella_kd.models.addons.lora.strength import Strength

__all__ = ["LoRA", "Strength", "with_lora"]
