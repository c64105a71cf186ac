"""Few tokens: each program multiplies a block of weight rows with one token, on dp4a, without any routing pass.

At a batch of a few the time is the weights' way from memory plus launches: the expert comes straight from the routing
indices, the gate, its activation and `up` share a program, and `down` sums a token's experts in registers. With
programmatic dependent launch (PDL) a program asks for its first weights before the activations it needs are finished.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from codequant.kernels.triton.activation import Activations
from codequant.kernels.triton.dispatch import DecodeConfig
from codequant.kernels.triton.epilogue import activate
from codequant.kernels.triton.launch import Launch, follow
from codequant.kernels.triton.layout import TritonWeight, padded_group
from codequant.kernels.triton.ptx import dp4a, lookup_dot, lookup_words


@triton.jit
def _table(table, index):
    """The four registers of each table, index counting tables."""
    low, high = tl.load(table + index * 2), tl.load(table + index * 2 + 1)
    return low.to(tl.int32), (low >> 32).to(tl.int32), high.to(tl.int32), (high >> 32).to(tl.int32)


@triton.jit
def routed_experts(expert, pair, E):
    """(whether the pairs' experts are among the E here, these as int64); the first one for the others."""
    e = tl.load(expert + pair)
    routed = (e >= 0) & (e < E)
    return routed, tl.where(routed, e, 0).to(tl.int64)


@triton.jit
def row_parameters(table, step, row_sum, bias, row, G: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(tables [SLOTS, BN, 1], steps, sums, biases) of rows [SLOTS, BN]; tables and steps for one group per row."""
    if G == 1:
        own_table = _table(table, row[:, :, None])
        own_step = tl.load(step + row)
    else:
        own_table = (0, 0, 0, 0)
        own_step = tl.full(row.shape, 1.0, tl.float32)
    if HAS_BIAS:
        own_bias = tl.load(bias + row).to(tl.float32)
    else:
        own_bias = tl.zeros(row.shape, tl.float32)
    return own_table, own_step, tl.load(row_sum + row), own_bias


@triton.jit
def load_words(pointer, word, WORDS: tl.constexpr, BW: tl.constexpr):
    """int32 at `pointer`, for BW words `word` of a row of WORDS; zero past its end. Where all steps are full nothing is
    masked, for a mask costs an instruction per two words that makes the zero."""
    if WORDS % BW == 0:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=word < WORDS, other=0)


@triton.jit
def _activations(
    x, x_at, word, WORDS: tl.constexpr, WORDS_PER_GROUP: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
    REDUCE: tl.constexpr,
):  # fmt: skip
    """What meets the two halves of each weight word: int32 [SLOTS, 1, BW] each. With REDUCE, where blocks are short and
    a thread has one row, [SLOTS, BN, BW]: each loads its own, and none comes from others through shared memory."""
    column = word + word // WORDS_PER_GROUP * WORDS_PER_GROUP  # a group's second half is next
    if REDUCE:
        at = x + x_at[:, None, None] + column[None, None, :] + tl.zeros([1, BN, 1], tl.int32)
        first = load_words(at, word[None, None, :], WORDS, BW)
        second = load_words(at + WORDS_PER_GROUP, word[None, None, :], WORDS, BW)
    else:
        at = x_at[:, None] + column[None, :]
        first = load_words(x + at, word[None, :], WORDS, BW)[:, None, :]
        second = load_words(x + at + WORDS_PER_GROUP, word[None, :], WORDS, BW)[:, None, :]
    return first, second


@triton.jit
def add_products(acc, packed, first, second, own_table, PAIRED: tl.constexpr):
    """acc [SLOTS, BN, BW] += products of weight words and what meets their halves, in integers."""
    t0, t1, t2, t3 = own_table
    if PAIRED:
        acc = lookup_dot(packed, t0, t1, t2, t3, first, second, acc)
    else:
        w0, w1 = lookup_words(packed, t0, t1, t2, t3)
        acc = dp4a(w1, second, dp4a(w0, first, acc))
    return acc


@triton.jit
def _accumulate(
    acc, packed, first, second, own_table, table, step, row, word,
    G: tl.constexpr, WORDS_PER_GROUP: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """acc [SLOTS, BN, BW] += products of this chunk, in integers for one group per row, else scaled in float32."""
    if G == 1:
        acc = add_products(acc, packed, first, second, own_table, PAIRED)
    else:
        index = row[:, :, None] * G + tl.minimum(word // WORDS_PER_GROUP, G - 1)[None, None, :]
        t0, t1, t2, t3 = _table(table, index)
        w0, w1 = lookup_words(packed, t0, t1, t2, t3)
        dot = dp4a(w1, second, dp4a(w0, first, tl.zeros(packed.shape, tl.int32)))
        acc += dot.to(tl.float32) * tl.load(step + index)
    return acc


@triton.jit
def _multiply(
    gate, up, x, plane, x_at, word, gate_words, up_words, gate_rows, up_rows, table, step, row, N,
    GATED: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, WORDS_PER_GROUP: tl.constexpr, BW: tl.constexpr,
    PAIRED: tl.constexpr, BN: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Accumulators, one for each plane of the activations, + the products of this chunk of weights."""
    gates = ()
    ups = ()
    for p in tl.static_range(len(gate)):
        first, second = _activations(x + p * plane, x_at, word, WORDS, WORDS_PER_GROUP, BN, BW, REDUCE)
        total = _accumulate(
            gate[p], gate_words, first, second, gate_rows[0], table, step, row, word, G, WORDS_PER_GROUP, PAIRED
        )
        gates = gates + (total,)
        if GATED:
            total = _accumulate(
                up[p], up_words, first, second, up_rows[0], table, step, row + N, word, G, WORDS_PER_GROUP, PAIRED
            )
        ups = ups + (total,)
    return gates, ups


@triton.jit
def finish(planes, scale, zero, parameters):
    """Accumulators [SLOTS, BN, BW], high planes first -> float32 results [SLOTS, BN]."""
    _, step, row_sum, bias = parameters
    y = tl.sum(planes[0], 2).to(tl.float32)
    for p in tl.static_range(1, len(planes)):
        y = y * 256.0 + tl.sum(planes[p], 2).to(tl.float32)
    return y * step * scale[:, None] + zero[:, None] * row_sum + bias


@triton.jit
def _ask(
    gates, ups, weight, step: tl.constexpr, c, N,
    CHUNKS: tl.constexpr, GATED: tl.constexpr, WORDS: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The words of one step more, of the turn's rows of the gate and of `up`."""
    at = weight[step // CHUNKS] + step % CHUNKS * BW
    word = c + step % CHUNKS * BW
    gate = load_words(at, word, WORDS, BW)
    up = gate
    if GATED:
        up = load_words(at + N * WORDS, word, WORDS, BW)
    return gates + (gate,), ups + (up,)


@triton.jit
def _decode(
    x,
    x_scale,
    x_zero,
    expert,
    pair_weight,
    words,
    table,
    step,
    row_sum,
    bias,
    out,
    plane,
    N,
    E,
    TOP_K: tl.constexpr,
    G: tl.constexpr,
    WORDS_PER_GROUP: tl.constexpr,
    ROUTED: tl.constexpr,
    REDUCE: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PLANES: tl.constexpr,
    PAIRED: tl.constexpr,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (outputs, blocks of BN rows), for outputs of one expert to find its rows in the cache; x int32
    [PLANES, rows, 2 * WORDS], four activations each, `plane` words from one plane to the next.

    Without REDUCE output q is pair q, of token q // TOP_K; with it output q is token q and sums its TOP_K pairs, SLOTS
    of them side by side at a time. GATED: rows N..2N hold `up`, rows 0..N the gate, and the output is
    activation(gate) * up. PAIRED: the table is that of `layout.paired_entries`.
    """
    WORDS: tl.constexpr = G * WORDS_PER_GROUP
    CHUNKS: tl.constexpr = (WORDS + BW - 1) // BW
    TURNS: tl.constexpr = TOP_K // SLOTS if REDUCE else 1
    q = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    n_safe = tl.minimum(n, N - 1)
    c = tl.arange(0, BW)[None, None, :]
    pair = ()
    live = ()
    row = ()
    weight = ()
    for turn in tl.static_range(TURNS):
        slot = turn * SLOTS + tl.arange(0, SLOTS)
        pair = pair + ((q * TOP_K if REDUCE else q) + slot,)
        if ROUTED:  # older than the kernel before this one, which waited for it; pairs without an expert are left out
            routed, e = routed_experts(expert, pair[turn], E)
        else:
            routed = slot >= 0
            e = tl.zeros([SLOTS], tl.int64)
        live = live + (routed,)
        row = row + (e[:, None] * (2 * N if GATED else N) + n_safe[None, :],)  # [SLOTS, BN]
        weight = weight + (words + row[turn][:, :, None] * WORDS + c,)
    gates = ()
    ups = ()
    for early in tl.static_range(min(AHEAD, TURNS * CHUNKS)):
        gates, ups = _ask(gates, ups, weight, early, c, N, CHUNKS, GATED, WORDS, BW)
    # One way to memory for all that a program needs: a second one at its end would cost as much again.
    gate_rows = ()
    share = ()
    for turn in tl.static_range(TURNS):
        gate_rows = gate_rows + (row_parameters(table, step, row_sum, bias, row[turn], G, HAS_BIAS),)
        if REDUCE:
            share = share + (tl.load(pair_weight + pair[turn]).to(tl.float32),)
    up_rows = gate_rows[0]
    if GATED:
        up_rows = row_parameters(table, step, row_sum, bias, row[0] + N, G, HAS_BIAS)
    follow(PDL)

    DTYPE: tl.constexpr = tl.int32 if G == 1 else tl.float32
    none = ()
    for _ in tl.static_range(PLANES):
        none = none + (tl.zeros([SLOTS, BN, BW], DTYPE),)
    total = tl.zeros([BN], tl.float32)
    for turn in tl.static_range(TURNS):
        gate = none
        up = none
        x_row = pair[turn] if REDUCE else pair[turn] // TOP_K
        x_at = x_row.to(tl.int64) * (2 * WORDS)
        for i in tl.static_range(CHUNKS):
            word = i * BW + tl.arange(0, BW)
            gate_words = gates[turn * CHUNKS + i]
            up_words = ups[turn * CHUNKS + i]
            if turn * CHUNKS + i + AHEAD < TURNS * CHUNKS:
                gates, ups = _ask(gates, ups, weight, turn * CHUNKS + i + AHEAD, c, N, CHUNKS, GATED, WORDS, BW)

            gate, up = _multiply(
                gate, up, x, plane, x_at, word, gate_words, up_words, gate_rows[turn], up_rows, table, step, row[turn],
                N, GATED, G, WORDS, WORDS_PER_GROUP, BW, PAIRED, BN, REDUCE,
            )  # fmt: skip

        scale = tl.load(x_scale + x_row)
        zero = tl.load(x_zero + x_row)
        y = activate(finish(gate, scale, zero, gate_rows[turn]), ACTIVATION)
        if GATED:
            y *= finish(up, scale, zero, up_rows)
        if REDUCE:
            y = y * share[turn][:, None]
        total += tl.sum(tl.where(live[turn][:, None], y, 0.0), 0)  # [BN]
    tl.store(out + q.to(tl.int64) * N + n, total.to(out.dtype.element_ty), mask=n < N)


def together(top_k: int, words: int) -> tuple[int, int]:
    """(how many of a token's experts sit side by side, a power of two that divides top_k; words of each per step), when
    there were `words` per step of all, rounded up to a power of two."""
    slots = top_k & -top_k
    return slots, words * triton.next_power_of_2(top_k) // slots


@cache
def step_words(words: int, most: int) -> int:
    """The longest step, a power of two up to `most`, that pads a row of so many words by an eighth or less."""
    steps = [most >> i for i in range(most.bit_length() - 4)]  # of 16 words or more
    fitting = (step for step in steps if triton.cdiv(words, step) * step <= words * 9 / 8)
    return next(fitting, min(most, triton.next_power_of_2(words)))


def decode(
    x: Activations,
    weight: TritonWeight,
    bias: Tensor | None,
    expert: Tensor | None,
    pair_weight: Tensor | None,
    top_k: int,
    gated: bool,
    activation: str,
    out_dtype: torch.dtype,
    config: DecodeConfig,
    pdl: Launch,
) -> Tensor:
    """x in an integer form. One output row per pair of x [T, I] and expert [T, top_k] or, given pair_weight,
    x [T * top_k, I] and one output row per token. expert None: a single matrix and top_k = 1."""
    values, scale, zero = x
    planes, tokens, columns = values.shape
    reduce = pair_weight is not None
    E, rows, _ = weight.words.shape
    N = rows // 2 if gated else rows
    outputs = tokens // top_k if reduce else tokens * top_k
    out = torch.empty(outputs, N, dtype=out_dtype, device=values.device)
    words_per_group = padded_group(weight.in_features // weight.groups) // 8
    slots, most = together(top_k, config.words) if reduce else (1, config.words)
    table, paired = weight.dot_table(planes)
    _decode[(outputs, triton.cdiv(N, config.rows))](
        values.view(torch.int32), scale, zero, expert if expert is not None else scale,
        pair_weight if reduce else scale, weight.words, table, weight.step, weight.row_sum,
        bias if bias is not None else scale, out, tokens * columns // 4, N, E,
        TOP_K=top_k, G=weight.groups, WORDS_PER_GROUP=words_per_group, ROUTED=expert is not None, REDUCE=reduce,
        GATED=gated, ACTIVATION=activation, HAS_BIAS=bias is not None, PLANES=planes, PAIRED=paired, SLOTS=slots,
        BN=config.rows, BW=step_words(weight.groups * words_per_group, most), num_warps=config.warps,
        maxnreg=config.registers if weight.groups == 1 and planes <= 2 else None, AHEAD=config.ahead, **pdl.options,
    )  # fmt: skip
    return out
