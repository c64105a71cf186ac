"""The native library, if it was built: `library()` is a ctypes handle or None."""

import ctypes
from functools import cache
from importlib.util import find_spec


@cache
def library() -> ctypes.CDLL | None:
    """ctypes handle of the compiled kernels, or None where the package was installed without a compiler."""
    spec = find_spec("codequant._native")
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)
