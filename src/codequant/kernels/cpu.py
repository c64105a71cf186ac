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
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from codequant import native
from codequant.errors import InputError
from codequant.hadamard import hadamard_factors, hadamard_transform
from codequant.kernels.reference import FULL_PRECISION, ExpertWeights, fake_quantize
from codequant.packing import PackedParts, PackedWeight, packed_columns

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")  # enum class Activation of native/isa.h
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum class Dtype of native/isa.h, as the next
INTEGERS = {torch.int64: 3, torch.int32: 4}
MAX_GROUP = 2**16  # columns: the integers of panel.h have room for no more


def unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"the native kernels run on cpu, not on {device_type}"
    if native.library() is None:
        return "the native library was not built: install a C++ compiler and reinstall codequant"
    native.instruction_set()
    return None


_library = cast(Callable[[], ctypes.CDLL], native.library)  # where it gives None, `unavailable` has said so


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

    @cached_property
    def matrices(self) -> native.Matrices:
        return native.Matrices(self.data.data_ptr(), *self.shape)


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
    data = torch.empty(_library().codequant_bytes(native.Matrices(None, *shape)), dtype=torch.uint8)
    _library().codequant_advise_huge_pages(data.data_ptr(), data.numel())
    panels = Panels(data, shape, tuple(stack))
    packed, codebook, step = [part.contiguous() for part in packed], codebook.contiguous(), step.float().contiguous()
    _library().codequant_to_panels(
        panels.matrices,
        _pointers(packed),
        math.prod(stack) // len(packed),
        codebook.data_ptr(),
        step.data_ptr(),
        torch.get_num_threads(),
    )
    return panels


def _restore_linear(panels: Panels) -> PackedWeight:
    shape, stack = panels.shape, panels.stack
    packed = torch.empty(*stack, packed_columns(shape.columns, shape.bits), dtype=torch.uint8)
    codebook = torch.empty(*stack, shape.groups, 2**shape.bits, dtype=torch.int8)
    step = torch.empty(*stack, shape.groups)
    _library().codequant_from_panels(
        panels.matrices,
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

    def operands(self) -> tuple[Any, ...]:
        """Where fused: what the operator `experts` takes after x, index and weight."""
        w, gate_up, down = self.weights, self.gate_up, self.down
        assert isinstance(gate_up, Panels) and isinstance(down, Panels) and w.activation is not None
        biases = (None if bias is None else bias.float().contiguous() for bias in (w.gate_up_bias, w.down_bias))
        activation = ACTIVATIONS.index(w.activation)
        bits, clip = [w.input_bits, w.down_bits], [w.input_clip, w.down_clip]
        transform = w.down_transform is not None
        return (
            gate_up.data,
            gate_up.shape,
            down.data,
            down.shape,
            *biases,
            w.has_gate,
            activation,
            bits,
            clip,
            transform,
        )

    @cached_property
    def layer(self) -> "Layer":
        """The same for the library. Made once: it takes long against decoding a token."""
        return _layer(*self.operands())


def prepare_experts(experts: ExpertWeights) -> PreparedExperts:
    gate_up, down = experts.gate_up, experts.down
    fused = (
        not isinstance(gate_up, Tensor)
        and not isinstance(down, Tensor)
        and experts.activation in ACTIVATIONS
        and experts.down_transform in (None, hadamard_transform)
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


# Calling the library: with cold caches an operator of PyTorch's costs a percent of decoding one layer, a function of
# Python's a tenth of that. Only the result is allocated; the library reads and writes the tensors' own dtypes.


def _given(x: Tensor, dtypes: dict[torch.dtype, int]) -> tuple[Tensor, int]:
    """x, contiguous and of one of these dtypes (the first if it has another), and the dtype's code."""
    code = dtypes.get(x.dtype)
    if code is None:
        x = x.to(next(iter(dtypes)))
        code = dtypes[x.dtype]
    return x.contiguous(), code


def _checked(x: Tensor, columns: int) -> tuple[Tensor, int]:
    """An input, contiguous, and its dtype's code."""
    code = FLOATS.get(x.dtype)
    if code is None or x.shape[-1] != columns:
        raise InputError(
            f"x: {x.dtype} {list(x.shape)}, expected float32, bfloat16 or float16 [..., {columns}]; "
            "CODEQUANT_BACKEND=reference computes in float64 too"
        )
    return x.contiguous(), code


def _linear(
    x: Tensor,
    expert: Tensor | None,
    matrices: native.Matrices,
    bias: Tensor | None,
    bits: int,
    clip: float,
    dtype: torch.dtype,
) -> Tensor:
    """x [T, I] -> [S, O]: slot s of the S = expert.numel() (or T) is a product of x[s // (S / T)] with the matrix
    expert[s] (or 0) of the stack, plus bias [count, O]; 0 where there is no such expert."""
    x, x_dtype = _checked(x, matrices.columns)
    expert, expert_dtype = (None, 0) if expert is None else _given(expert, INTEGERS)
    bias = None if bias is None else bias.float().contiguous()
    tokens = len(x)
    slots = tokens if expert is None else expert.numel()
    y = torch.empty(slots, matrices.rows, dtype=dtype)
    if slots:
        native.module.linear(
            ctypes.addressof(matrices),
            tokens,
            slots // tokens,
            x.data_ptr(),
            x_dtype,
            None if expert is None else expert.data_ptr(),
            expert_dtype,
            None if bias is None else bias.data_ptr(),
            bits,
            clip,
            torch.get_num_threads(),
            y.data_ptr(),
            FLOATS[dtype],
        )
    return y


class Layer(NamedTuple):
    """One layer's experts for the library."""

    address: int  # of a native.Experts
    columns: int
    rows: int
    memory: tuple[Any, ...]  # that and what it points into


def _layer(
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
    hadamard: bool,
) -> Layer:
    """bits and clip: of the input, of the intermediate, which `hadamard` transforms before."""
    first, second = native.Matrices(gate_up.data_ptr(), *gate_up_shape), native.Matrices(down.data_ptr(), *down_shape)
    biases = (None if bias is None else bias.data_ptr() for bias in (gate_up_bias, down_bias))
    pointers = ctypes.pointer(first), ctypes.pointer(second)
    transform, matrices = _transform(second.columns) if hadamard else (native.Transform(), [])
    arguments = native.Experts(*pointers, *biases, has_gate, activation, *bits, *clip, transform)
    memory = arguments, gate_up, down, gate_up_bias, down_bias, *matrices
    return Layer(ctypes.addressof(arguments), first.columns, second.rows, memory)


def _transform(columns: int) -> tuple[native.Transform, list[Tensor]]:
    """The Hadamard transform for the library, and the tensors that it points into."""
    factors, scale = hadamard_factors(columns)
    padded = [None if matrix is None else F.pad(matrix, (0, -order % 16)) for order, matrix in factors]
    entries = [
        native.Factor(order, None if matrix is None else matrix.data_ptr())
        for (order, _), matrix in zip(factors, padded, strict=True)
    ]
    array = (native.Factor * len(entries))(*entries)
    return native.Transform(array, len(entries), scale), [matrix for matrix in padded if matrix is not None]


def _experts(x: Tensor, index: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """x [T, I], index and weight [T, k] -> [T, O] in x's dtype."""
    address, columns, rows, _ = layer
    x, x_dtype = _checked(x, columns)
    (index, index_dtype), (weight, weight_dtype) = _given(index, INTEGERS), _given(weight, FLOATS)
    tokens, share = index.shape
    y = torch.empty(tokens, rows, dtype=x.dtype)
    native.module.experts(
        address,
        tokens,
        share,
        x.data_ptr(),
        x_dtype,
        index.data_ptr(),
        index_dtype,
        weight.data_ptr(),
        weight_dtype,
        torch.get_num_threads(),
        y.data_ptr(),
    )
    return y


# The same as operators with a fake version each, so that torch.compile sees through everything around them. Only it
# calls them: PyTorch's dispatcher takes a tenth of the time of decoding one layer.

_operators = torch.library.Library("codequant_cpu", "DEF")


def _operator(schema: str, fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = _operators.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
        _operators.impl(name, function, "CPU")
        torch.library.register_fake(f"codequant_cpu::{name}", fake, lib=_operators)
        return function

    return register


@_operator(
    "linear(Tensor x, Tensor? expert, Tensor data, int[] shape, Tensor? bias, int bits, float clip, "
    "ScalarType dtype) -> Tensor",
    fake=lambda x, expert, data, shape, bias, bits, clip, dtype: x.new_empty(
        len(x) if expert is None else expert.numel(), shape[1], dtype=dtype
    ),
)
def _linear_operator(x: Tensor, expert: Tensor | None, data: Tensor, shape: list[int], *others: Any) -> Tensor:
    return _linear(x, expert, native.Matrices(data.data_ptr(), *shape), *others)


@_operator(
    "plain_linear(Tensor x, Tensor expert, Tensor weight, Tensor? bias, int bits, float clip) -> Tensor",
    fake=lambda x, expert, weight, bias, bits, clip: x.new_empty(expert.numel(), weight.shape[1], dtype=torch.float32),
)
def _plain_linear(x: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None, bits: int, clip: float) -> Tensor:
    """`_linear` of a plain weight [E, O, I], by PyTorch, in float32."""
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
    "float[] clip, bool hadamard) -> Tensor",
    fake=lambda x, index, weight, gate_up, gate_up_shape, down, down_shape, *_: x.new_empty(len(x), down_shape[1]),
)
def _experts_operator(x: Tensor, index: Tensor, weight: Tensor, *operands: Any) -> Tensor:
    return _experts(x, index, weight, _layer(*operands))


# Computing


def _product(
    x: Tensor, expert: Tensor | None, panels: Panels, bias: Tensor | None, bits: int, clip: float, dtype: torch.dtype
) -> Tensor:
    if is_compiling():
        return torch.ops.codequant_cpu.linear(x, expert, panels.data, panels.shape, bias, bits, clip, dtype)
    return _linear(x, expert, panels.matrices, bias, bits, clip, dtype)


def linear(
    x: Tensor, prepared: Panels, bias: Tensor | None = None, activation_bits: int = FULL_PRECISION, clip: float = 1.0
) -> Tensor:
    y = _product(x.reshape(-1, x.shape[-1]), None, prepared, bias, activation_bits, clip, x.dtype)
    return y.reshape(*x.shape[:-1], prepared.shape.rows)


def _project(x: Tensor, expert: Tensor, weight: Panels | Tensor, bias: Tensor | None, bits: int, clip: float) -> Tensor:
    if isinstance(weight, Panels):
        return _product(x, expert, weight, bias, bits, clip, torch.float32)
    return torch.ops.codequant_cpu.plain_linear(x, expert, weight, bias, bits, clip)


def experts(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, prepared: PreparedExperts) -> Tensor:
    if prepared.fused:
        if is_compiling():
            return torch.ops.codequant_cpu.experts(x, top_k_index, top_k_weights, *prepared.operands())
        return _experts(x, top_k_index, top_k_weights, prepared.layer)
    w = prepared.weights
    hidden = w.apply_gate(_project(x, top_k_index, prepared.gate_up, w.gate_up_bias, w.input_bits, w.input_clip))
    if w.down_transform is not None:
        hidden = w.down_transform(hidden)
    out = _project(hidden, top_k_index, prepared.down, w.down_bias, w.down_bits, w.down_clip)  # [T * k, O]
    out = out.view(*top_k_index.shape, -1) * top_k_weights.float().unsqueeze(-1)
    return out.sum(1).to(x.dtype)
