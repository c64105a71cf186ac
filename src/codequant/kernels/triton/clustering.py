"""Exact weighted 1-D k-means on the GPU: the function of `codequant.clustering.kmeans`, for millions of rows.

On a sorted row the optimal clusters are intervals, and with prefix sums W, S of weight and weight * value an interval
[i, m) lowers the row's second moment by its *gain* (S[m] - S[i])**2 / (W[m] - W[i]). Dynamic programming over "the best
total gain of the first m values in j clusters" (Wang & Song, The R Journal 2011) is exact. Three facts make it cheap:

- The best start of the last cluster moves right with m and with j, which bounds the candidates from both sides. Blocks
  of m share the bounds, so that their candidates are one dense tile.
- The best K clusters are K/2 clusters of a prefix and K/2 of the rest: a row is two problems of K/2 levels, the second
  one mirrored, and each only concerns prefixes that *can* be part of the answer.
- Which can: those whose cost alone does not exceed the cost of any solution of the whole row. The same program on every
  eighth boundary gives such a solution at 1/64 of the cost, usually within 0.1% of the best.

Prefix sums are taken in float64 of values normalized to zero mean and peak 1 and weights of sum 1, and are rounded to
float32. The gains' rounding, about 1e-7 of the row's variance, is the only error: with 16 clusters the loss is some
1/150 of the variance or less, hence "exact" to about 1e-5 of the loss.

Activation outliers make some weights millions of times larger than the rest, which float32 would lose beside them. The
intervals are therefore chosen with weights of at most HEAVIEST times the row's median: a cluster's cost is
w v / (w + v) * distance**2 for a heavy w beside others v, and hardly depends on w. The centroids are means under the
weights as they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from codequant.kernels.triton.ptx import reciprocal

COARSE = 8  # boundaries that the first, bounding pass looks at
HEAVIEST = 1e4
# Rounding of costs that are compared with the bound: a share of the second moment, and of 1, the peak's square.
_SLACK, _ROUNDING = tl.constexpr(2e-6), tl.constexpr(4e-7)
_CHUNK = 2**24  # values at a time: bounds the scratch memory at 2 GB


@triton.jit
def _prefix_sums(
    values,
    order,
    weights,
    row_weights,
    heaviest,
    weight_sum,
    moment,
    energy,
    true_weight_sum,
    true_moment,
    center,
    peak,
    R,
    S,
    N,
    BLOCK: tl.constexpr,
):
    """values [R, S] ascending, order int64 [R, S], weights of values[order] -> prefix sums [2, R, N + 1].

    The second half of the results are the mirrored row's: negated and in reverse. S..N are values of no weight.
    heaviest float32 [R] bounds the weights, but for true_weight_sum and true_moment, float64 [R, N + 1].
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < S
    x = tl.load(values + row * S + c, mask=inside, other=0.0).to(tl.float64)
    index = tl.load(order + row * S + c, mask=inside, other=0)
    w = tl.load(weights + row * row_weights + index, mask=inside, other=0.0).to(tl.float64)
    total = tl.sum(w, 0)
    w = tl.where(total > 0, w, tl.where(inside, 1.0, 0.0))  # a row without any weight: all values alike
    true = w
    w = tl.minimum(w, tl.load(heaviest + row).to(tl.float64))
    w = w / tl.sum(w, 0)
    mean = tl.sum(w * x, 0)
    x = tl.where(inside, x - mean, 0.0)
    largest = tl.max(tl.abs(x), 0)
    x = x / tl.where(largest > 0, largest, 1.0)
    tl.store(center + row, mean)
    tl.store(peak + row, largest)
    w_sum = tl.cumsum(w, 0)
    wx_sum = tl.cumsum(w * x, 0)
    wxx_sum = tl.cumsum(w * x * x, 0)
    forward = row * (N + 1) + 1 + c
    stored = c < N
    tl.store(weight_sum + forward, w_sum.to(tl.float32), mask=stored)
    tl.store(moment + forward, wx_sum.to(tl.float32), mask=stored)
    tl.store(energy + forward, wxx_sum.to(tl.float32), mask=stored)
    tl.store(true_weight_sum + forward, tl.cumsum(true, 0), mask=stored)
    tl.store(true_moment + forward, tl.cumsum(true * x, 0), mask=stored)
    # Mirrored prefix N - 1 - c holds what lies right of value c.
    mirrored = (R + row) * (N + 1) + N - 1 - c
    tl.store(weight_sum + mirrored, (1.0 - w_sum).to(tl.float32), mask=stored)
    tl.store(moment + mirrored, (wx_sum - tl.sum(w * x, 0)).to(tl.float32), mask=stored)
    tl.store(energy + mirrored, (tl.sum(w * x * x, 0) - wxx_sum).to(tl.float32), mask=stored)
    tl.store(weight_sum + row * (N + 1), 0.0)
    tl.store(moment + row * (N + 1), 0.0)
    tl.store(energy + row * (N + 1), 0.0)
    tl.store(true_weight_sum + row * (N + 1), 0.0)
    tl.store(true_moment + row * (N + 1), 0.0)
    last = (R + row) * (N + 1) + N
    tl.store(weight_sum + last, 1.0)
    tl.store(moment + last, 0.0)
    tl.store(energy + last, tl.sum(w * x * x, 0).to(tl.float32))


@triton.jit
def _gain(w_m, s_m, w_i, s_i):
    """Gain of the cluster [i, m); 0 where it has next to no weight of the row's 1."""
    w, s = w_m - w_i, s_m - s_i
    return tl.where(w > 1e-30, s * s * reciprocal(w), 0.0)


@triton.jit
def _split(
    weight_sum,
    moment,
    energy,
    bound,
    gain,
    start,
    reach,
    N,
    R,
    LEVELS: tl.constexpr,
    STRIDE: tl.constexpr,
    BOUNDED: tl.constexpr,
    BM: tl.constexpr,
    BI: tl.constexpr,
):
    """The dynamic programme of one half row, on every STRIDE-th boundary.

    gain float32 [2R, 2, N + 1]: best gain of m values in j clusters, level j in buffer j % 2. start int32
    [2R, LEVELS, N + 1]: where the last cluster begins. reach int32 [2R]: the last m that the final level covers.
    bound float32 [R]: the gain of a known solution of the whole row.
    """
    row = tl.program_id(0).to(tl.int64)
    w_row = weight_sum + row * (N + 1)
    s_row = moment + row * (N + 1)
    q_row = energy + row * (N + 1)
    gain += row * 2 * (N + 1)
    start += row * LEVELS * (N + 1)
    n = N // STRIDE
    blocks = (n + BM) // BM
    second_moment = tl.load(q_row + N)
    limit = second_moment * (1.0 + _SLACK) + _ROUNDING
    if BOUNDED:
        limit -= tl.load(bound + row % R)
    a = tl.arange(0, BM)
    bi = tl.arange(0, BI)

    last = 0  # the last m within the limit, of the level before
    block = 0
    while block < blocks:
        m = block * BM + a
        inside = m <= n
        w = tl.load(w_row + m * STRIDE, mask=inside, other=0.0)
        s = tl.load(s_row + m * STRIDE, mask=inside, other=0.0)
        q = tl.load(q_row + m * STRIDE, mask=inside, other=0.0)
        g = _gain(w, s, 0.0, 0.0)
        tl.store(gain + m, g, mask=inside)
        tl.store(start + m, tl.zeros([BM], tl.int32), mask=inside)
        within = inside & (q - g <= limit)
        last = tl.maximum(last, tl.max(tl.where(within, m, 0), 0))
        block += 1
        if tl.sum(within.to(tl.int32), 0) == 0:
            block = blocks
    tl.debug_barrier()

    for level in tl.static_range(1, LEVELS):
        before = gain + ((level - 1) % 2) * (N + 1)
        now = gain + (level % 2) * (N + 1)
        start_before = start + (level - 1) * (N + 1)
        start_now = start + level * (N + 1)

        top = blocks - 1  # the last block of which the first m is within the limit
        if BOUNDED:
            low = 0
            high = blocks
            while high - low > 1:
                middle = (low + high) // 2
                m1 = middle * BM
                w1 = tl.load(w_row + m1 * STRIDE)
                s1 = tl.load(s_row + m1 * STRIDE)
                candidate = tl.load(start_before + tl.minimum(m1, last))
                end = tl.minimum(m1, last)
                best1 = tl.full([BM], 0.0, tl.float32)
                while candidate <= end:
                    i1 = candidate + a
                    ok = i1 <= end
                    g1 = _gain(
                        w1,
                        s1,
                        tl.load(w_row + i1 * STRIDE, mask=ok, other=0.0),
                        tl.load(s_row + i1 * STRIDE, mask=ok, other=0.0),
                    )
                    g1 += tl.load(before + i1, mask=ok, other=0.0)
                    best1 = tl.maximum(best1, tl.where(ok, g1, 0.0))
                    candidate += BM
                if tl.load(q_row + m1 * STRIDE) - tl.max(best1, 0) <= limit:
                    low = middle
                else:
                    high = middle
            top = low

        reached = 0
        ceiling = last
        block = top
        while block >= 0:
            m = block * BM + a
            inside = m <= n
            w = tl.load(w_row + m * STRIDE, mask=inside, other=0.0)[None, :]
            s = tl.load(s_row + m * STRIDE, mask=inside, other=0.0)[None, :]
            i0 = tl.load(start_before + tl.minimum(block * BM, last))
            ceiling = tl.minimum(ceiling, block * BM + BM - 1)
            best = tl.full([BI, BM], -1.0, tl.float32)
            at = tl.zeros([BI, BM], tl.int32)
            while i0 <= ceiling:
                i = i0 + bi
                ok = i <= ceiling
                g = _gain(
                    w,
                    s,
                    tl.load(w_row + i * STRIDE, mask=ok, other=0.0)[:, None],
                    tl.load(s_row + i * STRIDE, mask=ok, other=0.0)[:, None],
                )
                g += tl.load(before + i, mask=ok, other=-2.0)[:, None]
                better = (g > best) & (i[:, None] <= m[None, :])
                best = tl.where(better, g, best)
                at = tl.where(better, i0, at)
                i0 += BI
            found = tl.max(best, 0)  # [BM]
            first = tl.min(tl.where(best == found[None, :], at + bi[:, None], N + 1), 0)
            tl.store(now + m, found, mask=inside)
            tl.store(start_now + m, first, mask=inside)
            q = tl.load(q_row + m * STRIDE, mask=inside, other=0.0)
            reached = tl.maximum(reached, tl.max(tl.where(inside & (q - found <= limit), m, 0), 0))
            ceiling = tl.minimum(ceiling, tl.sum(tl.where(a == 0, first, 0), 0))
            block -= 1
        last = reached
        tl.debug_barrier()
    tl.store(reach + row, last)


@triton.jit
def _join(
    gain,
    start,
    reach,
    bound,
    boundary,
    N,
    R,
    LEVELS: tl.constexpr,
    STRIDE: tl.constexpr,
    TRACE: tl.constexpr,
    BM: tl.constexpr,
):
    """The best place where the two halves of a row meet: its gain and, with TRACE, boundary int32 [R, 2 LEVELS + 1]."""
    row = tl.program_id(0).to(tl.int64)
    n = N // STRIDE
    left = gain + (row * 2 + (LEVELS - 1) % 2) * (N + 1)
    right = gain + ((R + row) * 2 + (LEVELS - 1) % 2) * (N + 1)
    first = tl.maximum(n - tl.load(reach + R + row), 0)
    last = tl.load(reach + row)
    best = tl.full([BM], -1.0, tl.float32)
    at = tl.zeros([BM], tl.int32)
    m = first + tl.arange(0, BM)
    while first <= last:
        ok = m <= last
        g = tl.load(left + m, mask=ok, other=-2.0) + tl.load(right + n - m, mask=ok, other=-2.0)
        at = tl.where(g > best, m, at)
        best = tl.maximum(best, g)
        m += BM
        first += BM
    top = tl.max(best, 0)
    tl.store(bound + row, top)
    if TRACE:
        middle = tl.minimum(tl.min(tl.where(best == top, at, N + 1), 0), n)
        boundary += row * (2 * LEVELS + 1)
        tl.store(boundary + LEVELS, middle * STRIDE)
        p = middle
        q = n - middle
        for level in tl.static_range(LEVELS - 1, -1, -1):
            p = tl.load(start + (row * LEVELS + level) * (N + 1) + p)
            q = tl.load(start + ((R + row) * LEVELS + level) * (N + 1) + q)
            p = tl.minimum(tl.maximum(p, 0), n)  # NaN among the values must not lead outside of the row
            q = tl.minimum(tl.maximum(q, 0), n)
            tl.store(boundary + level, p * STRIDE)
            tl.store(boundary + 2 * LEVELS - level, (n - q) * STRIDE)


@triton.jit
def _assign(values, centroids, indices, S, K: tl.constexpr, BLOCK: tl.constexpr):
    """Index of the nearest centroid; of the lower one in the middle."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + row * S + c, mask=c < S, other=0.0)
    index = tl.zeros([BLOCK], tl.int32)
    for k in tl.static_range(K - 1):
        middle = 0.5 * (tl.load(centroids + row * K + k) + tl.load(centroids + row * K + k + 1))
        index += (x > middle).to(tl.int32)
    tl.store(indices + row * S + c, index.to(tl.uint8), mask=c < S)


def kmeans(values: Tensor, weights: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """The K centroids of each row that minimize sum_i weights[i] * (values[i] - nearest centroid)**2.

    values float32 [R, S], weights float32 [R, S] or [S], not negative, K even -> (centroids float32 [R, K] ascending,
    indices uint8 [R, S]). A row with fewer than K distinct values repeats centroids; a row without weight is clustered
    as if all weights were equal.
    """
    if K % 2:
        raise ValueError(f"K: {K}, expected an even number of clusters")
    R, S = values.shape
    step = max(1, _CHUNK // S)
    parts = [
        _kmeans(values[r : r + step].contiguous(), weights if weights.dim() == 1 else weights[r : r + step], K)
        for r in range(0, R, step)
    ]
    if len(parts) == 1:
        return parts[0]
    centroids, indices = zip(*parts, strict=True)
    return torch.cat(centroids), torch.cat(indices)


def _kmeans(values: Tensor, weights: Tensor, K: int) -> tuple[Tensor, Tensor]:
    R, S = values.shape
    N = triton.cdiv(S, COARSE) * COARSE
    device, L = values.device, K // 2
    ordered, order = values.sort(dim=1)
    weight_sum, moment, energy = (torch.empty(2, R, N + 1, device=device) for _ in range(3))
    true_weight_sum, true_moment = torch.empty(2, R, N + 1, dtype=torch.float64, device=device)
    center, peak = torch.empty(2, R, dtype=torch.float64, device=device)
    weights = weights.contiguous()
    median = weights.where(weights > 0, torch.nan).nanmedian(dim=-1).values
    heaviest = (HEAVIEST * median).nan_to_num(1.0).expand(R).contiguous()
    BLOCK = triton.next_power_of_2(N)
    _prefix_sums[(R,)](
        ordered, order, weights, 0 if weights.dim() == 1 else S, heaviest, weight_sum, moment, energy,
        true_weight_sum, true_moment, center, peak, R, S, N, BLOCK, num_warps=max(1, min(8, BLOCK // 512)),
    )  # fmt: skip
    gain = torch.empty(2, R, 2, N + 1, device=device)
    start = torch.empty(2, R, L, N + 1, dtype=torch.int32, device=device)
    reach = torch.empty(2, R, dtype=torch.int32, device=device)
    bound = torch.empty(R, device=device)
    boundary = torch.empty(R, K + 1, dtype=torch.int32, device=device)
    for stride in (COARSE, 1):
        BM, BI = (32, 8) if stride == COARSE else (64, 8)
        _split[(2 * R,)](
            weight_sum, moment, energy, bound, gain, start, reach, N, R,
            LEVELS=L, STRIDE=stride, BOUNDED=stride == 1, BM=BM, BI=BI, num_warps=1,
        )  # fmt: skip
        _join[(R,)](
            gain, start, reach, bound, boundary, N, R, LEVELS=L, STRIDE=stride, TRACE=stride == 1, BM=128, num_warps=1
        )
    at = boundary.long()
    w = true_weight_sum.gather(1, at).diff(dim=1)
    s = true_moment.gather(1, at).diff(dim=1)
    mean = torch.where(w > 0, s / w, -torch.inf)
    # A cluster without weight takes the centroid before it, or after it at the start of the row.
    mean = mean.cummax(dim=1).values
    mean = torch.where(mean == -torch.inf, torch.inf, mean).flip(1).cummin(dim=1).values.flip(1)
    centroids = (center[:, None] + peak[:, None] * mean).float()
    indices = torch.empty(R, S, dtype=torch.uint8, device=device)
    _assign[(R, triton.cdiv(S, 1024))](values, centroids, indices, S, K, 1024, num_warps=4)
    return centroids, indices
