"""Bits where they matter: 2, 3 or 4 for each matrix, so that the sum of their costs is least at a given average.

The costs of a matrix at each width make a curve of falling cost over bits; what counts is its lower convex hull. Going
down the hulls of all matrices in the order of cost saved per bit is optimal wherever the budget ends on a step (the
fractional knapsack), and never worse than that by more than one step.

Letters: C candidates, in any order; B = len(BITS).
"""

import heapq
from collections.abc import Sequence

from torch import Tensor

from codequant.packing import BITS


def allocate(sizes: Sequence[int], costs: Tensor, budget: float) -> list[int]:
    """Bits of each candidate. sizes: weights in each [C]; costs float64 [C, B] at BITS; budget: bits for all together.

    Raises ValueError where the budget is less than all candidates need at the fewest bits.
    """
    left = budget - BITS[0] * sum(sizes)
    if left < 0:
        raise ValueError(f"budget: {budget:.0f} bits, expected at least {BITS[0] * sum(sizes)}")
    chosen = [0] * len(sizes)
    steps = [(-gain, c, level) for c in range(len(sizes)) for gain, level in [_best_step(costs[c], 0, sizes[c])]]
    heapq.heapify(steps)
    while steps:
        _, c, level = heapq.heappop(steps)
        price = (BITS[level] - BITS[chosen[c]]) * sizes[c]
        if price > left:
            continue  # a smaller matrix may still fit
        left -= price
        chosen[c] = level
        if level + 1 < len(BITS):
            gain, following = _best_step(costs[c], level, sizes[c])
            heapq.heappush(steps, (-gain, c, following))
    return [BITS[level] for level in chosen]


def _best_step(costs: Tensor, level: int, size: int) -> tuple[float, int]:
    """The next corner of the lower convex hull: (cost saved per bit of storage, level)."""
    gains = [
        (float(costs[level] - costs[wider]) / (size * (BITS[wider] - BITS[level])), wider)
        for wider in range(level + 1, len(BITS))
    ]
    return max(gains)
