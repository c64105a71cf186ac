"""Many tokens: expert-sorted blocks of tokens times codebook weights, on tensor cores.

The product is taken as W X^T, [BN weight rows, BM tokens]: decoded weights are the operand that tensor cores may read
from registers, where the lookup leaves them, and BM can be as short as 16 without wasting a 64-row instruction. Two
int8 planes of activations share the decoded weights; float16 activations meet float16 weights.
"""

from importlib import import_module
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from codequant.kernels.triton.activation import Activations
from codequant.kernels.triton.dispatch import Tile
from codequant.kernels.triton.epilogue import activate
from codequant.kernels.triton.launch import Launch, follow
from codequant.kernels.triton.layout import TritonWeight, padded_group
from codequant.kernels.triton.ptx import biased_entries, lookup_bytes, lookup_pairs
from codequant.kernels.triton.routing import Routing, block_range, max_blocks


@triton.jit
def tables(table, index, FLOAT: tl.constexpr):
    """Four registers [BN, 1] of each of the tables [BN], as the lookup wants them."""
    p = table + index * 4
    t0, t1, t2, t3 = tl.load(p)[:, None], tl.load(p + 1)[:, None], tl.load(p + 2)[:, None], tl.load(p + 3)[:, None]
    if FLOAT:
        t0, t1, t2, t3 = biased_entries(t0), biased_entries(t1), biased_entries(t2), biased_entries(t3)
    return t0, t1, t2, t3


@triton.jit
def _add_float_products(acc, packed, t0, t1, t2, t3, x0, x1, x2, x3, step, G: tl.constexpr):
    """acc float32 [BN, BM] += the decoded weights times the four runs of x, for more groups times the rows' steps."""
    w0, w1, w2, w3 = lookup_pairs(packed, t0, t1, t2, t3)
    dot = tl.dot(w0, tl.trans(x0), acc if G == 1 else None)
    dot = tl.dot(w1, tl.trans(x1), dot)
    dot = tl.dot(w2, tl.trans(x2), dot)
    dot = tl.dot(w3, tl.trans(x3), dot)
    return dot if G == 1 else acc + dot * tl.load(step)[:, None]


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
    """Accumulators [BN, BM] -> float32 results; scale and zero [BM], step and row_sum [BN]."""
    y = high.to(tl.float32)
    if PLANES == 2:
        y = y * 256.0 + low.to(tl.float32)
    if G == 1:
        y = y * step[:, None]
    y = y * scale[None, :] + row_sum[:, None] * zero[None, :]
    if HAS_BIAS:
        y += tl.load(bias + row).to(tl.float32)[:, None]
    return y


@triton.jit
def _block(
    x, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out, pair, e, start, end, plane, N,
    TOP_K: tl.constexpr, G: tl.constexpr, P: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, PLANES: tl.constexpr, FLOAT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
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

    RUN: tl.constexpr = P // 4 if FLOAT else P // 2  # elements of a group's packed row, and columns of a run of x
    PER_GROUP: tl.constexpr = (RUN + BK - 1) // BK
    EVEN: tl.constexpr = RUN % BK == 0
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if GATED:
        row = tl.cast(e, tl.int64) * (2 * N) + tl.minimum(n, N - 1)
    else:
        row = tl.cast(e, tl.int64) * N + tl.minimum(n, N - 1)
    k = tl.arange(0, BK)
    x_at = x + x_row.to(tl.int64)[:, None] * (G * P) + k[None, :]
    w_at = packed + row[:, None] * (G * RUN) + k[None, :]

    DTYPE: tl.constexpr = tl.int32 if G == 1 and not FLOAT else tl.float32
    gate = tl.zeros([BN, BM], DTYPE)
    up = tl.zeros([BN, BM], DTYPE)
    gate_low = tl.zeros([BN, BM], DTYPE)
    up_low = tl.zeros([BN, BM], DTYPE)
    # What the results need of each row as well: loaded at the end, it would be one more way to memory to wait for.
    own_step = 1.0
    up_own_step = 1.0
    own_sum = tl.load(row_sum + row)
    if GATED:
        up_own_sum = tl.load(row_sum + row + N)
    if G == 1:
        own_step = tl.load(step + row)
        t0, t1, t2, t3 = tables(table, row, FLOAT)
        if GATED:
            up_own_step = tl.load(step + row + N)
            u0, u1, u2, u3 = tables(table, row + N, FLOAT)
    if SCATTER:
        share = tl.load(pair_weight + y_row, mask=ok, other=0.0).to(tl.float32)
    follow(PDL)  # all of the above is older than the kernel before this one, the quantization
    scale = tl.load(x_scale + x_row, mask=ok, other=0.0)
    zero = tl.load(x_zero + x_row, mask=ok, other=0.0)
    for i in tl.range(0, G * PER_GROUP, num_stages=STAGES):
        g = i // PER_GROUP
        at = (i % PER_GROUP) * BK
        if EVEN:
            x_ok = ok[:, None]
            w = tl.load(w_at + g * RUN + at)
            if GATED:
                wu = tl.load(w_at + N * (G * RUN) + g * RUN + at)
        else:
            inside = (at + k < RUN)[None, :]
            x_ok = ok[:, None] & inside
            w = tl.load(w_at + g * RUN + at, mask=inside, other=0)
            if GATED:
                wu = tl.load(w_at + N * (G * RUN) + g * RUN + at, mask=inside, other=0)
        column = x_at + g * P + at
        x0 = tl.load(column, mask=x_ok, other=0)
        x1 = tl.load(column + RUN, mask=x_ok, other=0)
        if FLOAT:
            x2 = tl.load(column + 2 * RUN, mask=x_ok, other=0)
            x3 = tl.load(column + 3 * RUN, mask=x_ok, other=0)
        elif PLANES == 2:
            x2 = tl.load(column + plane, mask=x_ok, other=0)
            x3 = tl.load(column + plane + RUN, mask=x_ok, other=0)
        if G > 1:
            t0, t1, t2, t3 = tables(table, row * G + g, FLOAT)
            if GATED:
                u0, u1, u2, u3 = tables(table, (row + N) * G + g, FLOAT)
        gate_step = step + row * G + g
        up_step = step + (row + N) * G + g
        if FLOAT:
            gate = _add_float_products(gate, w, t0, t1, t2, t3, x0, x1, x2, x3, gate_step, G)
            if GATED:
                up = _add_float_products(up, wu, u0, u1, u2, u3, x0, x1, x2, x3, up_step, G)
        else:
            w0, w1 = lookup_bytes(w, t0, t1, t2, t3)
            gate = _add_products(gate, w0, w1, x0, x1, gate_step, G)
            if PLANES == 2:
                gate_low = _add_products(gate_low, w0, w1, x2, x3, gate_step, G)
            if GATED:
                w0, w1 = lookup_bytes(wu, u0, u1, u2, u3)
                up = _add_products(up, w0, w1, x0, x1, up_step, G)
                if PLANES == 2:
                    up_low = _add_products(up_low, w0, w1, x2, x3, up_step, G)

    y = _finish(gate, gate_low, scale, zero, own_step, own_sum, bias, row, G, PLANES, HAS_BIAS)
    y = activate(y, ACTIVATION)
    if GATED:
        y *= _finish(up, up_low, scale, zero, up_own_step, up_own_sum, bias, row + N, G, PLANES, HAS_BIAS)
    if SCATTER:
        y *= share[None, :]
    target = out + y_row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(target, tl.trans(y.to(out.dtype.element_ty)), mask=ok[:, None] & (n < N)[None, :])


@triton.jit
def _grouped(
    x, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out,
    pair, block_expert, block_start, block_end, tokens, plane, N, E,
    TOP_K: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROUTED: tl.constexpr, GATHER: tl.constexpr,
    SCATTER: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    PLANES: tl.constexpr, FLOAT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x int8 [PLANES, rows, G * P] and packed uint8 [E, N or 2N, G * P / 2]; with FLOAT float16 and uint16 [.., / 4].

    GATHER: position i in expert order reads x row pair[i] // TOP_K, else row i. SCATTER: it writes output row pair[i],
    multiplied by pair_weight, else row i. Not ROUTED: one matrix, position i is token i.
    """
    e, start, stop = block_range(tl.program_id(1), block_expert, block_start, block_end, tokens, ROUTED, BM)
    if ROUTED and e >= E:
        return
    # An expert's last block, often its only one, is short: half of them take half of the products.
    if stop - start <= BM // 2:
        _block(
            x, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out, pair, e, start, stop, plane,
            N, TOP_K, G, P, GATHER, SCATTER, GATED, ACTIVATION, HAS_BIAS, PLANES, FLOAT, BM // 2, BN, BK, STAGES, PDL,
        )  # fmt: skip
    else:
        _block(
            x, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out, pair, e, start, stop, plane,
            N, TOP_K, G, P, GATHER, SCATTER, GATED, ACTIVATION, HAS_BIAS, PLANES, FLOAT, BM, BN, BK, STAGES, PDL,
        )  # fmt: skip


def _overlapped() -> ModuleType:
    """In Triton's explicit dialect, which another version may lack: imported where a tile asks for it."""
    return import_module("codequant.kernels.triton.overlapped")


def overlaps(weight: TritonWeight, tile: Tile) -> bool:
    """Whether `overlapped` runs this product."""
    return tile.overlap and _overlapped().serves(weight)


def piece(weight: TritonWeight, tile: Tile) -> int | None:
    """Bytes of a packed row per step of `overlapped`, if that runs this product: in so many columns the two halves of
    int8 activations alternate, see `quantize`."""
    if not overlaps(weight, tile):
        return None
    return _overlapped().step_bytes(padded_group(weight.in_features) // 2, tile.bytes)


def grouped(
    x: Activations,
    weight: TritonWeight,
    bias: Tensor | None,
    routing: Routing | None,
    pair_weight: Tensor | None,
    top_k: int,
    gated: bool,
    activation: str,
    out_dtype: torch.dtype,
    tokens: int,
    tile: Tile,
    pdl: Launch,
    out_scale: Tensor | None = None,
) -> Tensor:
    """x in any form but FIXED24, quantized with this product's `piece`. Three uses:

    routing None: one matrix, [tokens, N]. Routing without pair_weight: x rows are tokens, the result [pairs, N] is in
    expert order. Routing with pair_weight: x rows are in expert order, the result [pairs, N] is in the order of pairs,
    weighted; rows of sentinel pairs are left unwritten.

    With out_scale [pairs], which is written, the result of the second use is the values of `Activations` in float16;
    `overlaps` must hold, and there be no bias.
    """
    values, scale, zero = x
    planes, positions, _ = values.shape
    E, rows, _ = weight.words.shape
    N = rows // 2 if gated else rows
    G = weight.groups
    P = padded_group(weight.in_features // G)
    scatter = pair_weight is not None
    item = values.itemsize  # a byte of packed weights meets as many bytes of a run of activations
    if routing is None:
        blocks, lists = triton.cdiv(positions, tokens), [scale] * 4
    else:
        positions, lists = len(routing.pair), routing.tensors
        blocks = max_blocks(positions, E, tokens)
    out = torch.empty(positions, N, dtype=out_dtype, device=values.device)
    arguments = (
        values, scale, zero, pair_weight if scatter else scale,
        weight.words.view(torch.uint16 if item == 2 else torch.uint8), weight.table, weight.step, weight.row_sum,
        bias if bias is not None else scale, out, *lists, positions, values.stride(0), N, E,
    )  # fmt: skip
    constants = dict(
        TOP_K=top_k, P=P, ROUTED=routing is not None, GATHER=routing is not None and not scatter, SCATTER=scatter,
        GATED=gated, ACTIVATION=activation, HAS_BIAS=bias is not None, PLANES=planes, FLOAT=item == 2, BM=tokens,
        BN=tile.rows, STAGES=tile.stages, num_warps=tile.warps, maxnreg=tile.registers, **pdl.options,
    )  # fmt: skip
    step = piece(weight, tile)
    if step is not None:
        rows = tile.rows if gated else 2 * tile.rows
        _overlapped().kernel[(triton.cdiv(N, rows), blocks)](
            *arguments, weight.norm, out_scale if out_scale is not None else scale, BK=step // item, SPAN=tile.span,
            SPECIALIZED=tile.specialized, HALF=out_scale is not None, **constants,
        )  # fmt: skip
    else:
        BK = min(tile.bytes, triton.next_power_of_2(P // 2)) // item
        _grouped[(triton.cdiv(N, tile.rows), blocks)](*arguments, G=G, BK=BK, **constants)
    return out
