"""The activation functions that kernels fuse, by their names in transformers."""

import triton
import triton.language as tl

from codequant.kernels.triton.ptx import exp2, reciprocal

FUSED = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@triton.jit
def activate(x, NAME: tl.constexpr):
    """float32 -> float32."""
    if NAME == "silu":
        x = x * reciprocal(1.0 + exp2(x * -1.4426950408889634))
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif NAME == "relu":
        x = tl.maximum(x, 0.0)
    return x
