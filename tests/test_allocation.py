"""Bits by what they are worth: within the budget, optimal where the budget ends on a step, close to it elsewhere."""

from itertools import product

import pytest
import torch
from torch import Tensor

from codequant.allocation import allocate
from codequant.packing import BITS


def falling_costs(count: int, seed: int) -> Tensor:
    """Costs [count, 3] that fall with the bits, convex or not."""
    return torch.rand(count, len(BITS), generator=torch.Generator().manual_seed(seed)).double().cumsum(-1).flip(-1)


def cost_of(bits: tuple[int, ...] | list[int], costs: Tensor) -> float:
    return sum(float(costs[c, BITS.index(b)]) for c, b in enumerate(bits))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("average", [2.0, 2.3, 3.0, 3.7, 4.0])
def test_budget_is_kept_and_the_cost_within_one_step_of_the_least(seed: int, average: float) -> None:
    sizes = torch.randint(1, 4, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
    costs = falling_costs(6, seed)
    budget = average * sum(sizes)
    bits = allocate(sizes, costs, budget)
    assert sum(b * size for b, size in zip(bits, sizes)) <= budget
    fitting = [b for b in product(BITS, repeat=6) if sum(x * size for x, size in zip(b, sizes)) <= budget]
    least = min(cost_of(b, costs) for b in fitting)
    one_step = float((costs[:, 0] - costs[:, -1]).max())
    assert least <= cost_of(bits, costs) <= least + one_step


def test_optimal_where_the_budget_ends_on_a_step() -> None:
    costs = torch.tensor(
        [[9.0, 3.0, 1.0], [8.0, 6.0, 5.5], [4.0, 1.0, 0.5]], dtype=torch.float64
    )  # convex, equal sizes
    for extra in range(7):
        budget = 3 * 2 + extra
        fitting = [b for b in product(BITS, repeat=3) if sum(b) <= budget]
        bits = allocate([1, 1, 1], costs, budget)
        assert cost_of(bits, costs) == min(cost_of(b, costs) for b in fitting)


def test_a_gain_that_comes_only_with_the_second_bit_is_seen() -> None:
    costs = torch.tensor([[10.0, 10.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    assert allocate([1, 1], costs, 6) == [4, 2]


def test_matrices_that_cost_nothing_get_the_least() -> None:
    assert allocate([1, 1], torch.tensor([[0.0, 0.0, 0.0], [3.0, 2.0, 1.0]]).double(), 6) == [2, 4]


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget: 3 bits, expected at least 4"):
        allocate([1, 1], falling_costs(2, 0), 3)
