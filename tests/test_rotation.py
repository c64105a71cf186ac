import pytest
import torch

from codequant import rotation
from codequant.hadamard import hadamard_matrix
from codequant.kernels.reference import fake_quantize


def outlier_samples(n: int, count: int = 600, seed: int = 0) -> torch.Tensor:
    """Rows of unit rms with most of their energy in two channels, as normed residuals of real models have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n, generator=generator)
    x[:, 3] += 14 + 3 * torch.randn(count, generator=generator)
    x[:, n // 2] -= 9
    return x / x.square().mean(-1, keepdim=True).sqrt()


def orthogonality_error(matrix: torch.Tensor) -> float:
    return float((matrix @ matrix.T - torch.eye(len(matrix), dtype=matrix.dtype)).abs().max())


@pytest.mark.parametrize("n", [12, 24, 33, 48])
def test_the_start_is_orthogonal_and_sends_the_direction_to_ones(n: int) -> None:
    samples = outlier_samples(n)
    direction = rotation.strongest_direction(samples)
    start = rotation.hadamard_start(hadamard_matrix(n), direction, seed=1)
    assert orthogonality_error(start) < 1e-12
    ones = torch.full((n,), n**-0.5, dtype=torch.float64)
    assert torch.allclose(direction @ start, ones, atol=1e-12)
    assert rotation.range_loss(samples @ start.float()) < rotation.range_loss(samples) / 4


def test_the_start_depends_on_the_seed_alone() -> None:
    h, u = hadamard_matrix(16), torch.randn(16)
    assert torch.equal(rotation.hadamard_start(h, u, 5), rotation.hadamard_start(h, u, 5))
    assert not torch.equal(rotation.hadamard_start(h, u, 5), rotation.hadamard_start(h, u, 6))


def test_learning_lowers_the_held_out_loss_and_stays_orthogonal() -> None:
    samples = outlier_samples(24)
    start = rotation.hadamard_start(hadamard_matrix(24), torch.randn(24), seed=0)
    fit = rotation.learn(samples, start, steps=60, learning_rate=5e-3, batch=128, seed=0)
    assert fit.loss_after < 0.8 * fit.loss_before
    assert orthogonality_error(fit.rotation) < 1e-12
    again = rotation.learn(samples, start, steps=60, learning_rate=5e-3, batch=128, seed=0)
    assert torch.equal(fit.rotation, again.rotation)


def test_a_rotation_that_does_not_help_is_not_kept() -> None:
    samples = outlier_samples(24)
    start = rotation.hadamard_start(hadamard_matrix(24), rotation.strongest_direction(samples), seed=0)
    fit = rotation.learn(samples, start, steps=2, learning_rate=30.0, batch=64, seed=0)  # far too large a step
    assert torch.equal(fit.rotation, start)
    assert fit.loss_after == fit.loss_before


def test_layer_norm_rotations_keep_the_ones_vector() -> None:
    ones = torch.full((18,), 18**-0.5, dtype=torch.float64)
    start = rotation.hadamard_start(hadamard_matrix(18), torch.ones(18), seed=0)
    fit = rotation.learn(outlier_samples(18), start, 40, 5e-3, 128, seed=0, keep_ones=True)
    assert not torch.equal(fit.rotation, start)
    assert torch.allclose(ones @ fit.rotation, ones, atol=1e-12)
    assert orthogonality_error(fit.rotation) < 1e-12


def test_cayley_is_orthogonal_and_starts_at_the_identity() -> None:
    free = torch.randn(7, 7, dtype=torch.float64)
    assert orthogonality_error(rotation.cayley(free - free.T)) < 1e-12
    assert torch.equal(rotation.cayley(torch.zeros(3, 3)), torch.eye(3))


def test_squared_error_loss_is_the_error_of_rounding_and_falls_by_its_gradient() -> None:
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float().requires_grad_()
    loss = rotation.squared_error_loss(x, 4)
    expected = (fake_quantize(x.detach(), 4) - x.detach()).square().mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)
    samples = outlier_samples(24)
    start = rotation.hadamard_start(rotation.random_orthogonal(24, seed=3), None, seed=0)
    assert float((start @ start.T - torch.eye(24)).abs().max()) < 1e-12
    fit = rotation.learn(samples, start, 60, 5e-3, 128, seed=0, loss=lambda y: rotation.squared_error_loss(y, 4))
    assert fit.loss_after < 0.9 * fit.loss_before
