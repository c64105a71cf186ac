import pytest
import torch
from helpers import sweep_case
from torch import Tensor

from codequant.error_feedback import (
    _sweep,
    assign_with_feedback,
    coordinate_descent,
    damped,
    feedback_factor,
    feedback_order,
    lookup,
    refit_codebook,
    refit_reference,
    row_cost,
    sweep_reference,
)
from codequant.native import library

pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_native = pytest.mark.skipif(library() is None, reason="native library not built")

# B, O, I, G, K: odd widths, more rows than a tile of 128, blocks of 64 and 128 columns crossed, groups inside them
SHAPES = [(1, 1, 1, 1, 4), (2, 3, 7, 1, 4), (0, 3, 7, 1, 4), (3, 33, 64, 2, 8), (2, 130, 65, 5, 4), (1, 40, 300, 3, 16)]


def problem(B: int, O: int, I: int, G: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(target, damped Hessian of correlated inputs, codebook, indices of the nearest entries)."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(B, O, I, generator=generator)
    mixing = torch.eye(I) + torch.randn(B, I, I, generator=generator) / max(I, 1) ** 0.5
    inputs = torch.randn(B, 2 * I + 3, I, generator=generator) @ mixing
    hessian = damped(inputs.mT @ inputs / (2 * I + 3), 0.01)
    codebook = torch.randn(B, O, G, K, generator=generator)
    nearest = (target.unflatten(-1, (G, -1)).unsqueeze(-1) - codebook.unsqueeze(-2)).abs().argmin(-1)
    return target, hessian, codebook, nearest.flatten(-2).to(torch.uint8)


def cost(target: Tensor, hessian: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    error = lookup(codebook.double(), indices) - target
    return ((error @ hessian.double()) * error).sum((-2, -1))


@needs_native
@pytest.mark.parametrize("isa", ["", "avx2", "portable"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("from_scratch", [True, False])
def test_native_sweep_equals_reference_bit_for_bit(shape, from_scratch, isa, monkeypatch):
    """On numbers whose sums float32 holds exactly - small multiples of 1/32 - so that even ties must agree."""
    monkeypatch.setenv("CODEQUANT_ISA", isa)
    target, matrix, codebook, groups, indices = sweep_case(shape, from_scratch)
    sweeps = 1 if from_scratch else 3
    found = _sweep(target, matrix, codebook, groups, indices, sweeps, threads=1)
    assert torch.equal(found, sweep_reference(target, matrix, codebook, groups, indices, sweeps))


@needs_native
@pytest.mark.parametrize("isa", ["", "avx2", "portable"])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_refit_equals_reference(shape, isa, monkeypatch):
    monkeypatch.setenv("CODEQUANT_ISA", isa)
    target, hessian, codebook, indices = problem(*shape)
    found = refit_codebook(target, hessian, codebook, indices, 1e-4)
    expected = refit_reference(target, hessian, codebook, indices, 1e-4)
    # The normal equations, conditioned no worse than 1 / ridge, are summed in float32 over at most I^2 terms whose
    # rounding errors add like a random walk: eps * I, far below 1e-4 after the solution.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert shape[0] == 0 or not torch.equal(found, codebook)


def gptq(target: Tensor, hessian: Tensor, codebook: Tensor) -> Tensor:
    """The textbook form for one matrix with whole-row codebooks, in float64: feedback through chol(H^-1)."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = torch.linalg.inv(hessian.double()[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    w = target.double()[:, order]
    codes = torch.empty_like(w, dtype=torch.uint8)
    for c in range(w.shape[1]):
        codes[:, c] = (codebook - w[:, c, None]).abs().argmin(-1)
        chosen = codebook.gather(-1, codes[:, c, None].long()).squeeze(-1)
        error = (w[:, c] - chosen) / factor[c, c]
        w[:, c:] -= error.unsqueeze(-1) * factor[c, c:]
    return torch.empty_like(codes).scatter_(1, order.expand(codes.shape), codes)


def test_feedback_is_gptq():
    """Same arithmetic up to float32 rounding, which may flip a near tie and then what follows in that row."""
    target, hessian, codebook, _ = problem(1, 64, 150, 1, 16)
    found = assign_with_feedback(target, hessian, codebook)
    expected = gptq(target[0], hessian[0], codebook[0, :, 0])
    assert float((found[0] == expected).all(-1).float().mean()) >= 0.95


def test_factor_multiplies_back_to_the_ordered_hessian():
    _, hessian, _, _ = problem(2, 1, 65, 1, 4)
    order = feedback_order(hessian)
    factor = feedback_factor(hessian, order)
    assert torch.equal(factor, factor.triu())
    for h, o, r in zip(hessian, order, factor):
        assert bool((h.diagonal()[o].diff() <= 0).all())
        torch.testing.assert_close(r @ r.T, h[o][:, o], rtol=0, atol=65 * 2**-24 * float(h.diagonal().max()))


def test_an_indefinite_hessian_is_named():
    hessian = torch.stack([torch.eye(3), torch.tensor([[1.0, 2, 0], [2, 1, 0], [0, 0, 1]])])
    with pytest.raises(ValueError, match="hessian 1: not positive definite"):
        feedback_factor(hessian, feedback_order(hessian))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] and s[2] > 1])
def test_every_step_lowers_the_cost(shape):
    target, hessian, codebook, nearest = problem(*shape)
    plain = cost(target, hessian, codebook, nearest)
    indices = assign_with_feedback(target, hessian, codebook)
    assert bool((cost(target, hessian, codebook, indices) < plain).all())
    previous = cost(target, hessian, codebook, indices)
    for _ in range(2):
        codebook = refit_codebook(target, hessian, codebook, indices, 1e-4)
        refitted = cost(target, hessian, codebook, indices)
        indices = coordinate_descent(target, hessian, codebook, indices, 2)
        swept = cost(target, hessian, codebook, indices)
        assert bool((refitted <= previous).all()) and bool((swept <= refitted * (1 + 1e-6)).all())
        previous = swept
    assert bool((previous < plain).all())


def test_coordinate_descent_ends_where_no_single_change_helps():
    target, hessian, codebook, indices = problem(2, 5, 9, 3, 4)
    indices = coordinate_descent(target, hessian, codebook, indices, 100)
    e = lookup(codebook.double(), indices) - target
    best = torch.einsum("boi,bij,boj->bo", e, hessian.double(), e)
    for i in range(9):
        for k in range(4):
            other = indices.clone()
            other[..., i] = k
            e = lookup(codebook.double(), other) - target
            assert bool((torch.einsum("boi,bij,boj->bo", e, hessian.double(), e) >= best * (1 - 1e-6)).all())


def test_a_diagonal_hessian_has_no_feedback():
    target, _, codebook, nearest = problem(2, 9, 70, 2, 8)
    hessian = torch.diag_embed(torch.rand(2, 70, generator=torch.Generator().manual_seed(1)) + 0.1)
    assert torch.equal(assign_with_feedback(target, hessian, codebook), nearest)
    assert torch.equal(coordinate_descent(target, hessian, codebook, nearest, 2), nearest)


@pytest.mark.parametrize("refit", [refit_codebook, refit_reference])
def test_refit_is_the_least_squares_solution(refit):
    """Of min_c || R^T (S c - w) ||, here through a QR factorisation of the tall matrix R^T S in float64."""
    target, hessian, codebook, indices = problem(1, 6, 40, 1, 4)
    indices[..., :4] = torch.arange(4)  # every entry is used
    found = refit(target, hessian, codebook, indices, 1e-9)
    root = torch.linalg.cholesky(hessian[0].double()).T  # H = root^T root
    for row in range(6):
        design = root @ torch.nn.functional.one_hot(indices[0, row].long(), 4).double()
        expected = torch.linalg.lstsq(design, root @ target[0, row].double()).solution
        torch.testing.assert_close(found[0, row, 0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("refit", [refit_codebook, refit_reference])
def test_unused_entries_and_groups_without_weight_keep_their_values(refit):
    target, hessian, codebook, indices = problem(1, 3, 8, 2, 8)
    indices %= 4
    hessian[:, 4:], hessian[:, :, 4:] = 0, 0
    found = refit(target, hessian, codebook, indices, 1e-4)
    assert torch.equal(found[..., 0, 4:], codebook[..., 0, 4:])
    assert torch.equal(found[..., 1, :], codebook[..., 1, :])
    assert not torch.equal(found[..., 0, :4], codebook[..., 0, :4])


@needs_native
def test_threads_do_not_change_the_result():
    target, hessian, codebook, _ = problem(2, 300, 70, 2, 16)

    def run(threads: int) -> tuple[Tensor, ...]:
        indices = assign_with_feedback(target, hessian, codebook, None, threads)
        refitted = refit_codebook(target, hessian, codebook, indices, 1e-4, threads)
        swept = coordinate_descent(target, hessian, refitted, indices, 3, threads)
        return indices, refitted, swept, row_cost(lookup(refitted, swept) - target, hessian, threads)

    one = run(1)
    for threads in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(one, run(threads)))


@pytest.mark.parametrize("isa", ["", "avx2", "portable"])
@pytest.mark.parametrize("shape", SHAPES)
def test_row_cost(shape, isa, monkeypatch):
    monkeypatch.setenv("CODEQUANT_ISA", isa)
    error, hessian, _, _ = problem(*shape)
    expected = ((error.double() @ hessian.double()) * error).sum(-1)
    size = ((error.double().abs() @ hessian.double().abs()) * error.abs()).sum(-1)  # sum of the terms' magnitudes
    assert bool(((row_cost(error, hessian) - expected).abs() <= shape[2] * 2**-24 * size).all())
    torch.testing.assert_close(row_cost(error, None), error.double().square().sum(-1))


def test_damping_is_relative_and_survives_zeros():
    hessian = torch.diag_embed(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    expected = torch.tensor([[1.5, 3.5], [1.0, 1.0]])
    assert torch.equal(damped(hessian, 0.25).diagonal(dim1=-2, dim2=-1), expected)
