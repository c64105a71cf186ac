"""Sweeps over the columns of weight matrices on the GPU: `codequant.error_feedback.sweep_reference`, row by row.

A block of columns sees all others through one matrix product; inside the block each column tells the later ones. A
program keeps the block's gradients of some rows in registers and walks the columns, so that a sweep is two launches per
block and not ten per column. Everything is transposed, columns first: neighbouring threads hold neighbouring rows, and
what a row looks up or sums over its columns stays in its thread.

Letters as in `codequant.error_feedback`: B matrices, O rows, I columns, G column groups of K entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # columns of a block: registers for each row's gradients
ROWS = 32  # of a program: one per thread of a warp


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
