"""The yardstick: a bfloat16 MoE feed-forward in Triton, with the fusions, routing and launches of the codebook one.

Two kernels, as there: one for a few tokens that streams weights, one for expert-sorted blocks on tensor cores.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from codequant.kernels.triton.combine import combine
from codequant.kernels.triton.launch import Launch, follow
from codequant.kernels.triton.routing import Routing, max_blocks, route


@triton.jit
def _decode(
    x,
    expert,
    pair_weight,
    w,
    out,
    N,
    TOP_K: tl.constexpr,
    I: tl.constexpr,
    REDUCE: tl.constexpr,
    GATED: tl.constexpr,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    if not REDUCE:
        follow(PDL)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    q = tl.program_id(1)
    slot = tl.arange(0, SLOTS)
    live = slot < (TOP_K if REDUCE else 1)
    pair = (q * TOP_K if REDUCE else q) + slot
    x_row = pair if REDUCE else pair // TOP_K
    e = tl.load(expert + pair, mask=live, other=0).to(tl.int64)
    row = e[:, None] * (2 * N if GATED else N) + n[None, :]
    k = tl.arange(0, BK)
    at = w + row[:, :, None] * I + k[None, None, :]
    x_at = x + x_row.to(tl.int64)[:, None] * I + k[None, :]
    gate = tl.zeros([SLOTS, BN, BK], tl.float32)
    up = tl.zeros([SLOTS, BN, BK], tl.float32)
    for start in tl.static_range(0, I, BK):
        mask = live[:, None] & (start + k < I)[None, :]
        a = tl.load(at + start, mask=mask[:, None, :], other=0.0)
        if GATED:
            b = tl.load(at + N * I + start, mask=mask[:, None, :], other=0.0)
        if REDUCE and start == 0:
            follow(PDL)
        v = tl.load(x_at + start, mask=mask, other=0.0).to(tl.float32)[:, None, :]
        gate += a.to(tl.float32) * v
        if GATED:
            up += b.to(tl.float32) * v
    y = tl.sum(gate, 2)
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * tl.sum(up, 2)
    if REDUCE:
        y = y * tl.load(pair_weight + pair, mask=live, other=0.0).to(tl.float32)[:, None]
    y = tl.sum(tl.where(live[:, None], y, 0.0), 0)
    tl.store(out + q.to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _block(
    x, pair_weight, w, out, pair, e, start, end, pid_n, N,
    I: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr, SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    position = start + tl.arange(0, BM)
    ok = position < end
    p = tl.load(pair + position, mask=ok, other=0)
    x_row = p // TOP_K if GATED else position
    n = pid_n * BN + tl.arange(0, BN)
    row = e.to(tl.int64) * (2 * N if GATED else N) + tl.minimum(n, N - 1)
    k = tl.arange(0, BK)
    x_at = x + x_row.to(tl.int64)[:, None] * I + k[None, :]
    w_at = w + row[:, None] * I + k[None, :]
    if SWAP:
        gate = tl.zeros([BN, BM], tl.float32)
        up = tl.zeros([BN, BM], tl.float32)
    else:
        gate = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, I, BK, num_stages=STAGES):  # every I here is a multiple of BK
        v = tl.load(x_at + start, mask=ok[:, None], other=0.0)
        a = tl.load(w_at + start)
        if SWAP:
            gate = tl.dot(a, tl.trans(v), gate)
        else:
            gate = tl.dot(v, tl.trans(a), gate)
        if GATED:
            b = tl.load(w_at + N * I + start)
            if SWAP:
                up = tl.dot(b, tl.trans(v), up)
            else:
                up = tl.dot(v, tl.trans(b), up)
    if GATED:
        gate = gate / (1.0 + tl.exp(-gate)) * up
    if SWAP:
        gate = tl.trans(gate)
    y_row = position
    if not GATED:
        y_row = p
        gate = gate * tl.load(pair_weight + p, mask=ok, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out + y_row.to(tl.int64)[:, None] * N + n[None, :],
        gate.to(out.dtype.element_ty),
        mask=ok[:, None] & (n < N)[None, :],
    )


@triton.jit
def _grouped(
    x, pair_weight, w, out, pair, block_expert, block_start, block_end, N, E,
    I: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr, SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, ROWS_FIRST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GATED: x rows are tokens, out rows in expert order. Else x rows in expert order, out rows are pairs, weighted."""
    follow(PDL)
    pid_n = tl.program_id(0 if ROWS_FIRST else 1)
    block = tl.program_id(1 if ROWS_FIRST else 0)
    e = tl.load(block_expert + block)
    start = tl.load(block_start + block)
    stop = tl.load(block_end + block)
    if e >= E:
        return
    HALF: tl.constexpr = BM // 2 if SWAP or BM > 64 else BM  # as the codebook kernel does it
    if stop - start <= HALF:
        _block(x, pair_weight, w, out, pair, e, start, stop, pid_n, N, I, TOP_K, GATED, SWAP, HALF, BN, BK, STAGES)
    else:
        _block(x, pair_weight, w, out, pair, e, start, stop, pid_n, N, I, TOP_K, GATED, SWAP, BM, BN, BK, STAGES)


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    warps: int
    stages: int
    swap: bool = True


@dataclass(frozen=True)
class Config:
    tokens: int  # 0: the streaming kernel
    up: Tile
    down: Tile
    rows_first: bool = True


def candidates(tokens: int, pairs: int, experts: int) -> list[Config]:
    """Configurations worth timing for a batch; the best one counts."""
    found = []
    if tokens <= 2:
        found += [
            Config(0, Tile(r, c, w, 1), Tile(max(1, r // 4), c, w, 1))
            for r, c, w in ((4, 512, 4), (8, 256, 4), (2, 1024, 4), (8, 512, 8))
        ]
    average = pairs / experts
    if average <= 64:
        for block in (16, 32) if average <= 16 else (32, 64):
            for tile in (Tile(64, 64, 4, 4), Tile(64, 128, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 4, 4)):
                found.append(Config(block, tile, tile))
    if average >= 32:
        for block in (64, 128):
            for tile in (
                Tile(64, 64, 4, 4, False),
                Tile(128, 64, 8, 3, False),
                Tile(128, 64, 8, 4, False),
                Tile(64, 64, 4, 4),
            ):
                found += (
                    [Config(block, tile, tile, False), Config(block, tile, tile, True)]
                    if experts <= 8
                    else [Config(block, tile, tile)]
                )
    return found


def experts(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, config: Config, pdl: Launch
) -> Tensor:
    """x [T, I] bf16, index and weights [T, k], gate_up [E, 2M, I], down [E, O, M] -> [T, O]; SiLU-gated."""
    T, k = index.shape
    E, O, M = down.shape
    hidden = torch.empty(T * k, M, dtype=x.dtype, device=x.device)
    if config.tokens == 0:
        out = torch.empty(T, O, dtype=x.dtype, device=x.device)
        for source, w, target, tile, reduce in (
            (x, gate_up, hidden, config.up, False),
            (hidden, down, out, config.down, True),
        ):
            N, width = target.shape[1], source.shape[1]
            _decode[(triton.cdiv(N, tile.rows), len(target))](
                source, index, weights, w, target, N, k, width, reduce, not reduce,
                triton.next_power_of_2(k) if reduce else 1, tile.rows,
                tile.columns, num_warps=tile.warps, **pdl.options,
            )  # fmt: skip
        return out
    routing: Routing = route(index, E, config.tokens, pdl)
    y = torch.empty(T * k, O, dtype=x.dtype, device=x.device)
    blocks = max_blocks(T * k, E, config.tokens)
    for source, w, target, tile, gated in (
        (x, gate_up, hidden, config.up, True),
        (hidden, down, y, config.down, False),
    ):
        N = target.shape[1]
        columns = triton.cdiv(N, tile.rows)
        _grouped[(columns, blocks) if config.rows_first else (blocks, columns)](
            source, weights, w, target, *routing.tensors, N, E, source.shape[1], k, gated, tile.swap,
            config.tokens, tile.rows, tile.columns, tile.stages, config.rows_first,
            num_warps=tile.warps, **pdl.options,
        )  # fmt: skip
    return combine(y, index, E, k, x.dtype, pdl)
