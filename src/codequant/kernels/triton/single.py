# Triton takes tuples that grow by addition alone: no starred items, and no annotations on variables.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc"
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
from codequant.kernels.triton.decode import finish, load_words, row_parameters
from codequant.kernels.triton.dispatch import SingleConfig
from codequant.kernels.triton.epilogue import activate
from codequant.kernels.triton.launch import Launch, follow
from codequant.kernels.triton.layout import TritonWeight
from codequant.kernels.triton.ptx import dp4a, lookup_words

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
def _halves(q, row, CHUNKS: tl.constexpr, BW: tl.constexpr, WORDS: tl.constexpr):
    """What meets the two halves of each weight word: a tuple of CHUNKS pairs int32 [SLOTS, BW]."""
    halves = ()
    for i in tl.static_range(CHUNKS):
        word = (i * BW + tl.arange(0, BW))[None, :]
        first = q + row[:, None] * (2 * WORDS) + word
        one = load_words(first, word, WORDS, BW)
        halves = halves + ((one, load_words(first + WORDS, word, WORDS, BW)),)
    return halves


@triton.jit
def _words(words, row, USED: tl.constexpr, CHUNKS: tl.constexpr, BW: tl.constexpr, WORDS: tl.constexpr):
    """Weight rows [SLOTS, BN], of which the first USED slots count -> a tuple of CHUNKS int32 [SLOTS, BN, BW]."""
    chunks = ()
    for i in tl.static_range(CHUNKS):
        word = (i * BW + tl.arange(0, BW))[None, None, :]
        source = words + row[:, :, None] * WORDS + word
        if USED < row.shape[0]:
            used = (tl.arange(0, row.shape[0]) < USED)[:, None, None]
            chunk = tl.load(source, mask=used & (word < WORDS), other=0)
        else:
            chunk = load_words(source, word, WORDS, BW)
        chunks = chunks + (chunk,)
    return chunks


@triton.jit
def _dot(chunks, halves, parameters, CHUNKS: tl.constexpr):
    """int32 [SLOTS, BN, BW], whose last axis is still to be summed."""
    t0, t1, t2, t3 = parameters[0]
    acc = tl.zeros(chunks[0].shape, tl.int32)
    for i in tl.static_range(CHUNKS):
        w0, w1 = lookup_words(chunks[i], t0, t1, t2, t3)
        acc = dp4a(w1, halves[i][1][:, None, :], dp4a(w0, halves[i][0][:, None, :], acc))
    return acc


@triton.jit
def _product(chunks, halves, halves_low, scale, zero, parameters, CHUNKS: tl.constexpr, PLANES: tl.constexpr):
    """float32 [SLOTS, BN]."""
    high = _dot(chunks, halves, parameters, CHUNKS)
    low = high
    if PLANES == 2:
        low = _dot(chunks, halves_low, parameters, CHUNKS)
    return finish(high, low, low, scale, zero, parameters, PLANES)


@triton.jit
def _own_activations(
    pieces, q, q_words, q_scale, clip, row,
    S: tl.constexpr, WORDS: tl.constexpr, PIECE: tl.constexpr, BITS: tl.constexpr, CLIPPED: tl.constexpr,
    CHUNKS: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """`_pieces` of rows `row`, the first so many -> their (halves, those of the low plane, scale, zero), by way of this
    program's place in memory."""
    ROWS: tl.constexpr = row.shape[0]
    PLANES: tl.constexpr = 2 if BITS == 16 else 1
    place = tl.program_id(0).to(tl.int64) * (PLANES * ROWS * WORDS)
    own_scale = q_scale + tl.program_id(0) * (2 * ROWS)
    _quantize(pieces, q + place * 8, own_scale, clip, S, WORDS * 8, PIECE, BITS, CLIPPED)
    halves = _halves(q_words + place * 2, row, CHUNKS, BW, WORDS)
    halves_low = halves
    if PLANES == 2:
        halves_low = _halves(q_words + place * 2, row + ROWS, CHUNKS, BW, WORDS)
    return halves, halves_low, tl.load(own_scale + 2 * row), tl.load(own_scale + 2 * row + 1)


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
        e = tl.load(expert + pair)
        routed = (e >= 0) & (e < E)
        row = tl.where(routed, e, 0).to(tl.int64) * (2 * M if GATED else M) + tl.minimum(n, M - 1)
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
    gate_next = _words(words, rows[0], 1, CHUNKS, BW, WORDS)
    if GATED:
        up_next = _words(words, rows[0] + M, 1, CHUNKS, BW, WORDS)

    halves, halves_low, scale, zero = _own_activations(
        pieces, q, q_words, q_scale, clip, first, I, WORDS, PIECE, BITS, CLIPPED, CHUNKS, BW
    )
    for i in tl.static_range(STEPS):
        gate = gate_next
        if GATED:
            up = up_next
        if i + 1 < STEPS:
            gate_next = _words(words, rows[i + 1], 1, CHUNKS, BW, WORDS)
            if GATED:
                up_next = _words(words, rows[i + 1] + M, 1, CHUNKS, BW, WORDS)
        y = activate(_product(gate, halves, halves_low, scale, zero, gate_rows[i], CHUNKS, PLANES), ACTIVATION)
        if GATED:
            y *= _product(up, halves, halves_low, scale, zero, up_rows[i], CHUNKS, PLANES)
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
    CLIPPED: tl.constexpr,
    PIECE: tl.constexpr,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [TOP_K, M] -> out [N]: a program sums BN rows over the token's experts, which sit side by side in SLOTS."""
    CHUNKS: tl.constexpr = (WORDS + BW - 1) // BW
    PLANES: tl.constexpr = 2 if BITS == 16 else 1
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    slot = tl.minimum(tl.arange(0, SLOTS), TOP_K - 1)
    e = tl.load(expert + slot)  # `up` has waited for them
    live = (tl.arange(0, SLOTS) < TOP_K) & (e >= 0) & (e < E)
    row = tl.where(live, e, 0).to(tl.int64)[:, None] * N + tl.minimum(n, N - 1)[None, :]
    parameters = row_parameters(table, step, row_sum, bias, row, 1, HAS_BIAS)
    share = tl.load(pair_weight + slot).to(tl.float32)
    chunks = _words(words, row, TOP_K, CHUNKS, BW, WORDS)
    follow(PDL)

    halves, halves_low, scale, zero = _own_activations(
        _pieces(x, slot, M, PIECE), q, q_words, q_scale, clip, slot, M, WORDS, PIECE, BITS, CLIPPED, CHUNKS, BW
    )
    y = _product(chunks, halves, halves_low, scale, zero, parameters, CHUNKS, PLANES) * share[:, None]
    y = tl.sum(tl.where(live[:, None], y, 0.0), 0)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)


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
    out = torch.empty(top_k, M, dtype=x.dtype, device=x.device)
    q, q_words, q_scale = _places(programs, 1, words, bits, x.device)
    _single_up[(programs,)](
        x, q, q_words, q_scale, expert, weight.words, weight.table.view(torch.int64), weight.step, weight.row_sum,
        bias if bias is not None else q_scale, out, clip, E,
        TOP_K=top_k, I=weight.in_features, M=M, WORDS=words, GATED=gated, ACTIVATION=activation,
        HAS_BIAS=bias is not None, BITS=bits, CLIPPED=clip != 1, PIECE=triton.next_power_of_2(words * 8), STEPS=steps,
        BN=config.rows, BW=min(config.words, triton.next_power_of_2(words)), num_warps=config.warps,
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
    slots, programs = triton.next_power_of_2(top_k), triton.cdiv(N, config.rows)
    out = torch.empty(1, N, dtype=x.dtype, device=x.device)
    q, q_words, q_scale = _places(programs, slots, words, bits, x.device)
    _single_down[(programs,)](
        x, q, q_words, q_scale, expert, pair_weight, weight.words, weight.table.view(torch.int64), weight.step,
        weight.row_sum, bias if bias is not None else q_scale, out, clip, N, E,
        TOP_K=top_k, M=M, WORDS=words, HAS_BIAS=bias is not None, BITS=bits, CLIPPED=clip != 1, PIECE=PIECE,
        SLOTS=slots, BN=config.rows, BW=min(config.words, triton.next_power_of_2(words)),
        num_warps=config.warps, **pdl.options, maxnreg=config.registers, enable_fp_fusion=False,
    )  # fmt: skip
    return out
