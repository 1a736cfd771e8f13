"""What a measurement was made on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import transformers


def machine() -> str:
    """Processor, threads and the versions that matter, in a line."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{processor}, {torch.get_num_threads()} threads, {versions}"
