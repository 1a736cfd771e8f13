"""A clone is usable as it lies there: its samplers/ and models/ stand beside ella_kd/, not in it as when installed.

Without this, whoever installed with a plain `pip install .` and then works in the clone's root, where ./ella_kd comes
before the installed package, has no `ella_kd.models`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "ella_kd" / "models").exists() and (ROOT / "models" / "tsc.py").is_file():
    sys.modules["ella_kd"].__path__.append(str(ROOT))
