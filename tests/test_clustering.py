import itertools

import pytest
import torch
from torch import Tensor

from codequant.clustering import WEIGHT_FLOOR, kmeans, kmeans_reference
from codequant.native import library

pytestmark = pytest.mark.usefixtures("poisoned_memory")
IMPLEMENTATIONS = [
    pytest.param(kmeans_reference, id="reference"),
    pytest.param(kmeans, id="native", marks=pytest.mark.skipif(library() is None, reason="native library not built")),
]


def cost(values: Tensor, weights: Tensor, centroids: Tensor, indices: Tensor) -> Tensor:
    error = values.double() - centroids.double().gather(-1, indices.long())
    return (weights.double() * error**2).sum(-1)


def least_cost(values: Tensor, weights: Tensor, clusters: int) -> float:
    """By trying every partition of the sorted values into intervals."""
    order = values.argsort()
    x, w = values[order].double(), weights[order].double()
    n, best = len(x), float("inf")
    for cuts in itertools.combinations(range(1, n), min(clusters, n) - 1):
        total = 0.0
        for a, b in itertools.pairwise((0, *cuts, n)):
            mean = (w[a:b] * x[a:b]).sum() / w[a:b].sum()
            total += float((w[a:b] * (x[a:b] - mean) ** 2).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("columns, clusters", [(1, 1), (3, 4), (6, 4), (9, 3), (11, 4)])
def test_cost_is_the_least_of_all_partitions(function, columns, clusters):
    generator = torch.Generator().manual_seed(columns)
    values = torch.randn(4, columns, generator=generator)
    weights = torch.rand(4, columns, generator=generator) ** 4 + 1e-3
    found = cost(values, weights, *function(values, weights, clusters))
    for row in range(4):
        expected = least_cost(values[row], weights[row], clusters)
        scale = float((weights[row] * values[row] ** 2).sum())
        # float32 centroids are off by eps * |x| each; the floor adds less.
        assert abs(float(found[row]) - expected) <= 4 * (torch.finfo(torch.float32).eps ** 2 + WEIGHT_FLOOR) * scale


@pytest.mark.skipif(library() is None, reason="native library not built")
@pytest.mark.parametrize("isa", ["", "avx2", "portable"])
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 15, 16, 17, 31, 64, 65, 255, 768])
@pytest.mark.parametrize("clusters", [2, 4, 16])
def test_native_equals_reference(columns, clusters, isa, monkeypatch):
    monkeypatch.setenv("CODEQUANT_ISA", isa)
    generator = torch.Generator().manual_seed(columns * clusters)
    poisoned = torch.full((9, columns), torch.nan)
    poisoned[2:7] = torch.randn(5, columns, generator=generator)
    values = poisoned[2:7]
    weights = torch.rand(columns, generator=generator).exp() ** 3
    centroids, indices = kmeans(values, weights, clusters)
    expected_centroids, expected_indices = kmeans_reference(values, weights, clusters)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(centroids, expected_centroids, rtol=2**-23, atol=2**-23 * float(values.abs().max()))


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_solution_is_stationary_and_sorted(function):
    """Each value sits with its nearest centroid, each centroid is its cluster's weighted mean."""
    values = torch.randn(6, 301, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(6, 301, generator=torch.Generator().manual_seed(2))
    centroids, indices = function(values, weights, 16)
    assert bool((centroids.diff(dim=-1) > 0).all())
    distance = (values.unsqueeze(-1) - centroids.unsqueeze(-2)).abs()
    assert torch.equal(distance.argmin(-1), indices.long())
    member = torch.nn.functional.one_hot(indices.long(), 16).double() * weights.unsqueeze(-1)
    mean = (member * values.unsqueeze(-1)).sum(-2) / member.sum(-2)
    torch.testing.assert_close(centroids.double(), mean, rtol=2**-23, atol=1e-8)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_few_distinct_values_and_zero_weights(function):
    values = torch.tensor([[3.0, -1, 3, 3, -1, 0], [0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6], [0, 0.5, 2, 10, 11, 12]])
    weights = torch.ones(4, 6)
    weights[2] = 0
    weights[3] = torch.tensor([1.0, 0, 1, 1, 1, 0])
    centroids, indices = function(values, weights, 4)
    assert bool(torch.isfinite(centroids).all()) and bool((centroids.diff(dim=-1) >= 0).all())
    restored = centroids.gather(-1, indices.long())
    torch.testing.assert_close(restored[:2], values[:2], rtol=0, atol=1e-6)
    assert float(((restored[2] - values[2]) ** 2).sum()) == 1.0  # as with unit weights: two pairs, two singles
    torch.testing.assert_close(restored[3], torch.tensor([0.0, 0, 2, 10, 11, 11]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_a_shared_weight_row_equals_its_copies_and_empty_batches_pass(function):
    values = torch.randn(3, 33, generator=torch.Generator().manual_seed(3))
    weights = torch.rand(33, generator=torch.Generator().manual_seed(4))
    for one, copied in zip(function(values, weights, 8), function(values, weights.repeat(3, 1), 8)):
        assert torch.equal(one, copied)
    centroids, indices = kmeans(values[:0], weights, 8)
    assert centroids.shape == (0, 8) and indices.shape == (0, 33)


@pytest.mark.skipif(library() is None, reason="native library not built")
def test_threads_do_not_change_the_result():
    values = torch.randn(70, 129, generator=torch.Generator().manual_seed(5))
    weights = torch.rand(129, generator=torch.Generator().manual_seed(6))
    one = kmeans(values, weights, 16, threads=1)
    for threads in (2, 3, 8):
        assert all(torch.equal(a, b) for a, b in zip(one, kmeans(values, weights, 16, threads=threads)))


@pytest.mark.parametrize(
    "values, weights, clusters, message",
    [
        (torch.ones(2, 3), torch.ones(3), 0, "clusters: 0"),
        (torch.ones(2, 3), torch.ones(2), 4, "weights: shape"),
        (torch.ones(2, 0), torch.ones(0), 4, "values: shape"),
        (torch.full((2, 3), torch.nan), torch.ones(3), 4, "values: found NaN"),
        (torch.ones(2, 3), -torch.ones(3), 4, "weights: found a negative"),
    ],
)
def test_bad_input_is_named(values, weights, clusters, message):
    with pytest.raises(ValueError, match=message):
        kmeans(values, weights, clusters)
