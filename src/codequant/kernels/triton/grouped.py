"""Many tokens: expert-sorted blocks of tokens times codebook weights, on int8 tensor cores.

The product is taken as W X^T, [BN weight rows, BM tokens]: decoded weights are the operand that tensor cores may read
from registers, where the lookup leaves them, and BM can be as short as 16 without wasting a 64-row instruction. 16-bit
activations come as two int8 planes and share the decoded weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from codequant.kernels.triton.dispatch import Tile
from codequant.kernels.triton.epilogue import activate
from codequant.kernels.triton.layout import TritonWeight, padded_group
from codequant.kernels.triton.ptx import lookup_bytes
from codequant.kernels.triton.routing import Routing, max_blocks


@triton.jit
def _tables(table, index):
    """Four registers [BN, 1] of each of the tables [BN]."""
    p = table + index * 4
    return tl.load(p)[:, None], tl.load(p + 1)[:, None], tl.load(p + 2)[:, None], tl.load(p + 3)[:, None]


@triton.jit
def _add_products(acc, w0, w1, x0, x1, step, G: tl.constexpr):
    """acc [BN, BM] += w0 x0^T + w1 x1^T: in int32 for one group per row, else times the rows' steps in float32."""
    if G == 1:
        acc = tl.dot(w0, tl.trans(x0), acc, out_dtype=tl.int32)
        acc = tl.dot(w1, tl.trans(x1), acc, out_dtype=tl.int32)
    else:
        dot = tl.dot(w0, tl.trans(x0), tl.zeros(acc.shape, tl.int32), out_dtype=tl.int32)
        dot = tl.dot(w1, tl.trans(x1), dot, out_dtype=tl.int32)
        acc += dot.to(tl.float32) * tl.load(step)[:, None]
    return acc


@triton.jit
def _finish(
    high, low, scale, zero, step, row_sum, bias, row, G: tl.constexpr, PLANES: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Accumulators [BN, BM] -> float32 results; scale and zero [BM]."""
    y = high.to(tl.float32)
    if PLANES == 2:
        y = y * 256.0 + low.to(tl.float32)
    if G == 1:
        y = y * tl.load(step + row)[:, None]
    y = y * scale[None, :] + tl.load(row_sum + row)[:, None] * zero[None, :]
    if HAS_BIAS:
        y += tl.load(bias + row).to(tl.float32)[:, None]
    return y


@triton.jit
def _block(
    x_high, x_low, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out, pair, e, start, end, N,
    TOP_K: tl.constexpr, G: tl.constexpr, P: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, PLANES: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN weight rows of expert e times the tokens at positions start..end, BM of them at most."""
    position = start + tl.arange(0, BM)
    ok = position < end
    x_row = position
    y_row = position
    if GATHER or SCATTER:
        p = tl.load(pair + position, mask=ok, other=0)
        if GATHER:
            x_row = p // TOP_K
        if SCATTER:
            y_row = p

    HALF: tl.constexpr = P // 2  # bytes of a group's row, and columns of each half of it
    PER_GROUP: tl.constexpr = (HALF + BK - 1) // BK
    EVEN: tl.constexpr = HALF % BK == 0
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if GATED:
        row = tl.cast(e, tl.int64) * (2 * N) + tl.minimum(n, N - 1)
    else:
        row = tl.cast(e, tl.int64) * N + tl.minimum(n, N - 1)
    k = tl.arange(0, BK)
    x_at = x_row.to(tl.int64)[:, None] * (G * P) + k[None, :]
    w_at = packed + row[:, None] * (G * HALF) + k[None, :]

    DTYPE: tl.constexpr = tl.int32 if G == 1 else tl.float32
    gate = tl.zeros([BN, BM], DTYPE)
    up = tl.zeros([BN, BM], DTYPE)
    gate_low = tl.zeros([BN, BM], DTYPE)
    up_low = tl.zeros([BN, BM], DTYPE)
    if G == 1:
        t0, t1, t2, t3 = _tables(table, row)
        if GATED:
            u0, u1, u2, u3 = _tables(table, row + N)
    if PDL:  # all of the above is older than the kernel before this one, the quantization
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for i in tl.range(0, G * PER_GROUP, num_stages=STAGES):
        g = i // PER_GROUP
        byte = (i % PER_GROUP) * BK
        if EVEN:
            x_ok = ok[:, None]
            w = tl.load(w_at + g * HALF + byte)
            if GATED:
                wu = tl.load(w_at + N * (G * HALF) + g * HALF + byte)
        else:
            inside = (byte + k < HALF)[None, :]
            x_ok = ok[:, None] & inside
            w = tl.load(w_at + g * HALF + byte, mask=inside, other=0)
            if GATED:
                wu = tl.load(w_at + N * (G * HALF) + g * HALF + byte, mask=inside, other=0)
        column = g * P + byte
        x0 = tl.load(x_high + x_at + column, mask=x_ok, other=0)
        x1 = tl.load(x_high + x_at + column + HALF, mask=x_ok, other=0)
        if PLANES == 2:
            l0 = tl.load(x_low + x_at + column, mask=x_ok, other=0)
            l1 = tl.load(x_low + x_at + column + HALF, mask=x_ok, other=0)
        if G > 1:
            t0, t1, t2, t3 = _tables(table, row * G + g)
            if GATED:
                u0, u1, u2, u3 = _tables(table, (row + N) * G + g)
        w0, w1 = lookup_bytes(w, t0, t1, t2, t3)
        gate = _add_products(gate, w0, w1, x0, x1, step + row * G + g, G)
        if PLANES == 2:
            gate_low = _add_products(gate_low, w0, w1, l0, l1, step + row * G + g, G)
        if GATED:
            w0, w1 = lookup_bytes(wu, u0, u1, u2, u3)
            up = _add_products(up, w0, w1, x0, x1, step + (row + N) * G + g, G)
            if PLANES == 2:
                up_low = _add_products(up_low, w0, w1, l0, l1, step + (row + N) * G + g, G)

    scale = tl.load(x_scale + x_row, mask=ok, other=0.0)
    zero = tl.load(x_zero + x_row, mask=ok, other=0.0)
    y = activate(_finish(gate, gate_low, scale, zero, step, row_sum, bias, row, G, PLANES, HAS_BIAS), ACTIVATION)
    if GATED:
        y *= _finish(up, up_low, scale, zero, step, row_sum, bias, row + N, G, PLANES, HAS_BIAS)
    if SCATTER:
        y *= tl.load(pair_weight + y_row, mask=ok, other=0.0).to(tl.float32)[None, :]
    target = out + y_row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(target, tl.trans(y.to(out.dtype.element_ty)), mask=ok[:, None] & (n < N)[None, :])


@triton.jit
def _grouped(
    x_high, x_low, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out,
    pair, block_expert, block_start, block_end, tokens, N, E,
    TOP_K: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROUTED: tl.constexpr, GATHER: tl.constexpr,
    SCATTER: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    PLANES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x planes int8 [rows, G * P]; packed uint8 [E, N or 2N, G * P / 2].

    GATHER: position i in expert order reads x row pair[i] // TOP_K, else row i. SCATTER: it writes output row pair[i],
    multiplied by pair_weight, else row i. Not ROUTED: one matrix, position i is token i.
    """
    block = tl.program_id(1)
    if ROUTED:
        e = tl.load(block_expert + block)
        start = tl.load(block_start + block)
        stop = tl.load(block_end + block)
        if e >= E:
            return
    else:
        e = 0
        start = block * BM
        stop = tokens
    # An expert's last block, often its only one, is short: half of them take half of the products.
    if stop - start <= BM // 2:
        _block(
            x_high, x_low, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out, pair, e, start, stop,
            N, TOP_K, G, P, GATHER, SCATTER, GATED, ACTIVATION, HAS_BIAS, PLANES, BM // 2, BN, BK, STAGES, PDL,
        )  # fmt: skip
    else:
        _block(
            x_high, x_low, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out, pair, e, start, stop,
            N, TOP_K, G, P, GATHER, SCATTER, GATED, ACTIVATION, HAS_BIAS, PLANES, BM, BN, BK, STAGES, PDL,
        )  # fmt: skip


def grouped(
    x: tuple[Tensor, Tensor, Tensor, Tensor],
    weight: TritonWeight,
    bias: Tensor | None,
    routing: Routing | None,
    pair_weight: Tensor | None,
    top_k: int,
    gated: bool,
    activation: str,
    planes: int,
    out_dtype: torch.dtype,
    tokens: int,
    tile: Tile,
    pdl: bool,
) -> Tensor:
    """x: the result of `quantize`. Three uses:

    routing None: one matrix, [tokens, N]. Routing without pair_weight: x rows are tokens, the result [pairs, N] is in
    expert order. Routing with pair_weight: x rows are in expert order, the result [pairs, N] is in the order of pairs,
    weighted; rows of sentinel pairs are left unwritten.
    """
    high, low, scale, zero = x
    E, rows, _ = weight.words.shape
    N = rows // 2 if gated else rows
    G = weight.groups
    P = padded_group(weight.in_features // G)
    scatter = pair_weight is not None
    if routing is None:
        positions, blocks, lists = len(high), triton.cdiv(len(high), tokens), [scale] * 4
    else:
        positions, lists = len(routing.pair), routing.blocks
        blocks = max_blocks(positions, E, tokens)
    out = torch.empty(positions, N, dtype=out_dtype, device=high.device)
    _grouped[(triton.cdiv(N, tile.rows), blocks)](
        high, low, scale, zero, pair_weight if scatter else scale, weight.words.view(torch.uint8), weight.table,
        weight.step, weight.row_sum, bias if bias is not None else scale, out, *lists, positions, N, E,
        TOP_K=top_k, G=G, P=P, ROUTED=routing is not None, GATHER=routing is not None and not scatter, SCATTER=scatter,
        GATED=gated, ACTIVATION=activation, HAS_BIAS=bias is not None, PLANES=planes,
        BM=tokens, BN=tile.rows, BK=min(tile.bytes, triton.next_power_of_2(P // 2)),
        STAGES=tile.stages, PDL=pdl, num_warps=tile.warps, maxnreg=tile.registers, launch_pdl=pdl,
    )  # fmt: skip
    return out
