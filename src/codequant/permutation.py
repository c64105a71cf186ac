"""Permuting channel pairs so that the column groups of the consuming matrix cluster better.

Between gate/up and down, and between v and o (within a head), channels may be put in any order: rows of the producer
and columns of the consumer move together and the function stays the same. Whole-row codebooks do not notice; with a
codebook per group of columns it decides which columns share K entries.

Which order is good is not what one would guess. Sorting columns by energy or importance, so that like sits with like,
*raises* the weighted clustering error (down of the demo model, 4 bits, groups of 32: +40%): a group of important
columns must spread its K entries over all of them, while beside unimportant ones they get the entries to themselves. So
important columns are dealt out evenly, and where importance is alike, columns of like magnitude go together. The gain
is small. On the demo model the mean clustering error falls by 1.1% (down) and 1.0% (o) at 4 bits with groups of 32, by
1.2% and 0.7% at 2 bits, in single matrices by up to 14%; after the Hessian method 0.8%, 0.0%, 1.0% and 0.5% of it are
left. The published grouping (a sub-group of high variance with several of low) moves it by +0.4% (down), -0.1% (o).

Letters: O rows and I columns of the consumer, S columns per group, D channels of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from codequant.clustering import kmeans
from codequant.packing import groups_per_row


def group_order(
    weight: Tensor, column_weight: Tensor, group_size: int, bits: int, threads: int | None = None
) -> Tensor:
    """int64 [..., I]: an order of the columns of weight [..., O, I] for codebooks per group_size adjacent columns.

    column_weight [..., I] or [..., O, I], >= 0, is what an error in a column costs: the diagonal of the input's second
    moment. The order is applied as permuted[..., j] = weight[..., order[j]]. For each matrix it is the identity unless
    it lowers the weighted clustering error; with a single group nothing can.
    """
    *stack, _, I = weight.shape
    groups = groups_per_row(I, group_size)
    identity = torch.arange(I, device=weight.device).expand(*stack, I)
    if groups == 1:
        return identity
    cost = column_weight if column_weight.dim() == weight.dim() else column_weight.unsqueeze(-2)
    cost = cost.expand_as(weight)
    # Stratum s holds the columns of importance ranks s * G .. (s + 1) * G - 1, and gives one of them to each group.
    strata = cost.mean(-2).argsort(dim=-1, descending=True, stable=True)  # [..., I]
    magnitude = weight.float().square().mean(-2).gather(-1, strata).unflatten(-1, (-1, groups))  # [..., S, G]
    within = magnitude.argsort(dim=-1, descending=True, stable=True)
    order = strata.unflatten(-1, (-1, groups)).gather(-1, within).transpose(-1, -2).flatten(-2)
    columns = order.unsqueeze(-2).expand(weight.shape)
    before = clustering_error(weight, cost, groups, bits, threads)
    after = clustering_error(weight.gather(-1, columns), cost.gather(-1, columns), groups, bits, threads)
    return torch.where((after < before).unsqueeze(-1), order, identity)


def clustering_error(
    weight: Tensor, column_weight: Tensor, groups: int, bits: int, threads: int | None = None
) -> Tensor:
    """float64 [...]: least weighted squared error of weight [..., O, I] with a codebook per row and column group.

    column_weight [..., O, I]; sum over rows and columns.
    """
    values = weight.float().unflatten(-1, (groups, -1))  # [..., O, G, S]
    cost = column_weight.float().unflatten(-1, (groups, -1))
    centroids, indices = kmeans(values.flatten(0, -2), cost.flatten(0, -2), 2**bits, threads)
    error = values - centroids.gather(-1, indices.long()).view(values.shape)
    return (cost.double() * error.double().square()).sum((-3, -2, -1))


def permute_pair(producers: Sequence[Tensor], consumer: Tensor, order: Tensor) -> tuple[list[Tensor], Tensor]:
    """Apply order [..., I] to channels: rows of the producers and columns of the consumer [..., O, I].

    A producer is a matrix [..., I, H] (gate, up, v), or a vector of the order's own shape [..., I] (a bias).
    """
    moved = []
    for producer in producers:
        if producer.shape == order.shape:
            moved.append(producer.gather(-1, order))
        else:
            moved.append(producer.gather(-2, order.unsqueeze(-1).expand(producer.shape)))
    return moved, consumer.gather(-1, order.unsqueeze(-2).expand(consumer.shape))


def head_stack(weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Columns of o, [O, heads * D] -> [kv_heads, (heads / kv_heads) * O, D]: one matrix per key-value head, its rows
    all that read one of the head's channels. Query heads of one group are adjacent, so channel d of kv head h is read
    in columns (h * heads / kv_heads + r) * D + d."""
    O = weight.shape[0]
    repeats = heads // kv_heads
    return weight.view(O, kv_heads, repeats, -1).permute(1, 2, 0, 3).reshape(kv_heads, repeats * O, -1)


def head_orders(order: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """order int64 [kv_heads, D] within each key-value head -> (of the rows of v [kv_heads * D], of the columns of o
    [heads * D])."""
    kv_heads, D = order.shape
    columns = order.repeat_interleave(heads // kv_heads, dim=0)  # [heads, D]
    row_start = D * torch.arange(kv_heads, device=order.device).unsqueeze(-1)
    column_start = D * torch.arange(heads, device=order.device).unsqueeze(-1)
    return (order + row_start).flatten(), (columns + column_start).flatten()
