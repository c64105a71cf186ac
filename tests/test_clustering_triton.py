"""Exact k-means of the Triton backend against a dynamic programme of a few lines, in float64."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton: pip install triton==3.6.0 (Linux)")

from codequant.kernels.triton.clustering import kmeans

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import ptx_interpreter

    ptx_interpreter.install()


def least_loss(values: Tensor, weights: Tensor, K: int) -> float:
    """By the definition, O(K S^2), float64."""
    x, order = values.double().sort()
    w = weights.double()[order]
    W, S, Q = (torch.cat([torch.zeros(1, dtype=torch.float64), t.cumsum(0)]) for t in (w, w * x, w * x * x))
    dW, dS, dQ = (t[None, :] - t[:, None] for t in (W, S, Q))  # [i, m]
    cost = dQ - torch.where(dW > 0, dS**2 / dW.clamp_min(1e-300), 0.0)
    cost = torch.where(torch.ones_like(cost).triu().bool(), cost, torch.inf)
    best = cost[0]
    for _ in range(K - 1):
        best = (best[:, None] + cost).amin(0)
    return float(best[-1].clamp_min(0))


def check(values: Tensor, weights: Tensor, K: int, device: torch.device) -> None:
    centroids, indices = (t.cpu() for t in kmeans(values.to(device), weights.to(device), K))
    assert centroids.shape == (len(values), K) and centroids.dtype == torch.float32
    assert indices.shape == values.shape and indices.dtype == torch.uint8
    assert centroids.isfinite().all() and (centroids.diff(dim=1) >= 0).all()
    all_weights = weights.expand_as(values).double()
    error = values.double() - centroids.double().gather(1, indices.long())
    for row in range(len(values)):
        w = all_weights[row]
        loss = float((w * error[row] ** 2).sum())
        least = least_loss(values[row], w, K)
        moment = float(
            (w * (values[row].double() - (w * values[row].double()).sum() / w.sum().clamp_min(1e-30)) ** 2).sum()
        )
        # float32 prefix sums: 1e-6 of the second moment; values and centroids themselves are float32.
        assert loss <= least * 1.0001 + 2e-6 * moment + 1e-12 * float((w * values[row].double() ** 2).sum()), row


@pytest.mark.parametrize("K", [4, 8, 16])
@pytest.mark.parametrize("S", [3, 16, 67])
def test_loss_is_the_least_possible(device: torch.device, S: int, K: int) -> None:
    generator = torch.Generator().manual_seed(S + K)
    values = torch.randn(2, S, generator=generator)
    values[1] = values[1] ** 3 + 100  # heavy tails far from zero
    check(values, torch.rand(2, S, generator=generator) ** 4, K, device)


def test_weights_shared_by_all_rows(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    check(torch.randn(2, 40, generator=generator), torch.rand(40, generator=generator), 8, device)


@pytest.mark.parametrize("K", [4, 16])
def test_few_distinct_values_and_missing_weights(device: torch.device, K: int) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-2, 3, (5, 24), generator=generator).float()
    weights = torch.rand(5, 24, generator=generator)
    values[1] = 0.7
    weights[2] = 0
    weights[3, 5:] = 0
    weights[4, ::2] = 0
    values[4] = torch.randn(24, generator=generator) * 1e-20
    check(values, weights, K, device)
    centroids, indices = (t.cpu() for t in kmeans(values.to(device), weights.to(device), K))
    got = centroids.gather(1, indices.long())
    assert torch.equal(got[1], values[1])
    if K == 16:  # five distinct values, of no weight at all: found exactly
        torch.testing.assert_close(got[2], values[2])


@pytest.mark.parametrize("heavy", [1e5, 1e8])
def test_activation_outliers_do_not_hide_the_other_weights(device: torch.device, heavy: float) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3, 48, generator=generator)
    values[2, 5] = 30
    weights = torch.rand(48, generator=generator) + 0.1
    weights[7] *= heavy
    weights[30] *= heavy**0.5
    centroids, indices = (t.cpu() for t in kmeans(values.to(device), weights.to(device), 16))
    found = (weights.double() * (values.double() - centroids.double().gather(1, indices.long())) ** 2).sum(1)
    for row in range(3):  # bounding the weights moves clusters by the share of HEAVIEST in a weight
        assert float(found[row]) <= least_loss(values[row], weights, 16) * 1.001


def test_values_that_are_no_numbers_stay_in_their_row(device: torch.device) -> None:
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(3))
    expected = kmeans(values.to(device), torch.ones(40, device=device), 8)
    values[1, 3] = torch.nan
    centroids, indices = kmeans(values.to(device), torch.ones(40, device=device), 8)
    for got, want in zip((centroids, indices), expected):
        assert torch.equal(got[::2], want[::2])
    assert int(indices.max()) < 8


@pytest.mark.gpu
def test_many_rows_equal_their_parts() -> None:
    values = torch.randn(3000, 768, device="cuda")
    weights = torch.rand(768, device="cuda")
    centroids, indices = kmeans(values, weights, 16)
    few, few_indices = kmeans(values[1000:1100], weights, 16)
    assert torch.equal(centroids[1000:1100], few) and torch.equal(indices[1000:1100], few_indices)
