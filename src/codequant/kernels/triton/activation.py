"""Activations in the forms in which the kernels multiply them.

8- and 4-bit activations follow `reference.quantize_activation`, operation by operation; the level is stored less
2**(bits-1), as int8. 16-bit ("unquantized") ones become one of

- fixed point in two int8 planes, x[i] ~ scale * (256 * high[i] + low[i]) with scale = max |x| / 32512, which runs on
  the same int8 lookups and products: the error is at most max |x| / 65024 per element, below the spacing of bfloat16
  for every element larger than max |x| / 254;
- the same in three planes: at most max |x| / 1.6e7, below the rounding of the sum that the product is;
- float16 in units of a power of two: exact for bfloat16 and float16 elements down to max |x| / 2**29, and for smaller
  ones within max |x| / 2**39. float32 is rounded to 11 bits.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from codequant.kernels.triton.launch import Launch, allow_next, follow, wait
from codequant.kernels.triton.layout import padded_group


class Form(IntEnum):
    """Forms of activations; the integer ones by their number of int8 planes."""

    LEVELS = 1  # 4 and 8 bits
    FIXED16 = 2
    FIXED24 = 3
    FLOAT16 = 4

    @property
    def planes(self) -> int:
        return 1 if self is Form.FLOAT16 else self.value


class Activations(NamedTuple):
    """R tokens of G groups, each padded to P columns: x ~ scale * value + zero."""

    values: Tensor  # int8 [planes, R, G * P], high planes first; float16 [1, R, G * P] in the order of `lookup_pairs`
    scale: Tensor  # float32 [R]
    zero: Tensor  # float32 [R]; 0 but for LEVELS


FIXED16_PEAK = tl.constexpr(32512.0)  # 127 * 256: the high plane stays within int8
FIXED24_PEAK = tl.constexpr(8323072.0)  # 127 * 65536


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
def fixed_point_step(peak, PEAK: tl.constexpr):
    """Largest magnitude of a token -> (step, inverse step) of fixed point up to PEAK."""
    return tl.div_rn(peak, PEAK), tl.where(peak > 0, tl.div_rn(PEAK, tl.where(peak > 0, peak, 1.0)), 0.0)


@triton.jit
def fixed_point(x, inverse):
    """float32 -> int32 (high, low) with 256 * high + low = round(x * inverse), both within int8."""
    fixed = round_half_even(x * inverse)
    high = (fixed + 128) >> 8
    return high, fixed - high * 256


@triton.jit
def fixed_point_24(x, inverse):
    """float32 -> int32 (high, mid, low) with 65536 * high + 256 * mid + low = round(x * inverse), all within int8."""
    value = x * inverse
    upper = round_half_even(value * (1.0 / 65536))
    fixed = upper * 65536 + round_half_even(value - upper.to(tl.float32) * 65536.0)  # the difference is exact
    rest = (fixed + 128) >> 8
    high = (rest + 128) >> 8
    return high, rest - high * 256, fixed - rest * 256


@triton.jit
def power_of_two_step(peak):
    """Largest magnitude of a token -> (step, inverse step), powers of two that bring it to 2**14 .. 2**15."""
    exponent = tl.maximum((peak.to(tl.int32, bitcast=True) >> 23) - 14, 1)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def bounded_step(step, norm, COLUMNS: tl.constexpr, GATED: tl.constexpr):
    """`power_of_two_step` of a token x and the largest norm of a row of W -> (step, inverse step), powers of two that
    bring |(W x)_i|, or with GATED |(W x)_i (W x)_j|, to 2**15 at most, of all rows and before they are known: they are
    below norm * sqrt(COLUMNS) * 2**15 * step or, with GATED, its square (Cauchy-Schwarz). In these units float16 has 11
    bits down to 2**-29 of the bound; docs/LOG.md (2026-11-23) has how far real values are below it."""
    if GATED:
        exponent = 15 + 2 * (step.to(tl.int32, bitcast=True) >> 23) - 127
        factor = norm * norm * COLUMNS
    else:
        exponent = step.to(tl.int32, bitcast=True) >> 23
        factor = norm * COLUMNS**0.5
    exponent += (factor.to(tl.int32, bitcast=True) >> 23) - 126
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def extremes(lo, hi, other_lo, other_hi):
    return tl.minimum(lo, other_lo), tl.maximum(hi, other_hi)


@triton.jit
def _quantize(
    x,
    q,
    scale,
    zero,
    clip,
    plane,
    I: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    PIECE: tl.constexpr,
    PDL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token per program. Columns of the output are those of the padded groups; padding gets zeros."""
    if OVERLAP == "none":
        follow(PDL)
    elif OVERLAP == "after":
        allow_next(PDL)
        wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    source = (column // P) * S + column % P
    valid = (column < PADDED) & (column % P < S)
    value = tl.load(x + row * I + source, mask=valid, other=0.0).to(tl.float32)
    origin = 0.0
    if FORM == 1:
        LEVELS: tl.constexpr = 2**BITS - 1
        SHIFT: tl.constexpr = 2 ** (BITS - 1)
        ends = (tl.where(valid, value, float("inf")), tl.where(valid, value, float("-inf")))
        lo, hi = tl.reduce(ends, 0, extremes)
        lo, step, inverse = affine_range(lo, hi, clip, LEVELS)
        origin = lo + SHIFT * step
        high = tl.where(valid, affine_level(value, lo, inverse, LEVELS) - SHIFT, 0)
    elif FORM == 2:
        step, inverse = fixed_point_step(tl.max(tl.abs(value), 0), FIXED16_PEAK)
        high, mid = fixed_point(value, inverse)
    elif FORM == 3:
        step, inverse = fixed_point_step(tl.max(tl.abs(value), 0), FIXED24_PEAK)
        high, mid, low = fixed_point_24(value, inverse)
    else:
        step, inverse = power_of_two_step(tl.max(tl.abs(value), 0))
    if OVERLAP == "before":
        follow(PDL)  # before the first write: the kernel before may still use what is here now
    inside = column < PADDED
    if FORM <= 3:
        target = q + row * PADDED + column
        if PIECE is not None:
            half = column % (P // 2)
            place = column // P * P + (half // PIECE * 2 + column % P // (P // 2)) * PIECE + half % PIECE
            target = q + row * PADDED + tl.max_contiguous(tl.multiple_of(place, 16), 16)
        tl.store(target, high.to(tl.int8), mask=inside)
        if FORM >= 2:
            tl.store(target + plane, mid.to(tl.int8), mask=inside)
        if FORM == 3:
            tl.store(target + 2 * plane, low.to(tl.int8), mask=inside)
    else:
        # Columns 4i, 4i + 1 and 4i + 2, 4i + 3 of a group's first half, then of its second: four runs of pairs.
        run = column % P // (P // 2) * 2 + column % 4 // 2
        place = run * (P // 4) + column % (P // 2) // 4 * 2 + column % 2
        tl.store(q + row * PADDED + column // P * P + place, (value * inverse).to(tl.float16), mask=inside)
    tl.store(scale + row, step)
    tl.store(zero + row, origin)


def quantize(
    x: Tensor, groups: int, bits: int, clip: float, form: Form, pdl: Launch, overlap: str = "none",
    piece: int | None = None,
) -> Activations:  # fmt: skip
    """x [R, I] in the given form; bits and clip matter for Form.LEVELS.

    The two halves of a group, which share its packed words, follow each other or, in int8 and given `piece`, alternate
    in so many columns.

    overlap: "before" computes while the kernel before this one runs, if x is older than that one; "after" lets the
    kernel after this one start at once and ask for its weights, if what it reads before it waits is older than both.
    """
    R, I = x.shape
    S = I // groups
    P = padded_group(S)
    dtype = torch.float16 if form is Form.FLOAT16 else torch.int8
    values = torch.empty(form.planes, R, groups * P, dtype=dtype, device=x.device)
    scale, zero = torch.empty(2, R, dtype=torch.float32, device=x.device)
    BLOCK = triton.next_power_of_2(groups * P)
    _quantize[(R,)](
        x, values, scale, zero, clip, values.stride(0), I, S, P, groups * P, BLOCK, bits, form.value,
        piece, OVERLAP=overlap, num_warps=min(max(BLOCK // 1024, 1), 8), **pdl.options,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where the twin rounds twice
    )  # fmt: skip
    return Activations(values, scale, zero)
