"""What `codequant demo` works on: a small MoE language model, text to calibrate it and text to evaluate it."""

from importlib.resources import files
from pathlib import Path

_DATA = Path(str(files(__name__)))  # a real folder: readers of models want paths, not streams

DEMO_MODEL = _DATA / "tiny-qwen3-moe"
DEMO_CALIBRATION = _DATA / "demo_calibration.txt"
DEMO_HELDOUT = _DATA / "demo_heldout.txt"
