"""Triton's interpreter cannot run inline PTX; this module teaches it the instructions that the kernels use.

The assembly text itself is executed, register by register, so a wrong selector or constraint fails a test on a machine
without a GPU.
"""

import re

import numpy as np
from triton.runtime import interpreter


def _prmt(a, b, selector):
    pool = [(a >> (8 * i)) & 0xFF for i in range(4)] + [(b >> (8 * i)) & 0xFF for i in range(4)]
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 0xF
        byte = np.choose(nibble & 7, pool)
        byte = np.where(nibble & 8, (byte >> 7) * 0xFF, byte)  # bit 3 of a selector replicates the sign
        result |= byte.astype(np.uint32) << (8 * i)
    return result


def _dp4a(a, b, c):
    a, b = (np.ascontiguousarray(v).view(np.int8).reshape(*v.shape, 4).astype(np.int32) for v in (a, b))
    return ((a * b).sum(-1, dtype=np.int32) + c.view(np.int32)).view(np.uint32)


def _dp2a_hi(a, b, c):
    return c + (a & 0xFFFF) * (b >> 16 & 0xFF) + (a >> 16) * (b >> 24)


def _sub_f16x2(a, b):
    a, b = (np.ascontiguousarray(v).view(np.float16).reshape(*v.shape, 2) for v in np.broadcast_arrays(a, b))
    return np.ascontiguousarray(a - b).view(np.uint32)[..., 0]


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "sub.f16x2": _sub_f16x2,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "prmt.b32": _prmt,
    "dp4a.s32.s32": _dp4a,
    "dp2a.hi.u32.u32": _dp2a_hi,
    "ex2.approx.ftz.f32": lambda a: np.exp2(a.view(np.float32)).view(np.uint32),
    "rcp.approx.ftz.f32": lambda a: (np.float32(1) / a.view(np.float32)).view(np.uint32),
}


def run(asm: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """uint32 arrays for $outputs, $outputs+1, ... -> arrays for $0 .. $outputs-1."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for statement in asm.strip().strip("{}").split(";"):
        statement = statement.strip()
        if not statement or statement.startswith(".reg"):
            continue
        name, operands = statement.split(None, 1)
        target, *sources = [o.strip() for o in operands.split(",")]
        values = [registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources]
        registers[target] = INSTRUCTIONS[name](*values)
    return [registers[f"${i}"] for i in range(outputs)]


class _Results:
    def __init__(self, handles):
        self.get_result = handles.__getitem__


def _create_inline_asm(self, asm, constraints, values, types, is_pure, pack):
    registers = []
    for value in values:  # a register holds 4 / itemsize consecutive elements
        a = np.ascontiguousarray(value.data).reshape(-1, pack)
        registers += list(a.view(np.uint32).T) if a.dtype.itemsize * pack == 4 else list(a.T.view(np.uint32))
    with np.errstate(divide="ignore"):
        results = run(asm, registers, len(re.findall("=", constraints)))
    shape, handles = values[0].data.shape, []
    for value, ty in zip(results, types, strict=True):
        data = np.ascontiguousarray(value).view(interpreter._get_np_dtype(ty.scalar)).reshape(shape)
        handles.append(interpreter.TensorHandle(data, ty.scalar))
    return _Results(handles)


def install() -> None:
    interpreter.InterpreterBuilder.create_inline_asm = _create_inline_asm
