"""Very many tokens with unquantized activations: weights into scratch memory, products by the vendor's library.

Looking weights up inside a product costs up to half of its speed; done once for all tokens of a call, it costs a pass
over the weights. The scratch holds one matrix in the activations' type, and is freed with the call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from codequant.kernels.triton.layout import TritonWeight, padded_group
from codequant.kernels.triton.ptx import lookup_bytes


@triton.jit
def _dequantize(
    packed,
    table,
    step,
    out,
    R,
    S,
    G: tl.constexpr,
    P: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """packed uint8 [R, G * P / 2], table [R, G, 4] and step [R, G] -> out [R, G * S]."""
    HALF: tl.constexpr = P // 2
    PER_GROUP: tl.constexpr = (HALF + BK - 1) // BK
    g = tl.program_id(1) // PER_GROUP
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = (tl.program_id(1) % PER_GROUP) * BK + tl.arange(0, BK)
    inside = (row < R)[:, None] & (k < HALF)[None, :]
    row = tl.minimum(row, R - 1)
    group = row * G + g
    w = tl.load(packed + group[:, None] * HALF + k[None, :], mask=inside, other=0)
    entries = table + group * 4
    low, high = lookup_bytes(
        w,
        tl.load(entries)[:, None],
        tl.load(entries + 1)[:, None],
        tl.load(entries + 2)[:, None],
        tl.load(entries + 3)[:, None],
    )
    scale = tl.load(step + group)[:, None]
    at = out + group[:, None] * S + k[None, :]
    tl.store(at, (low.to(tl.float32) * scale).to(out.dtype.element_ty), mask=inside & (k < S)[None, :])
    tl.store(at + HALF, (high.to(tl.float32) * scale).to(out.dtype.element_ty), mask=inside & (HALF + k < S)[None, :])


def dequantize(weight: TritonWeight, dtype: torch.dtype) -> Tensor:
    """The matrices [E, O, I], rounded to `dtype`."""
    E, O, _ = weight.words.shape
    S, R = weight.in_features // weight.groups, E * O
    P = padded_group(S)
    out = torch.empty(E, O, weight.in_features, dtype=dtype, device=weight.words.device)
    BN, BK = 16, min(128, triton.next_power_of_2(P // 2))
    _dequantize[(triton.cdiv(R, BN), weight.groups * triton.cdiv(P // 2, BK))](  # a grid's second axis ends at 65535
        weight.words.view(torch.uint8), weight.table, weight.step, out, R, S, weight.groups, P, BN, BK, num_warps=4
    )
    return out
