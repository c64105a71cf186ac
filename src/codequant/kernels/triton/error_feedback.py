"""The costly parts of `codequant.error_feedback` on the GPU: sweeps over columns and the codebooks' normal equations.

**Sweep.** A block of columns sees all others through one matrix product; inside the block each column tells the later
ones. A program keeps the block's gradients of some rows in registers and walks the columns, so that a sweep is two
launches per block and not ten per column. Everything is transposed, columns first: neighbouring threads hold
neighbouring rows, and what a row looks up or sums over its columns stays in its thread.

**Normal equations.** Summing the Hessian's rows by index is a product with a matrix of zeros and ones, made on the fly,
on tensor cores: the Hessian goes in as two float16 planes, 22 bits of each number. That is enough because the normal
matrix only sets the length of a step; where the step is zero is decided by the slope, which is summed in float32.

Letters as in `codequant.error_feedback`: B matrices, O rows, I columns, G column groups of S columns and K entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # columns at a time: what fits in registers
ROWS = 32  # of a program: one per thread of a warp
LINES = 256  # (row, entry) pairs of a program of the normal equations


@triton.jit
def _assign_block(
    target,
    error,
    gradient,
    matrix,
    codebook,
    groups,
    indices,
    O,
    I,
    G,
    first,
    width,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The columns first .. first + width - 1 in turn, for ROWS rows of one matrix.

    target, error float32 and indices uint8 [B, I, O], the latter two written; gradient [B, width, O]: error times the
    block's columns of matrix [B, I, I]; codebook [B, G, K, O]; groups int32 [B, I].
    """
    b = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = o < O
    column = tl.arange(0, BLOCK)
    slope = tl.load(
        gradient + (b * width + column[:, None]) * O + o[None, :],
        mask=(column < width)[:, None] & inside[None, :],
        other=0.0,
    )  # [BLOCK, ROWS]
    c = 0
    while c < width:
        at = (b * I + first + c) * O + o
        row = matrix + (b * I + first + c) * I + first
        entry = codebook + (b * G + tl.load(groups + b * I + first + c)) * K * O + o
        value = tl.load(target + at, mask=inside, other=0.0)
        before = tl.load(error + at, mask=inside, other=0.0)
        own = tl.sum(tl.where((column == c)[:, None], slope, 0.0), 0)
        wanted = value + before - own / tl.load(row + c)
        best = tl.load(entry, mask=inside, other=0.0)
        distance = tl.abs(best - wanted)
        nearest = tl.zeros([ROWS], tl.int32)
        for k in tl.static_range(1, K):
            candidate = tl.load(entry + k * O, mask=inside, other=0.0)
            d = tl.abs(candidate - wanted)
            closer = d < distance
            best = tl.where(closer, candidate, best)
            distance = tl.where(closer, d, distance)
            nearest = tl.where(closer, k, nearest)
        after = best - value
        later = tl.load(row + column, mask=(column > c) & (column < width), other=0.0)
        slope += later[:, None] * (after - before)[None, :]
        tl.store(error + at, after, mask=inside)
        tl.store(indices + at, nearest.to(tl.uint8), mask=inside)
        c += 1


def sweep(
    target: Tensor, matrix: Tensor, codebook: Tensor, groups: Tensor, error: Tensor | None, sweeps: int
) -> Tensor:
    """Indices uint8 [B, O, I] after `sweeps` >= 1 rounds over the columns.

    target [B, O, I], matrix [B, I, I] and codebook [B, O, G, K] float32, groups integers [B, I]. error [B, O, I] is
    that of the indices at hand; None: nothing is chosen yet, and matrix is upper triangular.
    """
    B, O, I = target.shape
    G, K = codebook.shape[-2:]
    from_scratch = error is None
    target = target.mT.contiguous()
    error = torch.zeros_like(target) if error is None else error.mT.clone(memory_format=torch.contiguous_format)
    codebook = codebook.permute(0, 2, 3, 1).contiguous()
    matrix, groups = matrix.contiguous(), groups.to(torch.int32).contiguous()
    indices = torch.empty(B, I, O, dtype=torch.uint8, device=target.device)
    for _ in range(sweeps):
        for first in range(0, I, BLOCK):
            last = min(first + BLOCK, I)
            seen = first if from_scratch else I
            gradient = matrix[:, :seen, first:last].mT @ error[:, :seen]  # [B, width, O]
            _assign_block[(triton.cdiv(O, ROWS), B)](
                target, error, gradient, matrix, codebook, groups, indices, O, I, G, first, last - first,
                K, BLOCK, ROWS, num_warps=1,
            )  # fmt: skip
    return indices.mT.contiguous()


@triton.jit
def _normal_equations(
    planes,
    gradient,
    indices,
    normal,
    slope,
    B,
    O,
    S: tl.constexpr,
    K: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """normal [B, O, K, K] = M L M^T and slope [B, O, K] = M gradient of LINES / K rows of one matrix, float32.

    planes float16 [2, B, S, S]: their sum is the lower triangle L; gradient float32 and indices uint8 [B, O, S].
    """
    b = tl.program_id(1).to(tl.int64)
    line = tl.arange(0, LINES)
    entry = line % K
    o = tl.program_id(0) * (LINES // K) + line // K
    inside = (o < O)[:, None]
    row = (b * O + o)[:, None] * S
    k = tl.arange(0, K)
    sums = tl.zeros([LINES, K], tl.float32)
    own = tl.zeros([LINES], tl.float32)
    for c0 in tl.range(0, S, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        total = tl.zeros([LINES, BLOCK], tl.float32)  # the sum of L's rows by entry
        for j0 in tl.range(c0, S, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            index = tl.load(indices + row + j[None, :], mask=inside & (j < S)[None, :], other=K)
            member = (index == entry[:, None]).to(tl.float16)
            high = planes + (b * S + j[:, None]) * S + c[None, :]
            ok = (j < S)[:, None] & (c < S)[None, :]
            total = tl.dot(member, tl.load(high, mask=ok, other=0.0), total)
            total = tl.dot(member, tl.load(high + B * S * S, mask=ok, other=0.0), total)
        ok = inside & (c < S)[None, :]
        index = tl.load(indices + row + c[None, :], mask=ok, other=K)
        for e in tl.static_range(K):
            by_entry = tl.sum(tl.where(index == e, total, 0.0), 1)
            sums += tl.where(k == e, 1.0, 0.0)[None, :] * by_entry[:, None]
        own += tl.sum(tl.load(gradient + row + c[None, :], mask=ok & (index == entry[:, None]), other=0.0), 1)
    line_at = (b * O + o) * K + entry
    tl.store(normal + line_at[:, None] * K + k[None, :], sums, mask=inside)
    tl.store(slope + line_at, own, mask=o < O)


def normal_equations(hessian: Tensor, gradient: Tensor, indices: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """As `codequant.error_feedback.normal_equations`, for a symmetric Hessian: half of it is enough."""
    B, O, S = gradient.shape
    half = hessian.tril()
    half.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    shift = 15 - half.abs().amax((-2, -1), keepdim=True).frexp().exponent.clamp(min=-100)  # to float16's upper end
    half = half.ldexp(shift)
    high = half.half()
    planes = torch.stack((high, (half - high).half()))
    normal = torch.empty(B, O, entries, entries, device=gradient.device)
    slope = torch.empty(B, O, entries, device=gradient.device)
    _normal_equations[(triton.cdiv(O, LINES // entries), B)](
        planes, gradient.contiguous(), indices.contiguous(), normal, slope, B, O, S,
        entries, LINES, min(BLOCK, max(16, triton.next_power_of_2(S))), num_warps=8, num_stages=3,
    )  # fmt: skip
    normal = normal.double().ldexp(-shift.unsqueeze(-1))
    return normal + normal.mT, slope.double()
