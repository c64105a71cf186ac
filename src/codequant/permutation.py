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

Letters: O rows and I columns of the consumer, S columns per group, D channels of a block (a head).
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


def pair_order(
    weight: Tensor,
    column_weight: Tensor,
    blocks: Sequence[tuple[Tensor, Sequence[Tensor]]],
    group_size: int,
    bits: int,
    threads: int | None = None,
) -> Tensor:
    """int64 [I]: an order of the columns of one consumer [O, I] that keeps each of them in its block.

    column_weight [I] as in `group_order`. blocks: (rows [D] of the producers, the column blocks [D] that read them), as
    a ChannelPair has them: all channels of gate and up, or one value head with the query heads that share it. Column
    blocks of one entry move alike. Where groups straddle blocks, or hold whole ones, the order is the identity.
    """
    order = torch.arange(weight.shape[-1], device=weight.device)
    for rows, columns in blocks:
        if group_size == -1 or len(rows) % group_size:
            continue
        read = torch.cat([weight[:, c] for c in columns])  # [len(columns) * O, D]
        cost = torch.cat([column_weight[c].expand(len(weight), -1) for c in columns])
        within = group_order(read, cost, group_size, bits, threads)
        for c in columns:
            order[c] = c.to(order.device)[within]
    return order


def producer_order(order: Tensor, row_of_column: Tensor, rows: int) -> Tensor:
    """int64 [rows]: how a producer's rows move with the consumer's columns, order [I]; column j reads
    row_of_column[j]. Rows that no column reads stay."""
    row_of_column = row_of_column.to(order.device)
    moved = torch.arange(rows, device=order.device)
    moved[row_of_column] = row_of_column[order]
    return moved


def move_rows(tensor: Tensor, order: Tensor) -> Tensor:
    """tensor [..., I, *rest] along the last dimension of order [..., I]: a producer's weight, bias or codebooks."""
    index = order.view(*order.shape, *[1] * (tensor.dim() - order.dim()))
    return tensor.gather(order.dim() - 1, index.expand(*order.shape, *tensor.shape[order.dim() :]))


def move_columns(tensor: Tensor, order: Tensor) -> Tensor:
    """tensor [..., O, I] along its last dimension by order [..., I]: weights of a consumer."""
    return tensor.gather(-1, order.unsqueeze(-2).expand(tensor.shape))
