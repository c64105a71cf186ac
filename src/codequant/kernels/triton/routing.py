"""Sort (token, expert) pairs by expert on the GPU: no host synchronization, so that CUDA graphs can hold it.

The pairs of one expert become consecutive; each expert's run is cut into blocks of BM pairs, and a matrix kernel runs
one program row per block. How many blocks there are is known only on the device: the grid is the upper bound, and
programs without a block return at once. Pairs whose expert is not in 0..E-1 (sentinels of expert parallelism) come last
and belong to no block.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from codequant.kernels.triton.launch import Launch, follow

CHUNK = 64, 256  # pairs that one program places: at least, and at most
COUNTED = 2048  # more pairs than these are counted by kernels before
SHARE = 8  # blocks that one program lists
MIN_BLOCK = 16  # pairs in a block: the narrowest tensor-core product


@dataclass(frozen=True)
class Routing:
    pair: Tensor  # int32 [pairs]: position in expert order -> pair
    block_expert: Tensor  # int32 [blocks]: E where there is no such block
    block_start: Tensor  # int32 [blocks]: position of its first pair
    block_end: Tensor  # int32 [blocks]: position after its last pair

    @property
    def tensors(self) -> list[Tensor]:
        return [self.pair, self.block_expert, self.block_start, self.block_end]


def max_blocks(pairs: int, experts: int, block: int) -> int:
    """Blocks that `pairs` pairs can need at most, however they are routed."""
    return min(pairs, experts) + pairs // block


@triton.jit
def block_range(block, block_expert, block_start, block_end, tokens, ROUTED: tl.constexpr, BM: tl.constexpr):
    """A block's expert (none from E on), first position and position after its last. Not ROUTED: one matrix, and BM
    tokens in a row."""
    if ROUTED:
        return tl.load(block_expert + block), tl.load(block_start + block), tl.load(block_end + block)
    else:
        return 0, block * BM, tl.minimum(block * BM + BM, tokens)


def empty_routing(expert: Tensor, experts: int) -> Routing:
    """Room for any block size; the sizes are plain functions of the shapes, as torch.compile needs them."""
    pairs = expert.numel()
    blocks = experts + pairs // MIN_BLOCK
    sizes = (pairs, blocks, blocks, blocks)
    return Routing(*(torch.empty(size, dtype=torch.int32, device=expert.device) for size in sizes))


@triton.jit
def _bins(expert, first, pairs, E, LENGTH: tl.constexpr):
    """Experts of pairs first..first+LENGTH, E for sentinels and pairs past the end."""
    i = first + tl.arange(0, LENGTH)
    e = tl.load(expert + i, mask=i < pairs, other=E)
    return tl.where((e >= 0) & (e < E), e, E).to(tl.int32)


@triton.jit
def _count(expert, counts, pairs, E, LENGTH: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr):
    """counts[chunk, e]: pairs of expert e in the chunk."""
    follow(PDL)
    chunk = tl.program_id(0)
    e = _bins(expert, chunk * LENGTH, pairs, E, LENGTH)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), tl.histogram(e, BINS))


@triton.jit
def _prefix(counts, chunks, BINS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """counts[chunk, e] -> pairs of expert e in the chunks before; counts[chunks, e]: in all of them."""
    follow(PDL)
    bins = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.int32)
    first = tl.zeros([], tl.int32)
    while first < chunks:
        row = first + tl.arange(0, ROWS)
        at = counts + row[:, None] * BINS + bins[None, :]
        own = tl.load(at, mask=(row < chunks)[:, None], other=0)
        tl.store(at, total[None, :] + tl.cumsum(own, 0) - own, mask=(row < chunks)[:, None])
        total += tl.sum(own, 0)
        first += ROWS
    tl.store(counts + chunks * BINS + bins, total)


@triton.jit
def _place(
    expert,
    counts,
    pair,
    block_expert,
    block_start,
    block_end,
    pairs,
    E,
    blocks,
    chunks,
    LENGTH: tl.constexpr,
    ALL: tl.constexpr,
    BINS: tl.constexpr,
    COUNTED: tl.constexpr,
    SHARE: tl.constexpr,
    BM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each of the first programs places the pairs of a chunk, each of the others lists SHARE blocks. ALL pairs, a power
    of two, are no fewer than there are, unless they have been COUNTED."""
    follow(PDL)
    chunk = tl.program_id(0)
    bins = tl.arange(0, BINS)
    if COUNTED:
        total = tl.load(counts + chunks * BINS + bins)
        before = tl.load(counts + tl.minimum(chunk, chunks) * BINS + bins)
    else:
        each = tl.arange(0, ALL)
        every = _bins(expert, 0, pairs, E, ALL)
        total = tl.histogram(every, BINS)
        before = tl.histogram(every, BINS, mask=each < chunk * LENGTH)
    start = tl.cumsum(total, 0) - total  # [BINS]
    if chunk < chunks:
        first = chunk * LENGTH
        e = _bins(expert, first, pairs, E, LENGTH)
        i = tl.arange(0, LENGTH)
        rank = tl.sum(((e[:, None] == e[None, :]) & (i[:, None] < i[None, :])).to(tl.int32), 0)
        tl.store(pair + tl.gather(start + before, e, 0) + rank, first + i, mask=first + i < pairs)
    else:
        cut = tl.where(bins < E, (total + BM - 1) // BM, 0)
        cut_end = tl.cumsum(cut, 0)
        b = (chunk - chunks) * SHARE + tl.arange(0, SHARE)
        of = tl.sum((cut_end[None, :] <= b[:, None]).to(tl.int32), 1)  # [SHARE], BINS past the last block
        here = (bins[None, :] == of[:, None]).to(tl.int32)
        at = tl.sum(here * (start - (cut_end - cut) * BM)[None, :], 1) + b * BM
        last = tl.sum(here * (start + total)[None, :], 1)
        tl.store(block_expert + b, tl.minimum(of, E), mask=b < blocks)
        tl.store(block_start + b, at, mask=b < blocks)
        tl.store(block_end + b, tl.minimum(at + BM, last), mask=b < blocks)


def route(expert: Tensor, experts: int, block: int, pdl: Launch) -> Routing:
    """expert [pairs], any integer dtype -> the pairs in expert order and their blocks of `block` pairs."""
    P = expert.numel()
    blocks = max_blocks(P, experts, block)
    some, most = CHUNK
    length = max(some, min(most, triton.next_power_of_2(P) // 16))
    chunks, bins = triton.cdiv(P, length), triton.next_power_of_2(experts + 1)
    routing, counted = empty_routing(expert, experts), P > COUNTED
    counts = routing.pair
    if counted:
        counts = torch.empty(chunks + 1, bins, dtype=torch.int32, device=expert.device)
        _count[(chunks,)](expert, counts, P, experts, length, bins, num_warps=4, **pdl.options)
        width = min(bins, 16)
        _prefix[(bins // width,)](counts, chunks, BINS=bins, ROWS=64, WIDTH=width, num_warps=4, **pdl.options)
    _place[(chunks + triton.cdiv(blocks, SHARE),)](
        expert, counts, *routing.tensors, P, experts, blocks, chunks,
        LENGTH=length, ALL=1 if counted else triton.next_power_of_2(P), BINS=bins, COUNTED=counted, SHARE=SHARE,
        BM=block, num_warps=8, **pdl.options,
    )  # fmt: skip
    return routing
