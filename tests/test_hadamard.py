import hashlib

import pytest
import torch

from codequant.hadamard import hadamard_factors, hadamard_matrix, hadamard_transform

# Powers of two; one, two and three Paley blocks of both kinds; too few twos (6, 18, 90); odd; no construction (52, 92).
WIDTHS = [1, 2, 8, 12, 20, 24, 28, 36, 44, 48, 144, 576, 768, 2880, 6, 18, 90, 7, 15, 52, 92, 1408]


@pytest.mark.parametrize("n", WIDTHS)
def test_matrix_is_orthogonal(n):
    H = hadamard_matrix(n)
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [w for w in WIDTHS if w not in (6, 18, 90, 7, 15, 52, 92)])
def test_true_hadamard_has_one_magnitude(n):
    torch.testing.assert_close(hadamard_matrix(n).abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("n", WIDTHS)
def test_transform_is_the_product_with_the_matrix(n):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2, 3, n, generator=generator, dtype=torch.float64)
    H = hadamard_matrix(n)
    # Both are sums of n products with entries of magnitude <= 1 of an orthogonal matrix: |y| <= |x|.
    norm = float(x.norm(dim=-1).max())
    torch.testing.assert_close(hadamard_transform(x), x @ H, rtol=0, atol=4 * n * 2**-53 * norm)
    y = hadamard_transform(x.float())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), x.float().double() @ H, rtol=0, atol=4 * n * 2**-24 * norm)
    assert hadamard_transform(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("n", WIDTHS)
def test_factors_multiply_to_the_matrix(n):
    factors, scale = hadamard_factors(n)
    product = torch.ones(1, 1, dtype=torch.float64)
    for order, matrix in factors:
        product = torch.kron(product, hadamard_matrix(order) * order**0.5 if matrix is None else matrix.double())
    torch.testing.assert_close(product * scale, hadamard_matrix(n), rtol=0, atol=2**-22)


def test_transform_takes_a_view():
    x = torch.randn(24, 3).T
    torch.testing.assert_close(hadamard_transform(x), hadamard_transform(x.contiguous()), rtol=0, atol=0)


def test_signs_never_change():
    """Files hold weights rotated by these matrices: a different one, even if orthogonal, would break them."""
    digest = hashlib.sha256()
    for n in WIDTHS:
        digest.update((hadamard_matrix(n) * 2**20).round().to(torch.int32).numpy().tobytes())
    assert digest.hexdigest() == "d4b8387541b07b38789791805f44749593a71223d7c32fa2307edb51c57285b1"


def test_width_must_be_positive():
    with pytest.raises(ValueError, match="width: 0"):
        hadamard_matrix(0)
