"""The native library, if it was built: `module` is its module of Python or None, and `library()` a ctypes handle of the
same file or None. Everything in it is `extern "C"`, its meaning said where the functions are (experts.h, repack.cpp,
dispatch.cpp, yardsticks.cpp). What a token calls hundreds of times is in the module, which says why; the argument types
of the rest are declared here."""

import ctypes
import os
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_uint64, c_void_p
from functools import cache
from importlib import import_module
from typing import Any

from codequant.errors import InputError

module: Any
try:
    module = import_module("codequant._native")
except ModuleNotFoundError:  # installed without a compiler
    module = None


class Matrices(ctypes.Structure):
    """`Matrices` of layout.h: a stack of `count` matrices of one shape."""

    _fields_ = [(name, c_int64) for name in ("count", "rows", "columns", "groups", "bits")]
    _fields_.insert(0, ("panels", c_void_p))


class Factor(ctypes.Structure):
    """`Factor` of isa.h."""

    _fields_ = [("order", c_int64), ("matrix", c_void_p)]


class Transform(ctypes.Structure):
    """`Transform` of isa.h."""

    _fields_ = [("factors", POINTER(Factor)), ("count", c_int64), ("scale", c_float)]


class Experts(ctypes.Structure):
    """`Experts` of experts.h."""

    _fields_ = [
        ("gate_up", POINTER(Matrices)),
        ("down", POINTER(Matrices)),
        ("gate_up_bias", c_void_p),
        ("down_bias", c_void_p),
        ("has_gate", c_int64),
        ("activation", c_int64),
        ("input_bits", c_int64),
        ("down_bits", c_int64),
        ("input_clip", c_float),
        ("down_clip", c_float),
        ("down_transform", Transform),
    ]


_MATRICES = POINTER(Matrices)
_FORMAT = [POINTER(c_void_p), c_int64, c_void_p, c_void_p]  # packed, part_rows, codebook, step
_SIGNATURES = {
    "codequant_isa": (c_char_p, [c_int64]),
    "codequant_use_isa": (c_int, [c_char_p]),
    "codequant_read": (c_uint64, [c_void_p, c_int64, c_int64]),
    "codequant_micro_kernel": (c_int64, [c_int64]),
    "codequant_bytes": (c_int64, [_MATRICES]),
    "codequant_advise_huge_pages": (None, [c_void_p, c_int64]),
    "codequant_to_panels": (None, [_MATRICES, *_FORMAT, c_int64]),
    "codequant_from_panels": (None, [_MATRICES, *_FORMAT, c_int64]),
}


@cache
def library() -> ctypes.CDLL | None:
    """ctypes handle of the compiled kernels, or None where the package was installed without a compiler."""
    if module is None:
        return None
    handle = ctypes.CDLL(module.__file__)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(handle, name)
        function.restype, function.argtypes = result, arguments
    return handle


def instruction_sets() -> list[str]:
    """Names of the instruction sets that both the library and this processor have, best first."""
    handle = library()
    assert handle is not None
    names: list[str] = []
    while name := handle.codequant_isa(len(names)):
        names.append(name.decode())
    return names


def use_instruction_set(name: str) -> None:
    """Compute with this one from now on, in the whole process. Raises InputError where this processor lacks it."""
    handle = library()
    assert handle is not None
    if handle.codequant_use_isa(name.encode()):
        raise InputError(f"CODEQUANT_ISA: {name!r}, expected one that this processor has: {instruction_sets()}")


@cache
def instruction_set() -> str:
    """The one chosen for this process: what CODEQUANT_ISA names, or else the best."""
    name = os.environ.get("CODEQUANT_ISA") or instruction_sets()[0]
    use_instruction_set(name)
    return name
