"""Exact weighted k-means in one dimension, for many rows at once.

A codebook of K entries for one weight row is a clustering of S numbers, and in one dimension the best one can be
found: an optimal cluster is an interval of the sorted values, so with D_k[j] the least cost of the first j values in
at most k clusters,

    D_k[j] = min over i < j of D_{k-1}[i] + cost(i, j),   cost(i, j) = sum w x^2 - (sum w x)^2 / sum w  over i..j-1

where prefix sums give cost(i, j) at once. The best i never moves left as j grows (cost is concave Monge), so the j
are searched from coarse to fine between the answers of their neighbours: O(K S log S), no [R, S, K] tensor, no seed,
no local optimum. Lloyd's iteration from k-means++, the usual choice, ends up to 20% above this cost.

Letters: R rows, S values per row, K clusters.
"""

import ctypes

import torch
from torch import Tensor

from codequant.native import library

# Relative to the row's mean weight. Keeps every interval's weight positive, so that values of weight zero join the
# nearest cluster; the cost of the result is within this factor of the optimum.
WEIGHT_FLOOR = 1e-9


def kmeans(values: Tensor, weights: Tensor, clusters: int, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """Cluster each row of values so that sum_s weight[s] * (value[s] - centroid[index[s]])**2 is least.

    values float32 [R, S], finite, and weights float32 [R, S] or [S], finite and >= 0 ->
    (centroids float32 [R, K] ascending, indices uint8 [R, S]). Spare clusters, where K exceeds the number of distinct
    values, repeat a centroid. Zero weights are allowed; a row of zeros is clustered as if all weights were 1.
    `threads` (CPU; default: torch's number) does not change the result.
    """
    R, S = values.shape
    if not 1 <= clusters <= 256:
        raise ValueError(f"clusters: {clusters}, expected 1 to 256 (indices are uint8)")
    if weights.shape not in ((R, S), (S,)):
        raise ValueError(f"weights: shape {tuple(weights.shape)}, expected {(R, S)} or {(S,)}")
    if S == 0:
        raise ValueError(f"values: shape {(R, S)}, expected at least one value per row")
    if not bool(torch.isfinite(values).all()):
        raise ValueError("values: found NaN or infinity, expected finite numbers")
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError("weights: found a negative, NaN or infinite one, expected finite numbers >= 0")
    if R == 0:
        return values.new_empty(0, clusters), values.new_empty(0, S, dtype=torch.uint8)
    if values.is_cuda:
        from codequant.kernels.triton import clustering as triton_clustering

        return triton_clustering.kmeans(values, weights, clusters)
    if library() is None:
        return kmeans_reference(values, weights, clusters)
    return _kmeans_native(values, weights, clusters, threads or torch.get_num_threads())


def kmeans_reference(values: Tensor, weights: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """The readable twin of `kmeans`, on any device."""
    R, S = values.shape
    weight = weights.double().expand(R, S)
    mean_weight = weight.mean(-1, keepdim=True)  # [R, 1]
    floor = torch.where(mean_weight > 0, WEIGHT_FLOOR * mean_weight, 1.0)
    # Costs are differences of sums of squares: centring the row keeps them small.
    mean = (weight * values.double()).sum(-1, keepdim=True) / torch.where(mean_weight > 0, mean_weight * S, 1.0)
    ordered, order = values.sort(dim=-1, stable=True)
    x = ordered.double() - mean
    w = torch.maximum(weight.gather(-1, order), floor)
    w_sum, wx_sum, wxx_sum = (torch.nn.functional.pad(t.cumsum(-1), (1, 0)) for t in (w, w * x, w * x * x))  # [R, S+1]

    cost = torch.zeros_like(w_sum)  # D_1 [R, S+1]
    cost[:, 1:] = wxx_sum[:, 1:] - wx_sum[:, 1:] ** 2 / w_sum[:, 1:]
    starts = [torch.zeros_like(cost, dtype=torch.long)]  # per k [R, S+1]: where the last of k clusters starts
    for _ in range(1, clusters):
        cost, start = _add_cluster(cost, w_sum, wx_sum, wxx_sum)
        starts.append(start)

    centroids = torch.empty(R, clusters, dtype=torch.float64, device=values.device)
    rank = torch.empty(R, S, dtype=torch.uint8, device=values.device)  # cluster of the s-th smallest value
    position = torch.arange(S, device=values.device)
    end = torch.full((R, 1), S, device=values.device)
    for k in reversed(range(clusters)):
        start = starts[k].gather(-1, end)
        w_k, wx_k = (t.gather(-1, end) - t.gather(-1, start) for t in (w_sum, wx_sum))
        empty = start == end  # fewer distinct values than clusters
        centroid = torch.where(empty, torch.inf, mean + wx_k / torch.where(empty, 1.0, w_k))
        # Spare clusters repeat the one above; so do equal values in two clusters, whose means differ by rounding.
        above = centroids[:, k + 1, None] if k + 1 < clusters else torch.inf
        centroids[:, k, None] = centroid.clamp(max=above)
        rank = torch.where((position >= start) & (position < end), k, rank)
        end = start
    indices = torch.empty_like(rank).scatter_(-1, order, rank)
    return centroids.float(), indices


def _add_cluster(cost: Tensor, w_sum: Tensor, wx_sum: Tensor, wxx_sum: Tensor) -> tuple[Tensor, Tensor]:
    """D_k [R, S+1] and the start of the last cluster, int64 [R, S+1], from D_{k-1}."""
    R, S = cost.shape[0], cost.shape[1] - 1
    device = cost.device
    best = torch.zeros_like(cost)
    start = torch.zeros_like(cost, dtype=torch.long)
    stride = 2 ** (S.bit_length() - 1)
    while stride:
        j = torch.arange(stride, S + 1, 2 * stride, device=device)  # [J]
        first = start[:, j - stride]  # [R, J]
        last = torch.where(j + stride <= S, start[:, (j + stride).clamp(max=S)], S).minimum(j - 1)
        # All candidates of all (row, j) in one ragged list: R * (S + J) of them at every stride.
        count = (last - first + 1).flatten()
        task = torch.repeat_interleave(torch.arange(len(count), device=device), count)
        row, end = task // len(j), j.repeat(R)[task]
        offset = torch.arange(len(task), device=device) - (count.cumsum(0) - count)[task]
        i = first.flatten()[task] + offset
        dw, dwx, dwxx = (t[row, end] - t[row, i] for t in (w_sum, wx_sum, wxx_sum))
        candidate = cost[row, i] + dwxx - dwx**2 / dw
        least = candidate.new_full((len(count),), torch.inf).scatter_reduce_(0, task, candidate, "amin")
        tied = candidate == least[task]
        leftmost = i.new_full((len(count),), S).scatter_reduce_(0, task[tied], i[tied], "amin")
        best[:, j], start[:, j] = least.view(R, -1), leftmost.view(R, -1)
        stride //= 2
    return best, start


def _kmeans_native(values: Tensor, weights: Tensor, clusters: int, threads: int) -> tuple[Tensor, Tensor]:
    R, S = values.shape
    values, weights = values.float().contiguous(), weights.float().contiguous()
    centroids = values.new_empty(R, clusters)
    indices = values.new_empty(R, S, dtype=torch.uint8)
    native = library()
    assert native is not None
    native.codequant_kmeans(
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_void_p(weights.data_ptr()),
        ctypes.c_int64(S if weights.dim() == 2 else 0),
        ctypes.c_int64(R),
        ctypes.c_int64(S),
        ctypes.c_int(clusters),
        ctypes.c_int(threads),
        ctypes.c_void_p(centroids.data_ptr()),
        ctypes.c_void_p(indices.data_ptr()),
    )
    return centroids, indices
