"""Many tokens on compute capability 9.0: what `grouped` does, with lookups beside products.

Triton waits for a tensor-core product whose operand is in registers before it goes on. Here, in its explicit dialect
Gluon, a program owns two blocks of weight rows (of the gate and of `up`, or two neighbours) and looks up one while the
products of the other run. SPECIALIZED, a warp group of its own copies what the others multiply: their lookups and
products then wait for nothing else, which pays where products take most of the time.

More than 64 bytes of each row at a step would not leave room for enough tokens. But weights are copied by whole cache
lines, for two such steps at a time: by halves, products take up to 12% longer. So are int8 activations, whose two runs
alternate step by step (1 to 4%); float16, with four runs, gains nothing by that.

Copies and products belong to different proxies of shared memory. Like CUTLASS's pipelines of `cp.async` and Triton's
own, this one has no proxy fence between them: one per step takes 1 to 12%.

Triton's interpreter cannot run this: tests/test_kernels_triton.py compares it with its twin on a GPU.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from codequant.kernels.triton import activation, epilogue, grouped, launch, ptx, routing
from codequant.kernels.triton.layout import TritonWeight

SHORTEST_STEP = 64  # bytes of a packed row per step: four threads copy them
CACHE_LINE = gl.constexpr(128)
COPY_WARPS = gl.constexpr(4)

_activate = gluon.jit(epilogue.activate.fn)
_bounded_step = gluon.jit(activation.bounded_step.fn)
_block_range = gluon.jit(routing.block_range.fn)
_follow = gluon.jit(launch.follow.fn)
_lookup_bytes = gluon.jit(ptx.lookup_bytes.fn)
_lookup_pairs = gluon.jit(ptx.lookup_pairs.fn)
_tables = gluon.jit(grouped.tables.fn)
_wait = gluon.jit(launch.wait.fn)


def serves(weight: TritonWeight) -> bool:
    """Rows of one group that are two or more steps of whole copies, for the compiler fails on a loop of one step.
    Offsets within an expert have 32 bits."""
    columns = 2 * SHORTEST_STEP
    whole = weight.in_features % columns == 0 and weight.in_features > columns
    return weight.groups == 1 and whole and weight.words[0].nbytes < 2**31


def step_bytes(row_bytes: int, most: int) -> int:
    """`most`, if a row of so many bytes is two or more of these, else SHORTEST_STEP."""
    return most if row_bytes % most == 0 and row_bytes > most else SHORTEST_STEP


@gluon.jit
def _rows(e, row_block, N, GATED: gl.constexpr, BN: gl.constexpr):
    """The first of expert e's weight rows and, from there, the first row of each of the two blocks of a program and the
    last that the second one may have."""
    if GATED:
        first = row_block * BN
        return gl.cast(e, gl.int64) * (2 * N), first, first + N, 2 * N - 1
    else:
        first = row_block * (2 * BN)
        return gl.cast(e, gl.int64) * N, first, first + BN, N - 1


@gluon.jit
def _row_order(r, BN: gl.constexpr, HALF: gl.constexpr):
    """Which row of its block a program takes as its r-th; HALF: rows 4i and 4i + 1 of all i first, as they go to one
    run of `lookup_pairs`, then the others, which go to the next."""
    if HALF:
        r = r % (BN // 2) // 2 * 4 + r // (BN // 2) * 2 + r % 2
    return r


@gluon.jit
def _sources(
    x, packed, pair, e, row_block, start, end, N,
    TOP_K: gl.constexpr, P: gl.constexpr, GATHER: gl.constexpr, GATED: gl.constexpr, FLOAT: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, PER_LINE: gl.constexpr, X_LENGTH: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """Where the first copies come from: activations [BM, X_LENGTH]; which of their rows are live; the expert's weights;
    from there, both blocks [BN, PER_LINE * BK] as offsets, which take half of the registers of pointers. A thread
    copies 16 bytes at a time, without bank conflicts where they are read."""
    ITEM: gl.constexpr = 2 if FLOAT else 1
    RUN: gl.constexpr = P // (2 * ITEM)
    BYTES: gl.constexpr = BK * ITEM
    X_BYTES: gl.constexpr = X_LENGTH * ITEM
    COPY: gl.constexpr = gl.BlockedLayout([1, 16 // ITEM], [512 // X_BYTES, X_BYTES // 16], [gl.num_warps(), 1], [1, 0])
    base, first_row, second_row, last_second = _rows(e, row_block, N, GATED, BN)
    position = start + gl.arange(0, BM, layout=gl.SliceLayout(1, COPY))
    live = gl.expand_dims(position < end, 1)
    x_row = gl.minimum(position, end - 1)
    if GATHER:
        x_row = gl.load(pair + x_row) // TOP_K
    k = gl.expand_dims(gl.arange(0, X_LENGTH, layout=gl.SliceLayout(0, COPY)), 0)
    x_from = x + gl.expand_dims(x_row.to(gl.int64), 1) * P + k
    LINE: gl.constexpr = PER_LINE * BYTES
    LINES: gl.constexpr = gl.BlockedLayout([1, 16 // ITEM], [512 // LINE, LINE // 16], [gl.num_warps(), 1], [1, 0])
    k = gl.expand_dims(gl.arange(0, PER_LINE * BK, layout=gl.SliceLayout(0, LINES)), 0)
    r = _row_order(gl.arange(0, BN, layout=gl.SliceLayout(1, LINES)), BN, HALF)
    first_from = gl.expand_dims(gl.minimum(first_row + r, N - 1), 1) * RUN + k
    second_from = gl.expand_dims(gl.minimum(second_row + r, last_second), 1) * RUN + k
    return x_from, live, packed + base * RUN, first_from, second_from


@gluon.jit
def _advance(slot, phase, STAGES: gl.constexpr):
    """The next slot, and the parity of its barriers' phase: another one each time around."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def _copy_weights(packed, first, second, first_smem, second_smem, slot, line, RUN: gl.constexpr):
    """The next cache lines of the rows, or the half of them that is left."""
    LENGTH: gl.constexpr = first.shape[1]
    from_here = packed + line * LENGTH
    if RUN % LENGTH:
        k = gl.expand_dims(gl.arange(0, LENGTH, layout=gl.SliceLayout(0, first.type.layout)), 0)
        inside = k < RUN - line * LENGTH
        async_copy.async_copy_global_to_shared(first_smem.index(slot), from_here + first, mask=inside)
        async_copy.async_copy_global_to_shared(second_smem.index(slot), from_here + second, mask=inside)
    else:
        async_copy.async_copy_global_to_shared(first_smem.index(slot), from_here + first)
        async_copy.async_copy_global_to_shared(second_smem.index(slot), from_here + second)


@gluon.jit
def _copy_activations(
    x, live, xs, slot, step, plane, RUN: gl.constexpr, PLANES: gl.constexpr, FLOAT: gl.constexpr
):  # fmt: skip
    """A step's pieces of the four runs of float16, the two runs of int8, or those of two planes; of rows that are not
    live, nothing."""
    LINES: gl.constexpr = len(xs) // PLANES
    LENGTH: gl.constexpr = xs[0].shape[2]
    for i in gl.static_range(len(xs)):
        if FLOAT:
            at = step * LENGTH + i * RUN
        else:
            at = i // LINES * plane + (step * LINES + i % LINES) * LENGTH
        async_copy.async_copy_global_to_shared(xs[i].index(slot), x + at, mask=live)


@gluon.jit
def _copy(
    x, packed, pair, e, row_block, start, end, plane, N, first_smem, second_smem, xs, full, empty,
    TOP_K: gl.constexpr, P: gl.constexpr, GATHER: gl.constexpr, GATED: gl.constexpr, PLANES: gl.constexpr,
    FLOAT: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The part of the warp group that copies: fills slot after slot, as soon as it is `empty`, and says `full`."""
    ITEM: gl.constexpr = 2 if FLOAT else 1
    RUN: gl.constexpr = P // (2 * ITEM)
    STEPS: gl.constexpr = RUN // BK
    BM: gl.constexpr = xs[0].shape[1]
    x_from, live, weights, first_from, second_from = _sources(
        x, packed, pair, e, row_block, start, end, N, TOP_K, P, GATHER, GATED, FLOAT, BM, BN, BK, 1, xs[0].shape[2],
        HALF,
    )  # fmt: skip
    for s in gl.static_range(STAGES):
        if s < STEPS:
            _copy_weights(weights, first_from, second_from, first_smem, second_smem, s, s, RUN)
    _wait(PDL)
    for s in gl.static_range(STAGES):
        if s < STEPS:
            _copy_activations(x_from, live, xs, s, s, plane, RUN, PLANES, FLOAT)
            async_copy.mbarrier_arrive(full.index(s), increment_count=False)
    slot = 0
    phase = 0
    for i in range(STAGES, STEPS):
        mbarrier.wait(empty.index(slot), phase)
        _copy_weights(weights, first_from, second_from, first_smem, second_smem, slot, i, RUN)
        _copy_activations(x_from, live, xs, slot, i, plane, RUN, PLANES, FLOAT)
        async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
        slot, phase = _advance(slot, phase, STAGES)


@gluon.jit
def _multiply(sums, packed, table, xs, slot, FLOAT: gl.constexpr):
    """Looks packed weights up and starts their products with the activations of a step, plane by plane."""
    t0, t1, t2, t3 = table
    if FLOAT:
        w = _lookup_pairs(packed, t0, t1, t2, t3)
    else:
        w = _lookup_bytes(packed, t0, t1, t2, t3)
    BK: gl.constexpr = packed.shape[1]
    PER_LINE: gl.constexpr = xs[0].shape[2] // BK
    new = ()
    for p in gl.static_range(len(sums)):
        acc = sums[p]
        for i in gl.static_range(len(w)):
            x = xs[(p * len(w) + i) // PER_LINE].index(slot).slice(i % PER_LINE * BK, BK, dim=1)
            acc = warpgroup_mma(w[i], x.permute((1, 0)), acc, is_async=True)
        new = new + (acc,)
    return new


@gluon.jit
def _await(sums, PENDING: gl.constexpr):
    """Accumulators after all products but the last PENDING."""
    done = warpgroup_mma_wait(PENDING, deps=sums)
    if len(sums) == 1:
        return (done,)
    else:
        return done


@gluon.jit
def _step(
    first, second, first_smem, second_smem, xs, line_slot, slot, part: gl.constexpr, first_table, second_table,
    FLOAT: gl.constexpr, BK: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Adds the products of a step, of which those of the second block are still under way at the end."""
    w = first_smem.index(line_slot).slice(part * BK, BK, dim=1).load(OPERAND)
    v = second_smem.index(line_slot).slice(part * BK, BK, dim=1).load(OPERAND)
    PENDING: gl.constexpr = len(first) * (4 if FLOAT else 2)  # products that `_multiply` starts
    first = _multiply(first, w, first_table, xs, slot, FLOAT)
    second = _await(second, PENDING)  # of the step before
    second = _multiply(second, v, second_table, xs, slot, FLOAT)
    first = _await(first, PENDING)
    return first, second


@gluon.jit
def _finish(
    sums, scale, zero, share, step, row_sum, bias, row, FLOAT: gl.constexpr, HAS_BIAS: gl.constexpr
):  # fmt: skip
    """Accumulators [BN, BM] of the planes, high one first -> float32 results times the tokens' shares, which scale and
    zero [1, BM] contain; step and row_sum [BN]."""
    y = sums[0].to(gl.float32)
    for p in gl.static_range(1, len(sums)):
        y = y * 256.0 + sums[p].to(gl.float32)
    y = (y * gl.expand_dims(step, 1)) * scale
    if not FLOAT:
        y += gl.expand_dims(row_sum, 1) * zero
    if HAS_BIAS:
        y += gl.expand_dims(gl.load(bias + row).to(gl.float32), 1) * share
    return y


@gluon.jit
def _store(out, result, out_row, first, start, end, N, HALF: gl.constexpr):
    """Writes results [BN, BM] of the weight rows from `first` on; HALF: in the order of `lookup_pairs`."""
    BN: gl.constexpr = result.shape[0]
    BM: gl.constexpr = result.shape[1]
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, gl.num_warps()], [0, 1])
    r = gl.arange(0, BN, layout=gl.SliceLayout(1, OUT))
    if HALF:
        # `_row_order` has put the rows of a run side by side. N is a multiple of 64, and so a half of it of 32.
        pair = first // 2 + r % (BN // 2)
        inside = pair < N // 2
        n = pair + gl.where(pair < N // 4, 0, N // 4) + r // (BN // 2) * (N // 4)
        n = gl.max_contiguous(gl.multiple_of(n, 8), 8)
    else:
        n = first + r
        inside = n < N
    live = start + gl.arange(0, BM, layout=gl.SliceLayout(0, OUT)) < end
    inside = gl.expand_dims(inside, 1) & gl.expand_dims(live, 0)
    row = out_row.load(gl.SliceLayout(0, OUT)).to(gl.int64)
    gl.store(out + gl.expand_dims(row, 0) * N + gl.expand_dims(n, 1), result.load(OUT), mask=inside)


@gluon.jit
def _multiply_block(
    x, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out, norm, out_scale, pair,
    e, row_block, start, end, plane, N,
    first_smem, second_smem, xs, full, empty,
    TOP_K: gl.constexpr, P: gl.constexpr, GATHER: gl.constexpr, SCATTER: gl.constexpr, GATED: gl.constexpr,
    ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, PLANES: gl.constexpr, FLOAT: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, SPECIALIZED: gl.constexpr, HALF: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The part of the warps that multiply, and without SPECIALIZED also copy."""
    WARPS: gl.constexpr = gl.num_warps()
    ITEM: gl.constexpr = 2 if FLOAT else 1
    RUN: gl.constexpr = P // (2 * ITEM)  # elements of a packed row, and columns of a run of x
    STEPS: gl.constexpr = RUN // BK
    PER_LINE: gl.constexpr = first_smem.shape[2] // BK
    LINE_SLOTS: gl.constexpr = first_smem.shape[0]

    SUM_TYPE: gl.constexpr = gl.float32 if FLOAT else gl.int32
    OUT_TYPE: gl.constexpr = out.dtype.element_ty
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 32 // ITEM])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4 // ITEM)
    TOKEN: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    LIST: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    OUT_SHARED: gl.constexpr = gl.NVMMASharedLayout(128, OUT_TYPE.primitive_bitwidth, 2, transposed=True)

    base, first_row, second_row, last_second = _rows(e, row_block, N, GATED, BN)
    if not SPECIALIZED:
        x_from, live, weights, first_from, second_from = _sources(
            x, packed, pair, e, row_block, start, end, N, TOP_K, P, GATHER, GATED, FLOAT, BM, BN, BK, PER_LINE,
            xs[0].shape[2], HALF,
        )  # fmt: skip
        for s in gl.static_range(0, STAGES - 1, PER_LINE):
            if s < STEPS:
                _copy_weights(
                    weights, first_from, second_from, first_smem, second_smem, s // PER_LINE, s // PER_LINE, RUN
                )
    r = _row_order(gl.arange(0, BN, layout=gl.SliceLayout(1, OPERAND)), BN, HALF)
    first_table = _tables(table, base + gl.minimum(first_row + r, N - 1), FLOAT)
    second_table = _tables(table, base + gl.minimum(second_row + r, last_second), FLOAT)
    # What the results need of each row as well: loaded at the end, it would be one more way to memory to wait for.
    r = _row_order(gl.arange(0, BN, layout=gl.SliceLayout(1, SUMS)), BN, HALF)
    first_at = base + gl.minimum(first_row + r, N - 1)
    second_at = base + gl.minimum(second_row + r, last_second)
    first_step, first_sum = gl.load(step + first_at), gl.load(row_sum + first_at)
    second_step, second_sum = gl.load(step + second_at), gl.load(row_sum + second_at)
    _follow(PDL)  # all of the above is older than the kernel before this one, the quantization
    if not SPECIALIZED:
        for s in gl.static_range(STAGES - 1):
            if s < STEPS:
                _copy_activations(x_from, live, xs, s, s, plane, RUN, PLANES, FLOAT)
            async_copy.commit_group()

    # What the results need of each token goes through shared memory: every thread holds results of many tokens.
    token = gl.minimum(start + gl.arange(0, BM, layout=TOKEN), end - 1)
    x_row = token
    out_row = token
    if GATHER or SCATTER:
        p = gl.load(pair + token)
        if GATHER:
            x_row = p // TOP_K
        if SCATTER:
            out_row = p
    scale = gl.load(x_scale + x_row)
    zero = scale
    if not FLOAT:
        zero = gl.load(x_zero + x_row)
    if HALF and row_block == 0:
        out_step, _ = _bounded_step(scale, gl.load(norm + e), P, GATED)
        gl.store(out_scale + token, out_step)
    if SCATTER:
        share = gl.load(pair_weight + p).to(gl.float32)
        scale *= share
        zero *= share
        share_smem = gl.allocate_shared_memory(gl.float32, [BM], LIST, share)
    scale_smem = gl.allocate_shared_memory(gl.float32, [BM], LIST, scale)
    zero_smem = scale_smem
    if not FLOAT:
        zero_smem = gl.allocate_shared_memory(gl.float32, [BM], LIST, zero)
    out_row_smem = gl.allocate_shared_memory(gl.int32, [BM], LIST, out_row)

    first = ()
    second = ()
    for _ in gl.static_range(PLANES):
        first = first + (gl.zeros([BN, BM], SUM_TYPE, SUMS),)
        second = second + (warpgroup_mma_init(gl.zeros([BN, BM], SUM_TYPE, SUMS)),)
    slot = 0
    phase = 0
    for line in range(STEPS // PER_LINE):
        for part in gl.static_range(PER_LINE):
            i = line * PER_LINE + part
            if SPECIALIZED:
                mbarrier.wait(full.index(slot), phase)
            else:
                async_copy.wait_group(STAGES - 2)
            first, second = _step(
                first, second, first_smem, second_smem, xs, line % LINE_SLOTS, slot, part, first_table, second_table,
                FLOAT, BK, OPERAND,
            )  # fmt: skip
            before = (slot + STAGES - 1) % STAGES  # of the step before, whose last products have been waited for
            if SPECIALIZED:
                if i > 0:
                    mbarrier.arrive(empty.index(before))
            else:
                if i + STAGES - 1 < STEPS:
                    if (part + STAGES - 1) % PER_LINE == 0:
                        lines = (part + STAGES - 1) // PER_LINE
                        target = (line + lines) % LINE_SLOTS
                        gl.thread_barrier()  # the slot's weights may be this step's: all warps have them in registers
                        _copy_weights(
                            weights, first_from, second_from, first_smem, second_smem, target, line + lines, RUN
                        )
                    _copy_activations(x_from, live, xs, before, i + STAGES - 1, plane, RUN, PLANES, FLOAT)
                async_copy.commit_group()
            slot, phase = _advance(slot, phase, STAGES)
    if STEPS % PER_LINE:
        async_copy.wait_group(0)
        first, second = _step(
            first, second, first_smem, second_smem, xs, STEPS // PER_LINE % LINE_SLOTS, slot, 0, first_table,
            second_table, FLOAT, BK, OPERAND,
        )  # fmt: skip
    second = _await(second, 0)

    scale = gl.expand_dims(scale_smem.load(gl.SliceLayout(0, SUMS)), 0)
    zero = gl.expand_dims(zero_smem.load(gl.SliceLayout(0, SUMS)), 0)
    share = 1.0
    if SCATTER and HAS_BIAS:
        share = gl.expand_dims(share_smem.load(gl.SliceLayout(0, SUMS)), 0)
    y = _finish(first, scale, zero, share, first_step, first_sum, bias, first_at, FLOAT, HAS_BIAS)
    y = _activate(y, ACTIVATION)
    z = _finish(second, scale, zero, share, second_step, second_sum, bias, second_at, FLOAT, HAS_BIAS)
    if GATED:
        y *= z
    else:
        z = _activate(z, ACTIVATION)

    if HALF:
        _, inverse = _bounded_step(scale, gl.load(norm + e), P, GATED)
        y *= inverse
        if not GATED:
            z *= inverse
    # Through shared memory once more, for neighbours of a row of `out` to be written together.
    out_smem = gl.allocate_shared_memory(OUT_TYPE, [BN, BM], OUT_SHARED, y.to(OUT_TYPE))
    _store(out, out_smem, out_row_smem, first_row, start, end, N, HALF)
    if not GATED:
        out_smem.store(z.to(OUT_TYPE))
        _store(out, out_smem, out_row_smem, first_row + BN, start, end, N, HALF)


@gluon.jit
def _block(
    x, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out, norm, out_scale, pair,
    e, row_block, start, end, plane, N,
    TOP_K: gl.constexpr, P: gl.constexpr, GATHER: gl.constexpr, SCATTER: gl.constexpr, GATED: gl.constexpr,
    ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, PLANES: gl.constexpr, FLOAT: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, SPECIALIZED: gl.constexpr, HALF: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Two blocks of BN weight rows of expert e times the tokens at positions start..end, BM of them at most."""
    ITEM: gl.constexpr = 2 if FLOAT else 1
    BYTES: gl.constexpr = BK * ITEM
    X_TYPE: gl.constexpr = gl.float16 if FLOAT else gl.int8
    W_TYPE: gl.constexpr = gl.uint16 if FLOAT else gl.uint8
    # Steps of 64 bytes copy 128 of the weights every other time: whole cache lines. Not where that makes a loop of one,
    # and not copying warps, which would need more barriers.
    STEPS: gl.constexpr = P // (2 * BYTES)
    PER_LINE: gl.constexpr = 2 if BYTES == 64 and STEPS >= 4 and not SPECIALIZED else 1
    LINE_SLOTS: gl.constexpr = (STAGES + PER_LINE - 1) // PER_LINE
    LINE: gl.constexpr = PER_LINE * BYTES
    W_SHARED: gl.constexpr = gl.SwizzledSharedLayout(16 // ITEM, 128 // LINE, LINE // 16, [1, 0])
    X_BYTES: gl.constexpr = BYTES if FLOAT else CACHE_LINE
    X_SHARED: gl.constexpr = gl.NVMMASharedLayout(X_BYTES, 8 * ITEM, 2)
    first_smem = gl.allocate_shared_memory(W_TYPE, [LINE_SLOTS, BN, PER_LINE * BK], W_SHARED)
    second_smem = gl.allocate_shared_memory(W_TYPE, [LINE_SLOTS, BN, PER_LINE * BK], W_SHARED)
    xs = ()
    for _ in gl.static_range(PLANES * (2 * ITEM) * BYTES // X_BYTES):
        xs = xs + (gl.allocate_shared_memory(X_TYPE, [STAGES, BM, X_BYTES // ITEM], X_SHARED),)
    if SPECIALIZED:
        COPY_REGISTERS: gl.constexpr = 40 if FLOAT else 80  # whole lines take twice the addresses
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for s in gl.static_range(STAGES):
            mbarrier.init(full.index(s), count=32 * COPY_WARPS)
            mbarrier.init(empty.index(s), count=1)
        gl.thread_barrier()
        gl.warp_specialize(
            [
                (
                    _multiply_block,
                    (
                        x, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out, norm, out_scale, pair,
                        e, row_block, start, end, plane, N, first_smem, second_smem, xs, full, empty,
                        TOP_K, P, GATHER, SCATTER, GATED, ACTIVATION, HAS_BIAS, PLANES, FLOAT, BM, BN, BK, STAGES,
                        SPECIALIZED, HALF, PDL,
                    ),
                ),
                (
                    _copy,
                    (
                        x, packed, pair, e, row_block, start, end, plane, N, first_smem, second_smem, xs,
                        full, empty, TOP_K, P, GATHER, GATED, PLANES, FLOAT, BN, BK, STAGES, HALF, PDL,
                    ),
                ),
            ],
            [COPY_WARPS],
            [COPY_REGISTERS],
        )  # fmt: skip
    else:
        _multiply_block(
            x, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out, norm, out_scale, pair,
            e, row_block, start, end, plane, N, first_smem, second_smem, xs, None, None,
            TOP_K, P, GATHER, SCATTER, GATED, ACTIVATION, HAS_BIAS, PLANES, FLOAT, BM, BN, BK, STAGES,
            SPECIALIZED, HALF, PDL,
        )  # fmt: skip


@gluon.jit
def kernel(
    x, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out,
    pair, block_expert, block_start, block_end, tokens, plane, N, E, norm, out_scale,
    TOP_K: gl.constexpr, P: gl.constexpr, ROUTED: gl.constexpr, GATHER: gl.constexpr, SCATTER: gl.constexpr,
    GATED: gl.constexpr, ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, PLANES: gl.constexpr, FLOAT: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, SPAN: gl.constexpr,
    SPECIALIZED: gl.constexpr, HALF: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As `grouped._grouped`; norm float32 [E]. HALF: `out` is float16 as `Activations` have it, and out_scale float32
    [positions] its scale. Grid (blocks of rows, blocks of tokens); SPAN blocks of tokens share rows at a time."""
    place = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    first_block = place // (SPAN * gl.num_programs(0)) * SPAN
    span = gl.minimum(gl.num_programs(1) - first_block, SPAN)
    within = place - first_block * gl.num_programs(0)
    block = first_block + within % span
    row_block = within // span
    e, start, stop = _block_range(block, block_expert, block_start, block_end, tokens, ROUTED, BM)
    if ROUTED and e >= E:
        return
    # An expert's last block, often its only one, may be short: it then takes a half or a quarter of the products.
    if BM >= 32 and stop - start <= BM // 4:
        _block(
            x, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out, norm, out_scale, pair,
            e, row_block, start, stop, plane, N,
            TOP_K, P, GATHER, SCATTER, GATED, ACTIVATION, HAS_BIAS, PLANES, FLOAT, BM // 4, BN, BK, STAGES,
            SPECIALIZED, HALF, PDL,
        )  # fmt: skip
    elif stop - start <= BM // 2:
        _block(
            x, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out, norm, out_scale, pair,
            e, row_block, start, stop, plane, N,
            TOP_K, P, GATHER, SCATTER, GATED, ACTIVATION, HAS_BIAS, PLANES, FLOAT, BM // 2, BN, BK, STAGES,
            SPECIALIZED, HALF, PDL,
        )  # fmt: skip
    else:
        _block(
            x, x_scale, x_zero, pair_weight, packed, table, step, row_sum, bias, out, norm, out_scale, pair,
            e, row_block, start, stop, plane, N,
            TOP_K, P, GATHER, SCATTER, GATED, ACTIVATION, HAS_BIAS, PLANES, FLOAT, BM, BN, BK, STAGES,
            SPECIALIZED, HALF, PDL,
        )  # fmt: skip
