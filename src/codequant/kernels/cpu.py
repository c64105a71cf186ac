"""The native CPU kernels as PyTorch operators: repacking, codebook linear, and the fused feed-forward of experts.

What is computed is `reference`'s, in float32 whatever x's dtype. With activation bits 4 and 8 the integers are the
same, and only the rounding of a few float32 products differs. With 16 bits the kernels take each token as a 24-bit
integer (see native/isa.h), no less exact than a float32 dot product. With S sums of at most 2048 columns of one group,

    |y - reference in float64| <= (20 + S) * 2**-23 * max|x| * sum_i |W[o, i]|

where 20 bounds the roundings to float32, one by one. A token's result depends neither on the number of threads, nor on
the other tokens of the call, nor on the instruction set; see native/panel.h.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant import native
from codequant.errors import InputError
from codequant.kernels.reference import FULL_PRECISION, ExpertWeights, fake_quantize
from codequant.packing import PackedParts, PackedWeight, packed_columns

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")  # enum class Activation of native/isa.h
MAX_GROUP = 2**16  # columns: the integers of panel.h have room for no more


def unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"the native kernels run on cpu, not on {device_type}"
    if native.library() is None:
        return "the native library was not built: install a C++ compiler and reinstall codequant"
    native.instruction_set()
    return None


def _library() -> ctypes.CDLL:
    library = native.library()
    assert library is not None  # `unavailable` has said so
    return library


# Preparing


class Shape(NamedTuple):
    """Of a stack of matrices; the fields of layout.h's `Matrices` beside the pointer."""

    matrices: int
    rows: int
    columns: int
    groups: int
    bits: int


@dataclass(frozen=True)
class Panels:
    """A stack of matrices in the kernels' own layout (native/layout.h)."""

    data: Tensor  # uint8 [bytes], of this machine only: never saved
    shape: Shape
    stack: tuple[int, ...]  # [..., O] of the weight it was made from, whose rows in order are those of the matrices


def _pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def prepare_linear(weight: PackedWeight | PackedParts, split: int = 1) -> Panels:
    """Repack a matrix, or a stack of matrices, for the kernels, each of them as `split` of equal height; in time, about
    what reading it from a file takes."""
    if isinstance(weight, PackedParts):  # what is joined are codebooks and steps, which are small
        packed, codebook, step = weight.tensors("packed"), weight.joined("codebook"), weight.joined("step")
    else:
        packed, codebook, step = [weight.packed], weight.codebook, weight.step
    if weight.group_size > MAX_GROUP:
        raise InputError(f"group_size: {weight.group_size} columns to a codebook, the native kernels take {MAX_GROUP}")
    *stack, groups, _ = codebook.shape
    shape = Shape(math.prod(stack[:-1]) * split, stack[-1] // split, weight.in_features, groups, weight.bits)
    matrices = native.Matrices(None, *shape)
    data = torch.empty(_library().codequant_bytes(matrices), dtype=torch.uint8)
    _library().codequant_advise_huge_pages(data.data_ptr(), data.numel())
    matrices.panels = data.data_ptr()
    packed, codebook, step = [part.contiguous() for part in packed], codebook.contiguous(), step.float().contiguous()
    _library().codequant_to_panels(
        matrices,
        _pointers(packed),
        math.prod(stack) // len(packed),
        codebook.data_ptr(),
        step.data_ptr(),
        torch.get_num_threads(),
    )
    return Panels(data, shape, tuple(stack))


def _restore_linear(panels: Panels) -> PackedWeight:
    shape, stack = panels.shape, panels.stack
    packed = torch.empty(*stack, packed_columns(shape.columns, shape.bits), dtype=torch.uint8)
    codebook = torch.empty(*stack, shape.groups, 2**shape.bits, dtype=torch.int8)
    step = torch.empty(*stack, shape.groups)
    _library().codequant_from_panels(
        native.Matrices(panels.data.data_ptr(), *shape),
        _pointers([packed]),
        math.prod(stack),
        codebook.data_ptr(),
        step.data_ptr(),
        torch.get_num_threads(),
    )
    return PackedWeight(packed, codebook, step.to(torch.float16), shape.columns)


@dataclass(frozen=True)
class PreparedExperts:
    """ExpertWeights whose quantized matrices are Panels. Where `fused`, gate_up is [E, 2, M, I]: whole panels of gate
    and of up, that one kernel runs through side by side."""

    gate_up: Panels | Tensor
    down: Panels | Tensor
    weights: ExpertWeights  # everything but gate_up and down, which are empty here
    fused: bool


def prepare_experts(experts: ExpertWeights) -> PreparedExperts:
    gate_up, down = experts.gate_up, experts.down
    fused = (
        not isinstance(gate_up, Tensor)
        and not isinstance(down, Tensor)
        and experts.activation in ACTIVATIONS
        and experts.down_transform is None
    )
    nothing = torch.empty(0)
    return PreparedExperts(
        gate_up if isinstance(gate_up, Tensor) else prepare_linear(gate_up, 2 if fused and experts.has_gate else 1),
        down if isinstance(down, Tensor) else prepare_linear(down),
        replace(experts, gate_up=nothing, down=nothing),
        fused,
    )


def restore(prepared: Panels | PreparedExperts) -> PackedWeight | ExpertWeights:
    if isinstance(prepared, Panels):
        return _restore_linear(prepared)
    gate_up, down = (
        _restore_linear(weight) if isinstance(weight, Panels) else weight
        for weight in (prepared.gate_up, prepared.down)
    )
    return replace(prepared.weights, gate_up=gate_up, down=down)


# Operators: thin, with a fake version each, so that torch.compile sees through everything around them. Outside of it
# they are called directly: with cold caches PyTorch's dispatcher takes a tenth of the time of decoding one layer.

_operators = torch.library.Library("codequant_cpu", "DEF")


def _operator(schema: str, fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = _operators.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
        _operators.impl(name, function, "CPU")
        torch.library.register_fake(f"codequant_cpu::{name}", fake, lib=_operators)
        operator = getattr(torch.ops.codequant_cpu, name)

        def call(*arguments: Any) -> Tensor:
            return operator(*arguments) if torch.compiler.is_compiling() else function(*arguments)

        return call

    return register


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else _as(x, torch.float32)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


@lru_cache(maxsize=4096)
def _matrices(pointer: int, shape: tuple[int, ...]) -> native.Matrices:
    return native.Matrices(pointer, *shape)


@lru_cache(maxsize=4096)
def _arguments(
    gate_up: int, gate_up_shape: tuple[int, ...], down: int, down_shape: tuple[int, ...], *others: Any
) -> native.Experts:
    matrices = _matrices(gate_up, gate_up_shape), _matrices(down, down_shape)
    return native.Experts(*map(ctypes.pointer, matrices), *others)


def _check(status: int) -> None:
    if status:
        raise MemoryError("codequant's native kernels could not allocate their workspace")


def _check_input(x: Tensor, columns: int) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.shape[-1] != columns:
        raise InputError(
            f"x: {x.dtype} {list(x.shape)}, expected float32, bfloat16 or float16 [..., {columns}]; "
            "CODEQUANT_BACKEND=reference computes in float64 too"
        )


@_operator(
    "linear(Tensor x, Tensor? expert, Tensor data, int[] shape, Tensor? bias, int bits, float clip) -> Tensor",
    fake=lambda x, expert, data, shape, bias, bits, clip: x.new_empty(
        len(x) if expert is None else expert.numel(), shape[1], dtype=torch.float32
    ),
)
def _linear(
    x: Tensor, expert: Tensor | None, data: Tensor, shape: list[int], bias: Tensor | None, bits: int, clip: float
) -> Tensor:
    """x [T, I] -> float32 [S, O]: slot s of the S = expert.numel() (or T) is a product of x[s // (S / T)] with the
    matrix expert[s] (or 0) of the stack, plus bias [count, O]; 0 where there is no such expert."""
    _check_input(x, shape[2])
    x, bias, expert = _as(x, torch.float32), _float(bias), None if expert is None else _as(expert, torch.int64)
    tokens = len(x)
    slots = tokens if expert is None else expert.numel()
    y = torch.empty(slots, shape[1])
    if slots:
        _check(
            _library().codequant_linear(
                _matrices(data.data_ptr(), tuple(shape)),
                x.data_ptr(),
                tokens,
                slots // tokens,
                _pointer(expert),
                _pointer(bias),
                bits,
                clip,
                torch.get_num_threads(),
                y.data_ptr(),
            )
        )
    return y


@_operator(
    "plain_linear(Tensor x, Tensor expert, Tensor weight, Tensor? bias, int bits, float clip) -> Tensor",
    fake=lambda x, expert, weight, bias, bits, clip: x.new_empty(expert.numel(), weight.shape[1], dtype=torch.float32),
)
def _plain_linear(x: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None, bits: int, clip: float) -> Tensor:
    """`_linear` of a plain weight [E, O, I], by PyTorch."""
    x, expert = fake_quantize(x.float(), bits, clip), expert.flatten()
    share = expert.numel() // max(len(x), 1)
    y = torch.zeros(expert.numel(), weight.shape[1])
    for e in torch.unique(expert).tolist():
        if 0 <= e < len(weight):
            slot = (expert == e).nonzero().squeeze(1)
            y[slot] = F.linear(x[slot // share], weight[e].float(), None if bias is None else bias[e].float())
    return y


@_operator(
    "experts(Tensor x, Tensor index, Tensor weight, Tensor gate_up, int[] gate_up_shape, Tensor down, "
    "int[] down_shape, Tensor? gate_up_bias, Tensor? down_bias, bool has_gate, int activation, int[] bits, "
    "float[] clip) -> Tensor",
    fake=lambda x, index, weight, gate_up, gate_up_shape, down, down_shape, *_: x.new_empty(
        len(x), down_shape[1], dtype=torch.float32
    ),
)
def _experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    gate_up_shape: list[int],
    down: Tensor,
    down_shape: list[int],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    has_gate: bool,
    activation: int,
    bits: list[int],
    clip: list[float],
) -> Tensor:
    """x [T, I], index and weight [T, k] -> float32 [T, O]. bits and clip: of the input, of the intermediate."""
    _check_input(x, gate_up_shape[2])
    x, weight, index = _as(x, torch.float32), _as(weight, torch.float32), _as(index, torch.int64)
    gate_up_bias, down_bias = _float(gate_up_bias), _float(down_bias)
    y = torch.empty(len(x), down_shape[1])
    arguments = _arguments(
        gate_up.data_ptr(),
        tuple(gate_up_shape),
        down.data_ptr(),
        tuple(down_shape),
        _pointer(gate_up_bias),
        _pointer(down_bias),
        has_gate,
        activation,
        *bits,
        *clip,
    )
    _check(
        _library().codequant_experts(
            arguments,
            x.data_ptr(),
            len(x),
            index.shape[-1],
            index.data_ptr(),
            weight.data_ptr(),
            torch.get_num_threads(),
            y.data_ptr(),
        )
    )
    return y


# Computing


def linear(
    x: Tensor, prepared: Panels, bias: Tensor | None = None, activation_bits: int = FULL_PRECISION, clip: float = 1.0
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    y = _linear(flat, None, prepared.data, prepared.shape, bias, activation_bits, clip)
    return y.to(x.dtype).reshape(*x.shape[:-1], prepared.shape.rows)


def _project(x: Tensor, expert: Tensor, weight: Panels | Tensor, bias: Tensor | None, bits: int, clip: float) -> Tensor:
    if isinstance(weight, Tensor):
        return _plain_linear(x, expert, weight, bias, bits, clip)
    return _linear(x, expert, weight.data, weight.shape, bias, bits, clip)


def experts(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, prepared: PreparedExperts) -> Tensor:
    w, gate_up, down = prepared.weights, prepared.gate_up, prepared.down
    if prepared.fused:
        assert isinstance(gate_up, Panels) and isinstance(down, Panels) and w.activation is not None
        y = _experts(
            x,
            top_k_index,
            top_k_weights,
            gate_up.data,
            gate_up.shape,
            down.data,
            down.shape,
            w.gate_up_bias,
            w.down_bias,
            w.has_gate,
            ACTIVATIONS.index(w.activation),
            [w.input_bits, w.down_bits],
            [w.input_clip, w.down_clip],
        )
        return y.to(x.dtype)
    hidden = w.apply_gate(_project(x, top_k_index, gate_up, w.gate_up_bias, w.input_bits, w.input_clip))
    if w.down_transform is not None:
        hidden = w.down_transform(hidden)
    out = _project(hidden, top_k_index, down, w.down_bias, w.down_bits, w.down_clip)  # [T * k, O]
    out = out.view(*top_k_index.shape, -1) * top_k_weights.float().unsqueeze(-1)
    return out.sum(1).to(x.dtype)
