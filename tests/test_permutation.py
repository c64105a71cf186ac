import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from codequant.permutation import clustering_error, group_order, head_orders, head_stack, permute_pair


def experts(E: int = 3, M: int = 24, H: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (E, M, H), "up": (E, M, H), "up_bias": (E, M), "down": (E, H, M)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def feed_forward(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    hidden = F.silu(x @ w["gate"].mT) * (x @ w["up"].mT + w["up_bias"].unsqueeze(-2))
    return hidden @ w["down"].mT


def test_permuting_a_pair_keeps_the_function_of_every_expert():
    w = experts()
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(e)) for e in range(3)])
    (gate, up, up_bias), down = permute_pair([w["gate"], w["up"], w["up_bias"]], w["down"], order)
    moved = {"gate": gate, "up": up, "up_bias": up_bias, "down": down}
    assert not torch.equal(down, w["down"])
    torch.testing.assert_close(feed_forward(x, moved), feed_forward(x, w), rtol=0, atol=1e-12)


def test_permuting_heads_keeps_grouped_query_attention():
    heads, kv_heads, D, H, T = 6, 2, 4, 5, 7
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(kv_heads * D, H, generator=generator, dtype=torch.float64)
    o = torch.randn(H, heads * D, generator=generator, dtype=torch.float64)
    x = torch.randn(T, H, generator=generator, dtype=torch.float64)
    attention = torch.rand(heads, T, T, generator=generator, dtype=torch.float64)

    def output(v: Tensor, o: Tensor) -> Tensor:
        value = (x @ v.T).view(T, kv_heads, D).transpose(0, 1).repeat_interleave(heads // kv_heads, 0)
        return (attention @ value).transpose(0, 1).reshape(T, heads * D) @ o.T

    order = torch.stack([torch.randperm(D, generator=torch.Generator().manual_seed(h)) for h in range(kv_heads)])
    rows, columns = head_orders(order, heads)
    torch.testing.assert_close(output(v[rows], o[:, columns]), output(v, o), rtol=0, atol=1e-12)
    # The stack of heads is o's columns seen per key-value head: the same permutation moves both.
    stack = head_stack(o, heads, kv_heads)
    moved = stack.gather(-1, order.unsqueeze(-2).expand(stack.shape))
    assert torch.equal(head_stack(o[:, columns], heads, kv_heads), moved)


@pytest.mark.parametrize("bits", [2, 4])
def test_order_never_raises_the_clustering_error_and_spreads_important_columns(bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 30, 128, generator=generator)
    importance = torch.ones(2, 128)
    importance[0, 32:64] = 100.0  # all important columns of matrix 0 in one group of the identity
    order = group_order(weight, importance, 32, bits)
    assert torch.equal(order.sort(-1).values, torch.arange(128).expand(2, 128))
    per_group = importance[0, order[0]].view(4, 32)
    assert bool(((per_group == 100).sum(-1) == 8).all())
    cost = importance.unsqueeze(-2).expand_as(weight)
    columns = order.unsqueeze(-2).expand(weight.shape)
    before = clustering_error(weight, cost, 4, bits)
    after = clustering_error(weight.gather(-1, columns), cost.gather(-1, columns), 4, bits)
    assert float(after[0]) < 0.7 * float(before[0]) and bool((after <= before).all())


def test_identity_where_nothing_can_be_gained():
    weight = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    identity = torch.arange(32).expand(2, 32)
    assert torch.equal(group_order(weight, torch.rand(2, 32), -1, 4), identity)  # one group
    constant = torch.ones(2, 8, 32)
    assert torch.equal(group_order(constant, torch.rand(2, 32), 8, 4), identity)  # no error to lower


def test_row_dependent_column_weights():
    """o read by several query heads: a column's cost differs from row to row."""
    weight = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(1, 16, generator=torch.Generator().manual_seed(1))
    by_row = importance.unsqueeze(-2).expand(1, 6, 16)
    assert torch.equal(group_order(weight, importance, 4, 2), group_order(weight, by_row, 4, 2))
