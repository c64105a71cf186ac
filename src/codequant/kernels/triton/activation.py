"""Activations as integers, the way the kernels multiply them.

8- and 4-bit activations follow `reference.quantize_activation`, operation by operation; the level is stored less
2**(bits-1), as int8. 16-bit ("unquantized") ones become fixed-point numbers of 16 bits in two int8 planes,

    x[i] ~ scale * (256 * high[i] + low[i]),   scale = max |x| / 32512,

so that they run on the same int8 lookups and products: the error is at most max |x| / 65024 per element, below the
spacing of bfloat16 for every element larger than max |x| / 254.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from codequant.kernels.triton.layout import padded_group

PLANE_PEAK = tl.constexpr(32512.0)  # 127 * 256: the high plane stays within int8


@triton.jit
def round_half_even(x):
    """float32 -> the nearest integer as int32, for |x| < 2**22: 1.5 * 2**23 more leaves no room for a fraction. Two
    additions, which are faster than a conversion."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def affine_range(lo, hi, clip, LEVELS: tl.constexpr):
    """Range of a token -> (lo, step, inverse step), rounded as PyTorch does it: its `levels / width` is a product."""
    lo = lo * clip
    hi = hi * clip
    width = hi - lo
    inverse = tl.where(width > 0, tl.div_rn(1.0, tl.where(width > 0, width, 1.0)) * LEVELS, 0.0)
    return lo, tl.div_rn(width, LEVELS * 1.0), inverse


@triton.jit
def affine_level(x, lo, inverse, LEVELS: tl.constexpr):
    """Level of x, 0..LEVELS, as int32."""
    return round_half_even(tl.minimum(tl.maximum((x - lo) * inverse, 0.0), LEVELS))


@triton.jit
def fixed_point_step(peak):
    """Largest magnitude of a token -> (step, inverse step) of 16-bit fixed point."""
    step = tl.div_rn(peak, PLANE_PEAK)
    return step, tl.where(peak > 0, tl.div_rn(PLANE_PEAK, tl.where(peak > 0, peak, 1.0)), 0.0)


@triton.jit
def fixed_point(x, inverse):
    """float32 -> int32 (high, low) with 256 * high + low = round(x * inverse), both within int8."""
    fixed = round_half_even(x * inverse)
    high = (fixed + 128) >> 8
    return high, fixed - high * 256


@triton.jit
def _extremes(lo, hi, other_lo, other_hi):
    return tl.minimum(lo, other_lo), tl.maximum(hi, other_hi)


@triton.jit
def _quantize(
    x,
    q_high,
    q_low,
    scale,
    zero,
    clip,
    I: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    PDL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token per program. Columns of the output are those of the padded groups; padding gets zeros."""
    if PDL and OVERLAP == "after":
        tl.extra.cuda.gdc_launch_dependents()
    if PDL and OVERLAP != "before":
        tl.extra.cuda.gdc_wait()
    if PDL and OVERLAP == "none":
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    source = (column // P) * S + column % P
    valid = (column < PADDED) & (column % P < S)
    value = tl.load(x + row * I + source, mask=valid, other=0.0).to(tl.float32)
    if BITS == 16:
        step, inverse = fixed_point_step(tl.max(tl.abs(value), 0))
        origin = 0.0
        high, low = fixed_point(value, inverse)
    else:
        LEVELS: tl.constexpr = 2**BITS - 1
        SHIFT: tl.constexpr = 2 ** (BITS - 1)
        ends = (tl.where(valid, value, float("inf")), tl.where(valid, value, float("-inf")))
        lo, hi = tl.reduce(ends, 0, _extremes)
        lo, step, inverse = affine_range(lo, hi, clip, LEVELS)
        origin = lo + SHIFT * step
        high = tl.where(valid, affine_level(value, lo, inverse, LEVELS) - SHIFT, 0)
    if PDL and OVERLAP == "before":
        tl.extra.cuda.gdc_wait()  # before the first write: the kernel before may still use what is here now
        tl.extra.cuda.gdc_launch_dependents()
    target = row * PADDED + column
    inside = column < PADDED
    tl.store(q_high + target, high.to(tl.int8), mask=inside)
    if BITS == 16:
        tl.store(q_low + target, low.to(tl.int8), mask=inside)
    tl.store(scale + row, step)
    tl.store(zero + row, origin)


def quantize(
    x: Tensor, groups: int, bits: int, clip: float, pdl: bool, overlap: str = "none"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [R, I] -> int8 planes (high, low) [R, G * P], float32 scale [R] and zero [R].

    x[r, i] ~ scale * high + zero for 4 and 8 bits (low is high, unused), scale * (256 * high + low) for 16.
    overlap: "before" computes while the kernel before this one runs, if x is older than that one; "after" lets the
    kernel after this one start at once and ask for its weights, if what it reads before it waits is older than both.
    """
    R, I = x.shape
    S = I // groups
    P = padded_group(S)
    high = torch.empty(R, groups * P, dtype=torch.int8, device=x.device)
    low = torch.empty_like(high) if bits == 16 else high
    scale, zero = torch.empty(2, R, dtype=torch.float32, device=x.device)
    BLOCK = triton.next_power_of_2(groups * P)
    _quantize[(R,)](
        x, high, low, scale, zero, clip, I, S, P, groups * P, BLOCK, bits, PDL=pdl, OVERLAP=overlap,
        num_warps=min(max(BLOCK // 1024, 1), 8), launch_pdl=pdl,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where the twin rounds twice
    )  # fmt: skip
    return high, low, scale, zero
