"""One token through its experts in two launches, whose programs turn the activations into integers by themselves.

Two small kernels in front of `up` and of `down` that only quantize would take a third of the time, for the weights wait
meanwhile. In `decode` hundreds of programs would repeat that work; here a launch has as many programs as the GPU holds
at once, each of which takes several tiles of rows in turn, quantizes once, and does so while its first weights travel.
The integers go through memory, where each program has a place of its own: all its threads need all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from codequant.kernels.triton.activation import (
    FIXED16_PEAK,
    affine_level,
    affine_range,
    extremes,
    fixed_point,
    fixed_point_step,
    round_half_even,
)
from codequant.kernels.triton.decode import (
    add_products,
    finish,
    load_words,
    routed_experts,
    row_parameters,
    step_words,
    together,
)
from codequant.kernels.triton.dispatch import SingleConfig
from codequant.kernels.triton.epilogue import activate
from codequant.kernels.triton.launch import Launch, follow
from codequant.kernels.triton.layout import TritonWeight

PIECE = 256  # columns that a program loads at a time: rows of other lengths than powers of two stay short


@triton.jit
def _pieces(x, row, S: tl.constexpr, PIECE: tl.constexpr):
    """Rows `row` [R] of x [.., S], from L2: a tuple of [R, PIECE], zero past a row's end."""
    pieces = ()
    for i in tl.static_range((S + PIECE - 1) // PIECE):
        column = i * PIECE + tl.arange(0, PIECE)
        at = x + row[:, None] * S + column[None, :]
        if (i + 1) * PIECE <= S:
            piece = tl.load(at, cache_modifier=".cg")
        else:
            piece = tl.load(at, mask=(column < S)[None, :], other=0.0, cache_modifier=".cg")
        pieces = pieces + (piece,)
    return pieces


@triton.jit
def _quantize(
    pieces, q, q_scale, clip,
    S: tl.constexpr, P: tl.constexpr, PIECE: tl.constexpr, BITS: tl.constexpr, CLIPPED: tl.constexpr,
):  # fmt: skip
    """`_pieces` -> this program's int8 planes q [planes, R, P] and q_scale [R, (scale, zero)], to the bit as
    `activation.quantize` makes them. Without CLIPPED (clip is 1) every value is within the range already."""
    R: tl.constexpr = pieces[0].shape[0]
    for i in tl.static_range((S + PIECE - 1) // PIECE):
        value = pieces[i].to(tl.float32)
        if (i + 1) * PIECE <= S:
            low_end, high_end = value, value
        else:
            valid = (i * PIECE + tl.arange(0, PIECE) < S)[None, :]
            low_end, high_end = tl.where(valid, value, float("inf")), tl.where(valid, value, float("-inf"))
        if i == 0:
            lo, hi = low_end, high_end
        else:
            lo, hi = tl.minimum(lo, low_end), tl.maximum(hi, high_end)
    lo, hi = tl.reduce((lo, hi), 1, extremes)
    LEVELS: tl.constexpr = 2**BITS - 1
    SHIFT: tl.constexpr = 2 ** (BITS - 1)
    if BITS == 16:
        step, inverse = fixed_point_step(tl.maximum(tl.abs(lo), tl.abs(hi)), FIXED16_PEAK)
        origin = tl.zeros_like(step)
    else:
        lo, step, inverse = affine_range(lo, hi, clip, LEVELS)
        origin = lo + SHIFT * step
    row = tl.arange(0, R)
    for i in tl.static_range((P + PIECE - 1) // PIECE):
        column = i * PIECE + tl.arange(0, PIECE)
        value = pieces[i].to(tl.float32)
        if BITS == 16:
            high, low = fixed_point(value, inverse[:, None])
        elif CLIPPED:
            high = affine_level(value, lo[:, None], inverse[:, None], LEVELS) - SHIFT
        else:
            high = round_half_even((value - lo[:, None]) * inverse[:, None]) - SHIFT
        if S < P:  # padding meets a table's first entry; zero of fixed point is zero already
            high = tl.where((column < S)[None, :], high, 0)
        target = q + row[:, None] * P + column[None, :]
        inside = (row >= 0)[:, None] & (column < P)[None, :]
        tl.store(target, high.to(tl.int8), mask=inside)
        if BITS == 16:
            tl.store(target + R * P, low.to(tl.int8), mask=inside)
    tl.store(q_scale + 2 * row, step)
    tl.store(q_scale + 2 * row + 1, origin)
    tl.debug_barrier()  # the program's threads read each other's results


@triton.jit
def _halves(q, row, CHUNKS: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, WORDS: tl.constexpr):
    """What meets the two halves of each weight word: a tuple of CHUNKS pairs int32 [SLOTS, BN, BW], the same for all
    rows: each thread loads what its own need."""
    halves = ()
    for i in tl.static_range(CHUNKS):
        word = (i * BW + tl.arange(0, BW))[None, None, :]
        first = q + row[:, None, None] * (2 * WORDS) + word + tl.zeros([1, BN, 1], tl.int32)
        one = load_words(first, word, WORDS, BW)
        halves = halves + ((one, load_words(first + WORDS, word, WORDS, BW)),)
    return halves


@triton.jit
def _words(words, row, CHUNKS: tl.constexpr, BW: tl.constexpr, WORDS: tl.constexpr):
    """Weight rows [SLOTS, BN] -> a tuple of CHUNKS int32 [SLOTS, BN, BW]."""
    chunks = ()
    for i in tl.static_range(CHUNKS):
        word = (i * BW + tl.arange(0, BW))[None, None, :]
        chunks = chunks + (load_words(words + row[:, :, None] * WORDS + word, word, WORDS, BW),)
    return chunks


@triton.jit
def _dot(chunks, halves, parameters, CHUNKS: tl.constexpr, PAIRED: tl.constexpr):
    """int32 [SLOTS, BN, BW], whose last axis is still to be summed."""
    acc = tl.zeros(chunks[0].shape, tl.int32)
    for i in tl.static_range(CHUNKS):
        acc = add_products(acc, chunks[i], halves[i][0], halves[i][1], parameters[0], PAIRED)
    return acc


@triton.jit
def _product(chunks, planes, scale, zero, parameters, CHUNKS: tl.constexpr, PAIRED: tl.constexpr):
    """float32 [SLOTS, BN]; planes: a tuple of `_halves`."""
    sums = ()
    for p in tl.static_range(len(planes)):
        sums = sums + (_dot(chunks, planes[p], parameters, CHUNKS, PAIRED),)
    return finish(sums, scale, zero, parameters)


@triton.jit
def _place(buffer, SIZE: tl.constexpr):
    """This program's place in a buffer that has one of SIZE elements for each."""
    return buffer + tl.program_id(0).to(tl.int64) * SIZE


@triton.jit
def _own_activations(
    q_words, q_scale, row,
    ROWS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr, CHUNKS: tl.constexpr, BN: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """Rows `row` of what `_quantize` has left in this program's place -> (`_halves` of each plane, scale, zero)."""
    planes = ()
    for p in tl.static_range(PLANES):
        planes = planes + (_halves(q_words, row + p * ROWS, CHUNKS, BN, BW, WORDS),)
    return planes, tl.load(q_scale + 2 * row), tl.load(q_scale + 2 * row + 1)


@triton.jit
def _single_up(
    x,
    q,
    q_words,
    q_scale,
    expert,
    words,
    table,
    step,
    row_sum,
    bias,
    out,
    clip,
    E,
    TOP_K: tl.constexpr,
    I: tl.constexpr,
    M: tl.constexpr,
    WORDS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    PAIRED: tl.constexpr,
    CLIPPED: tl.constexpr,
    PIECE: tl.constexpr,
    STEPS: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [I] -> out [TOP_K, M]; a tile is BN rows of out, program p takes tiles p * STEPS and following."""
    CHUNKS: tl.constexpr = (WORDS + BW - 1) // BW
    TILES: tl.constexpr = (M + BN - 1) // BN
    PLANES: tl.constexpr = 2 if BITS == 16 else 1
    follow(PDL)  # the experts and x may be the results of the kernel before this one
    first = tl.zeros([1], tl.int32)
    pieces = _pieces(x, first, I, PIECE)
    rows = ()
    live = ()
    target = ()
    for i in tl.static_range(STEPS):
        tile = tl.minimum(tl.program_id(0) * STEPS + i, TOP_K * TILES - 1)  # the last one more than once
        pair = tile // TILES
        n = tile % TILES * BN + tl.arange(0, BN)
        routed, e = routed_experts(expert, pair, E)
        row = e * (2 * M if GATED else M) + tl.minimum(n, M - 1)
        rows = rows + (row[None, :],)
        live = live + (routed,)
        target = target + (tl.where(n < M, pair * M + n, -1),)
    # Tables and the like first, for they are needed first; of words one tile ahead.
    gate_rows = ()
    up_rows = ()
    for i in tl.static_range(STEPS):
        gate_rows = gate_rows + (row_parameters(table, step, row_sum, bias, rows[i], 1, HAS_BIAS),)
        if GATED:
            up_rows = up_rows + (row_parameters(table, step, row_sum, bias, rows[i] + M, 1, HAS_BIAS),)
    gate_next = _words(words, rows[0], CHUNKS, BW, WORDS)
    if GATED:
        up_next = _words(words, rows[0] + M, CHUNKS, BW, WORDS)

    own_words, own_scale = _place(q_words, PLANES * WORDS * 2), _place(q_scale, 2)
    _quantize(pieces, _place(q, PLANES * WORDS * 8), own_scale, clip, I, WORDS * 8, PIECE, BITS, CLIPPED)
    planes, scale, zero = _own_activations(own_words, own_scale, first, 1, WORDS, PLANES, CHUNKS, BN, BW)
    for i in tl.static_range(STEPS):
        gate = gate_next
        if GATED:
            up = up_next
        if i + 1 < STEPS:
            gate_next = _words(words, rows[i + 1], CHUNKS, BW, WORDS)
            if GATED:
                up_next = _words(words, rows[i + 1] + M, CHUNKS, BW, WORDS)
        y = activate(_product(gate, planes, scale, zero, gate_rows[i], CHUNKS, PAIRED), ACTIVATION)
        if GATED:
            y *= _product(up, planes, scale, zero, up_rows[i], CHUNKS, PAIRED)
        y = tl.sum(tl.where(live[i], y, 0.0), 0)
        tl.store(out + target[i], y.to(out.dtype.element_ty), mask=target[i] >= 0)


@triton.jit
def _single_down(
    x,
    q,
    q_words,
    q_scale,
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
    M: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    PAIRED: tl.constexpr,
    CLIPPED: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [TOP_K, M] -> out [N]: a program sums BN rows over the token's experts, SLOTS of which sit side by side."""
    CHUNKS: tl.constexpr = (WORDS + BW - 1) // BW
    TURNS: tl.constexpr = TOP_K // SLOTS
    PLANES: tl.constexpr = 2 if BITS == 16 else 1
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    live = ()
    share = ()
    parameters = ()
    chunks = ()
    for turn in tl.static_range(TURNS):
        slot = turn * SLOTS + tl.arange(0, SLOTS)
        routed, e = routed_experts(expert, slot, E)  # `up` has waited for them
        row = e[:, None] * N + tl.minimum(n, N - 1)[None, :]
        live = live + (routed,)
        share = share + (tl.load(pair_weight + slot).to(tl.float32),)
        parameters = parameters + (row_parameters(table, step, row_sum, bias, row, 1, HAS_BIAS),)
        chunks = chunks + (_words(words, row, CHUNKS, BW, WORDS),)
    follow(PDL)

    own_words, own_scale = _place(q_words, PLANES * ROWS * WORDS * 2), _place(q_scale, 2 * ROWS)
    pieces = _pieces(x, tl.minimum(tl.arange(0, ROWS), TOP_K - 1), M, PIECE)
    _quantize(pieces, _place(q, PLANES * ROWS * WORDS * 8), own_scale, clip, M, WORDS * 8, PIECE, BITS, CLIPPED)
    total = tl.zeros([BN], tl.float32)
    for turn in tl.static_range(TURNS):
        slot = turn * SLOTS + tl.arange(0, SLOTS)
        planes, scale, zero = _own_activations(own_words, own_scale, slot, ROWS, WORDS, PLANES, CHUNKS, BN, BW)
        y = _product(chunks[turn], planes, scale, zero, parameters[turn], CHUNKS, PAIRED)
        total += tl.sum(tl.where(live[turn][:, None], y * share[turn][:, None], 0.0), 0)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < N)


def _places(programs: int, rows: int, words: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for each program's planes, as bytes and as words, and for its scales and zeros."""
    planes = 2 if bits == 16 else 1
    q = torch.empty(programs, planes * rows * words * 8, dtype=torch.int8, device=device)
    return q, q.view(torch.int32), torch.empty(programs, rows, 2, dtype=torch.float32, device=device)


def single_up(
    x: Tensor,
    weight: TritonWeight,
    bias: Tensor | None,
    expert: Tensor,
    gated: bool,
    activation: str,
    bits: int,
    clip: float,
    programs: int,
    config: SingleConfig,
    pdl: Launch,
) -> Tensor:
    """x [1, I], expert [1, top_k], one codebook group per row -> activation(gate) * up [top_k, M] where gated, else
    activation(W x); programs: how many the GPU is to hold."""
    (E, rows, words), top_k = weight.words.shape, expert.shape[1]
    M = rows // 2 if gated else rows
    tiles = top_k * triton.cdiv(M, config.rows)
    steps = triton.cdiv(tiles, programs)
    programs = triton.cdiv(tiles, steps)
    table, paired = weight.dot_table(2 if bits == 16 else 1)
    out = torch.empty(top_k, M, dtype=x.dtype, device=x.device)
    q, q_words, q_scale = _places(programs, 1, words, bits, x.device)
    _single_up[(programs,)](
        x, q, q_words, q_scale, expert, weight.words, table, weight.step, weight.row_sum,
        bias if bias is not None else q_scale, out, clip, E,
        TOP_K=top_k, I=weight.in_features, M=M, WORDS=words, GATED=gated, ACTIVATION=activation,
        HAS_BIAS=bias is not None, BITS=bits, PAIRED=paired, CLIPPED=clip != 1, PIECE=triton.next_power_of_2(words * 8),
        STEPS=steps, BN=config.rows, BW=step_words(words, config.words), num_warps=config.warps,
        **pdl.options, maxnreg=config.registers, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def single_down(
    x: Tensor,
    weight: TritonWeight,
    bias: Tensor | None,
    expert: Tensor,
    pair_weight: Tensor,
    bits: int,
    clip: float,
    config: SingleConfig,
    pdl: Launch,
) -> Tensor:
    """x [top_k, M] of `single_up`, expert and pair_weight [1, top_k], one codebook group per row -> [1, N]."""
    (E, N, words), (top_k, M) = weight.words.shape, x.shape
    slots, most = together(top_k, config.words)
    quantized, programs = triton.next_power_of_2(top_k), triton.cdiv(N, config.rows)
    table, paired = weight.dot_table(2 if bits == 16 else 1)
    out = torch.empty(1, N, dtype=x.dtype, device=x.device)
    q, q_words, q_scale = _places(programs, quantized, words, bits, x.device)
    _single_down[(programs,)](
        x, q, q_words, q_scale, expert, pair_weight, weight.words, table, weight.step, weight.row_sum,
        bias if bias is not None else q_scale, out, clip, N, E,
        TOP_K=top_k, M=M, WORDS=words, HAS_BIAS=bias is not None, BITS=bits, PAIRED=paired, CLIPPED=clip != 1,
        PIECE=PIECE, ROWS=quantized, SLOTS=slots, BN=config.rows, BW=step_words(words, most), num_warps=config.warps,
        **pdl.options, maxnreg=config.registers, enable_fp_fusion=False,
    )  # fmt: skip
    return out
