"""Few tokens: each program multiplies a block of weight rows with one token, on dp4a, straight from the raw input.

At a batch of one or two the time is the weights' way from memory plus kernel launches, so nothing else gets a launch:
every program quantizes the (L2-resident) input row for itself, the expert comes from the routing indices directly, the
gate, its activation and `up` share a program, and `down` sums a token's experts in registers. A feed-forward is two
launches. With programmatic dependent launch (PDL) `down` fetches its first weights while `gate_up` drains.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from codequant.kernels.triton.activation import affine_level, affine_range, fixed_point_step, round_half_even
from codequant.kernels.triton.dispatch import DecodeConfig
from codequant.kernels.triton.epilogue import activate
from codequant.kernels.triton.layout import ENTRIES, TritonWeight, padded_group
from codequant.kernels.triton.ptx import dp4a, lookup_words


@triton.jit
def _pack_bytes(q):
    """int32 [..., 4] in -128..127 -> int32 [...], byte j from q[..., j]."""
    shift = tl.arange(0, 4) * 8
    return tl.sum((q & 255) << shift[None, None, :], axis=2)


@triton.jit
def _table(table, index, mask):
    """The four registers of each table, index counting tables."""
    p = table + index * 4
    return (
        tl.load(p, mask=mask, other=0),
        tl.load(p + 1, mask=mask, other=0),
        tl.load(p + 2, mask=mask, other=0),
        tl.load(p + 3, mask=mask, other=0),
    )


@triton.jit
def _accumulate(
    acc, packed, first, second, table, step, row, word, mask, G: tl.constexpr, WORDS_PER_GROUP: tl.constexpr
):
    """acc [SLOTS, BN, BW] += products of this chunk, in integers for one group per row, else scaled in float32."""
    if G == 1:
        t0, t1, t2, t3 = _table(table, row[:, :, None], row[:, :, None] >= 0)
        w0, w1 = lookup_words(packed, t0, t1, t2, t3)
        acc = dp4a(w1, second[:, None, :], dp4a(w0, first[:, None, :], acc))
    else:
        index = row[:, :, None] * G + (word // WORDS_PER_GROUP)[None, None, :]
        t0, t1, t2, t3 = _table(table, index, mask)
        w0, w1 = lookup_words(packed, t0, t1, t2, t3)
        dot = dp4a(w1, second[:, None, :], dp4a(w0, first[:, None, :], tl.zeros(packed.shape, tl.int32)))
        acc += dot.to(tl.float32) * tl.load(step + index, mask=mask, other=0.0)
    return acc


@triton.jit
def _decode(
    x,
    expert,
    pair_weight,
    words,
    table,
    step,
    row_sum,
    bias,
    out,
    clip,
    N,
    E,
    TOP_K: tl.constexpr,
    I: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    ROUTED: tl.constexpr,
    REDUCE: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of BN rows, outputs). Without REDUCE output q is pair q, of token q // TOP_K; with it output q is
    token q and sums its TOP_K pairs, which sit side by side in SLOTS, a power of two.

    GATED: rows N..2N hold `up`, rows 0..N the gate, and the output is activation(gate) * up.
    """
    WORDS: tl.constexpr = G * P // 8
    CHUNKS: tl.constexpr = (WORDS + BW - 1) // BW
    EARLY: tl.constexpr = REDUCE or not ROUTED  # experts and weights are older than the kernel before this one
    if PDL and not EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    n = tl.program_id(0) * BN + tl.arange(0, BN)
    q = tl.program_id(1)
    slot = tl.arange(0, SLOTS)
    if REDUCE:
        live = slot < TOP_K
        pair = q * TOP_K + slot
        x_row = pair
    else:
        live = slot < 1
        pair = q + slot
        x_row = pair // TOP_K
    if ROUTED:
        e = tl.load(expert + pair, mask=live, other=E)
        live = live & (e >= 0) & (e < E)
        e = tl.where(live, e, 0).to(tl.int64)
    else:
        e = tl.zeros([SLOTS], tl.int64)
    n_safe = tl.minimum(n, N - 1)
    if GATED:
        row = e[:, None] * (2 * N) + n_safe[None, :]  # [SLOTS, BN]
    else:
        row = e[:, None] * N + n_safe[None, :]
    weight = words + row[:, :, None] * WORDS
    c = tl.arange(0, BW)
    mask = live[:, None, None] & (c < WORDS)[None, None, :]
    gate_next = tl.load(weight + c[None, None, :], mask=mask, other=0)
    if GATED:
        up_next = tl.load(weight + N * WORDS + c[None, None, :], mask=mask, other=0)
    if PDL and EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    # The range of each input row.
    x_base = x + x_row.to(tl.int64) * I
    cx = tl.arange(0, BX)
    lo = tl.full([SLOTS, BX], float("inf"), tl.float32)
    hi = tl.full([SLOTS, BX], float("-inf"), tl.float32)
    for start in tl.static_range(0, I, BX):
        valid = live[:, None] & (start + cx < I)[None, :]
        value = tl.load(x_base[:, None] + start + cx[None, :], mask=valid, other=0.0).to(tl.float32)
        lo = tl.minimum(lo, tl.where(valid, value, float("inf")))
        hi = tl.maximum(hi, tl.where(valid, value, float("-inf")))
    row_lo = tl.where(live, tl.min(lo, 1), 0.0)
    row_hi = tl.where(live, tl.max(hi, 1), 0.0)
    if BITS == 16:
        scale, inverse = fixed_point_step(tl.maximum(row_hi, -row_lo))
        zero = tl.zeros([SLOTS], tl.float32)
    else:
        LEVELS: tl.constexpr = 2**BITS - 1
        SHIFT: tl.constexpr = 2 ** (BITS - 1)
        row_lo, scale, inverse = affine_range(row_lo, row_hi, clip, LEVELS)
        zero = row_lo + SHIFT * scale

    DTYPE: tl.constexpr = tl.int32 if G == 1 else tl.float32
    gate = tl.zeros([SLOTS, BN, BW], DTYPE)
    up = tl.zeros([SLOTS, BN, BW], DTYPE)
    gate_low = tl.zeros([SLOTS, BN, BW], DTYPE)
    up_low = tl.zeros([SLOTS, BN, BW], DTYPE)
    for i in tl.static_range(CHUNKS):
        word = i * BW + c
        mask = live[:, None, None] & (word < WORDS)[None, None, :]
        gate_words = gate_next
        if GATED:
            up_words = up_next
        if i + 1 < CHUNKS:  # the next chunk travels while this one is multiplied
            ahead = live[:, None, None] & (word + BW < WORDS)[None, None, :]
            gate_next = tl.load(weight + (word + BW)[None, None, :], mask=ahead, other=0)
            if GATED:
                up_next = tl.load(weight + N * WORDS + (word + BW)[None, None, :], mask=ahead, other=0)

        # Columns of the word's first and second half, [BW, 4].
        offset = (word % (P // 8) * 4)[:, None] + tl.arange(0, 4)[None, :]
        column = (word // (P // 8) * S)[:, None] + offset
        in_row = (word < WORDS)[:, None]
        first_ok = live[:, None, None] & (in_row & (offset < S))[None, :, :]
        second_ok = live[:, None, None] & (in_row & (offset + P // 2 < S))[None, :, :]
        first = tl.load(x_base[:, None, None] + column[None, :, :], mask=first_ok, other=0.0).to(tl.float32)
        second = tl.load(x_base[:, None, None] + (column + P // 2)[None, :, :], mask=second_ok, other=0.0).to(
            tl.float32
        )
        if BITS == 16:
            a = round_half_even(first * inverse[:, None, None]).to(tl.int32)
            b = round_half_even(second * inverse[:, None, None]).to(tl.int32)
            a_high = (a + 128) >> 8
            b_high = (b + 128) >> 8
            first_low = _pack_bytes(a)  # the low byte of a is that of a - 256 * a_high
            second_low = _pack_bytes(b)
            first_high = _pack_bytes(a_high)
            second_high = _pack_bytes(b_high)
        else:
            a = affine_level(first, row_lo[:, None, None], inverse[:, None, None], LEVELS) - SHIFT
            b = affine_level(second, row_lo[:, None, None], inverse[:, None, None], LEVELS) - SHIFT
            first_high = _pack_bytes(tl.where(first_ok, a, 0.0).to(tl.int32))
            second_high = _pack_bytes(tl.where(second_ok, b, 0.0).to(tl.int32))

        gate = _accumulate(gate, gate_words, first_high, second_high, table, step, row, word, mask, G, P // 8)
        if BITS == 16:
            gate_low = _accumulate(gate_low, gate_words, first_low, second_low, table, step, row, word, mask, G, P // 8)
        if GATED:
            up = _accumulate(up, up_words, first_high, second_high, table, step, row + N, word, mask, G, P // 8)
            if BITS == 16:
                up_low = _accumulate(
                    up_low, up_words, first_low, second_low, table, step, row + N, word, mask, G, P // 8
                )

    y = _finish(gate, gate_low, scale, zero, step, row_sum, bias, row, G, BITS, HAS_BIAS)
    if GATED:
        y = activate(y, ACTIVATION) * _finish(up, up_low, scale, zero, step, row_sum, bias, row + N, G, BITS, HAS_BIAS)
    else:
        y = activate(y, ACTIVATION)
    if REDUCE and ROUTED:
        y = y * tl.load(pair_weight + pair, mask=live, other=0.0).to(tl.float32)[:, None]
    y = tl.sum(tl.where(live[:, None], y, 0.0), 0)  # [BN]
    tl.store(out + q.to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _finish(
    high,
    low,
    scale,
    zero,
    step,
    row_sum,
    bias,
    row,
    G: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Accumulators [SLOTS, BN, BW] -> float32 results [SLOTS, BN]."""
    y = tl.sum(high, 2).to(tl.float32)
    if BITS == 16:
        y = y * 256.0 + tl.sum(low, 2).to(tl.float32)
    if G == 1:
        y = y * tl.load(step + row)
    y = y * scale[:, None] + zero[:, None] * tl.load(row_sum + row)
    if HAS_BIAS:
        y += tl.load(bias + row).to(tl.float32)
    return y


def decode(
    x: Tensor,
    weight: TritonWeight,
    bias: Tensor | None,
    expert: Tensor | None,
    pair_weight: Tensor | None,
    top_k: int,
    gated: bool,
    activation: str,
    bits: int,
    clip: float,
    out_dtype: torch.dtype,
    config: DecodeConfig,
    pdl: bool,
) -> Tensor:
    """One output row per pair of x [T, I] and expert [T * top_k], or, given pair_weight, x [T * top_k, I] and one
    output row per token. expert None: a single matrix and top_k = 1."""
    reduce = pair_weight is not None
    E, rows, _ = weight.words.shape
    N = rows // 2 if gated else rows
    I, G = weight.in_features, weight.groups
    outputs = len(x) // top_k if reduce else len(x) * top_k
    out = torch.empty(outputs, N, dtype=out_dtype, device=x.device)
    words, table, step, row_sum = weight.tensors
    P = padded_group(I // G)
    _decode[(triton.cdiv(N, config.rows), outputs)](
        x, expert if expert is not None else words, pair_weight if reduce else x, words, table, step, row_sum,
        bias if bias is not None else step, out, clip, N, E,
        TOP_K=top_k, I=I, G=G, S=I // G, P=P, ROUTED=expert is not None, REDUCE=reduce, GATED=gated,
        ACTIVATION=activation, HAS_BIAS=bias is not None, BITS=bits,
        SLOTS=triton.next_power_of_2(top_k) if reduce else 1, BN=config.rows,
        BW=min(config.words, triton.next_power_of_2(G * P // 8)), BX=min(1024, triton.next_power_of_2(I)), PDL=pdl,
        num_warps=config.warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
