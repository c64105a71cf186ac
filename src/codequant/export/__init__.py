"""A quantized folder in another engine's format.

`gguf`: Q8_0 tensors that hold the codebook weights exactly, for llama.cpp. `bf16`: plain safetensors, for everything
else. Both carry the weights only: how activations are quantized is then up to the engine.
"""

import os
import shutil
from importlib import import_module
from pathlib import Path

from codequant.errors import InputError

FORMATS = ("gguf", "bf16")


def export(folder: str | Path, out: str | Path, format: str) -> Path:
    """Write the model of a quantized folder to `out`: a file for "gguf", a folder for "bf16". Returns out.

    Raises InputError, naming the tensor or the field, for what the format cannot represent, and VerificationError
    where the folder is not whole; both before anything is written. `out` appears only when it is complete.
    """
    out = Path(out)
    if format not in FORMATS:
        raise InputError(f"format: {format!r}, expected one of {FORMATS}")
    if out.exists():
        raise InputError(f"out: {out} exists already, expected a new {'file' if format == 'gguf' else 'folder'}")
    if not out.absolute().parent.is_dir():
        raise InputError(f"out: {out.absolute().parent} is no folder, expected an existing parent folder")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        import_module(f"codequant.export.{format}").write(Path(folder), temporary)
        temporary.rename(out)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        raise
    return out
