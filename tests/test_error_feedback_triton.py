"""The GPU's error feedback against its readable twin: in Triton's interpreter, and on a GPU (`pytest -m gpu`)."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install triton==3.6.0 (Linux)")

from helpers import sweep_case

from codequant import error_feedback as reference
from codequant.error_feedback import lookup, sweep_reference
from codequant.kernels.triton.error_feedback import BLOCK, LINES, ROWS, normal_equations, sweep

pytestmark = pytest.mark.usefixtures("poisoned_gpu_memory")

# B, O, I, G, K: one column, one row, more rows than a program has, several blocks of columns, groups inside and across
SHAPES = [(1, 1, 1, 1, 4), (2, 3, 7, 1, 8), (2, ROWS + 5, 15, 3, 4), (1, 9, BLOCK + 1, 5, 16), (2, 2, BLOCK + 2, 2, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("from_scratch", [True, False])
def test_sweep_equals_the_twin_bit_for_bit(device: torch.device, shape: tuple[int, ...], from_scratch: bool) -> None:
    """On numbers whose sums float32 holds exactly - small multiples of 1/32 - so that even ties must agree."""
    target, matrix, codebook, groups, indices = sweep_case(shape, from_scratch)
    error = None if indices is None else (lookup(codebook, indices) - target).to(device)
    sweeps = 1 if from_scratch else 2
    found = sweep(*(t.to(device) for t in (target, matrix, codebook, groups)), error, sweeps)
    assert torch.equal(found.cpu(), sweep_reference(target, matrix, codebook, groups, indices, sweeps))


@pytest.mark.parametrize("B, O, S, K", [(1, 1, 1, 4), (2, LINES // 8 + 3, 20, 8), (2, 5, 150, 16)])
def test_normal_equations_equal_the_twin_s(device: torch.device, B: int, O: int, S: int, K: int) -> None:
    generator = torch.Generator().manual_seed(S)
    x = torch.randn(B, 2 * S, S, generator=generator) * 1e4
    hessian, gradient = x.mT @ x, torch.randn(B, O, S, generator=generator)
    hessian[1:] = 0
    indices = torch.randint(0, K, (B, O, S), generator=generator).to(torch.uint8)
    found = normal_equations(*(t.to(device) for t in (hessian, gradient, indices)), K)
    exact = reference.normal_equations(hessian.double(), gradient.double(), indices, K)
    size = reference.normal_equations(hessian.double().abs(), gradient.double().abs(), indices, K)
    # float32 sums over up to S rows, then columns; two planes of 11 bits each.
    for got, value, magnitude, planes in zip(found, exact, size, (2**-22, 0.0)):
        assert bool(((got.cpu() - value).abs() <= (2 * S * 2**-24 + planes) * magnitude).all())


def test_planes_hold_22_bits(device: torch.device) -> None:
    """One plane would lose the 1 of 1 + 2**-20."""
    hessian = torch.full((1, 4, 4), 1 + 2**-20, device=device)
    indices = torch.zeros(1, 2, 4, dtype=torch.uint8, device=device)
    normal, _ = normal_equations(hessian, torch.zeros(1, 2, 4, device=device), indices, 4)
    expected = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    expected[..., 0, 0] = 16 * (1 + 2**-20)
    assert torch.equal(normal.cpu(), expected)
