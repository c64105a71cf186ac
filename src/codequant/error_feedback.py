"""Choosing codebook indices and codebook entries under the full Hessian.

For inputs x with second moment H = E[x x^T], replacing a weight row w by q costs (q - w) H (q - w)^T in the layer's
output. Rows are independent. Three ways to lower that cost, all of them passes of one operation:

- **Sweep.** Visit the columns in turn; give column c the entry nearest to the value that is best for it while the other
  columns stay as they are, w_c - sum_{j != c} e_j H_jc / H_cc with e = q - w. Each step lowers the cost or leaves it:
  coordinate descent.
- **Error feedback.** Assigning from scratch, a column should expect the later ones to make up for its error as well as
  real numbers could. With H = R R^T, R upper triangular, the cost is sum_c (sum_{j <= c} e_j R_jc)^2, and for given
  e_0..e_{c-1} the later terms can all be made zero; so column c takes the entry nearest to w_c - sum_{j < c} e_j
  R_jc / R_cc. That is the same sweep with R in place of H and e = 0 to begin with. It is GPTQ (arXiv 2210.17323),
  whose factor, the Cholesky factor of the inverse of H, is R^-1; going through R needs no inverse and one
  factorisation instead of two. Columns with large H_cc go first, while many are left to compensate.
- **Refit.** For fixed indices the cost is quadratic in the codebook: normal equations of size K.

Letters: B matrices in a stack, O rows (output channels), I columns (input channels), G column groups of S = I / G
adjacent columns, each with its own codebook of K entries per row. Matrices that share a Hessian are one matrix of
B * O rows. The torch functions, blocked so that most of the work is matrix products, define the result; the native
library (CPU) and Triton kernels (GPU) are faster.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from codequant.native import library

BLOCK = 128  # columns whose feedback reaches the rest in one matrix product
MEMBER_ELEMENTS = 2**25  # float32 membership entries held at once by normal_equations: 128 MiB
NormalEquations = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def damping(hessian: Tensor, fraction: float) -> Tensor:
    """`fraction` of the mean diagonal [..., 1, 1], in the dtype of hessian [..., I, I]; 1 for a Hessian of zeros."""
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.where(mean > 0, fraction * mean, 1.0)


def damped(hessian: Tensor, fraction: float) -> Tensor:
    """H + fraction * mean(diag H) * identity, [..., I, I]: positive definite for any fraction > 0."""
    amount = damping(hessian, fraction)
    result = hessian.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(amount.squeeze(-1))
    return result


def lookup(codebook: Tensor, indices: Tensor) -> Tensor:
    """Values [..., O, I] of indices uint8 [..., O, I] in codebook [..., O, G, K]."""
    grouped = indices.unflatten(-1, (codebook.shape[-2], -1)).long()  # [..., O, G, S]
    return codebook.gather(-1, grouped).flatten(-2)


def row_cost(error: Tensor, hessian: Tensor | None, threads: int | None = None) -> Tensor:
    """float64 [B, O]: e H e^T for every row e of error [B, O, I]; hessian [B, I, I], None is the identity."""
    if hessian is None:
        return error.double().square().sum(-1)
    if error.is_cuda or library() is None or error.numel() == 0:
        return ((error @ hessian).double() * error).sum(-1)
    error, hessian = error.float().contiguous(), hessian.float().contiguous()
    cost = torch.empty(error.shape[:2], dtype=torch.float64)
    native = library()
    assert native is not None
    native.codequant_row_cost(
        ctypes.c_void_p(error.data_ptr()),
        ctypes.c_void_p(hessian.data_ptr()),
        *map(ctypes.c_int64, error.shape),
        ctypes.c_int(threads or torch.get_num_threads()),
        ctypes.c_void_p(cost.data_ptr()),
    )
    return cost


def feedback_order(hessian: Tensor) -> Tensor:
    """int64 [B, I]: columns by falling diagonal; equal ones keep their order."""
    return hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)


def feedback_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """float32 [B, I, I] upper triangular R with H[order][:, order] = R R^T, for positive definite hessian [B, I, I].

    Factorised in float64, one matrix at a time.
    """
    factor = torch.empty_like(hessian, dtype=torch.float32)
    info = torch.zeros(len(hessian), dtype=torch.int32, device=hessian.device)
    for b, (matrix, permutation) in enumerate(zip(hessian, order)):
        last_first = permutation.flip(0)  # R is the lower factor of the reversed matrix, reversed back
        lower, info[b] = torch.linalg.cholesky_ex(matrix.double()[last_first][:, last_first])
        factor[b] = lower.flip((0, 1))
    if bool(info.any()):  # one question for all: a GPU would stop for each
        b = int(info.nonzero()[0])
        raise ValueError(f"hessian {b}: not positive definite, expected one that `damped` was applied to")
    return factor


def assign_with_feedback(
    target: Tensor, hessian: Tensor, codebook: Tensor, factor: Tensor | None = None, threads: int | None = None
) -> Tensor:
    """Indices uint8 [B, O, I] for target [B, O, I], by error feedback in `feedback_order`.

    hessian [B, I, I] float32 and damped; codebook [B, O, G, K] float32, in any order. Of equally near entries the
    first is taken. `factor`, if at hand, is feedback_factor(hessian, feedback_order(hessian)).
    """
    order = feedback_order(hessian)
    if factor is None:
        factor = feedback_factor(hessian, order)
    groups = order // (target.shape[-1] // codebook.shape[-2])  # [B, I]: codebook of each column, in that order
    columns = order.unsqueeze(-2).expand(target.shape)
    assigned = _sweep(target.gather(-1, columns), factor, codebook, groups, None, 1, threads)
    return torch.empty_like(assigned).scatter_(-1, columns, assigned)


def coordinate_descent(
    target: Tensor, hessian: Tensor, codebook: Tensor, indices: Tensor, sweeps: int, threads: int | None = None
) -> Tensor:
    """Indices uint8 [B, O, I] after `sweeps` rounds over the columns from `indices`; the cost never rises.

    Shapes as in `assign_with_feedback`. Rows stop early where a round changes nothing.
    """
    size = target.shape[-1] // codebook.shape[-2]
    groups = (torch.arange(target.shape[-1], device=target.device) // size).expand(len(target), -1)
    return _sweep(target, hessian, codebook, groups, indices, sweeps, threads)


def refit_codebook(
    target: Tensor, hessian: Tensor, codebook: Tensor, indices: Tensor, ridge: float, threads: int | None = None
) -> Tensor:
    """Codebook float32 [B, O, G, K] of least cost for the given indices, one column group after the other.

    ridge, relative to the mean diagonal of the K normal equations, draws entries towards their old values: an unused
    entry keeps its value. With G = 1 this is the closed-form solution; with more groups a Gauss-Seidel round over them,
    which lowers the cost too. Shapes as in `assign_with_feedback`; the order of entries may change.
    """
    if target.numel() == 0 or (not target.is_cuda and library() is None):
        return refit_reference(target, hessian, codebook, indices, ridge)
    if target.is_cuda:
        from codequant.kernels.triton import error_feedback as triton_error_feedback

        equations = triton_error_feedback.normal_equations
        return refit_reference(target, hessian, codebook, indices, ridge, equations)
    target, hessian, indices = target.float().contiguous(), hessian.float().contiguous(), indices.contiguous()
    result = codebook.float().contiguous().clone()
    B, O, I = target.shape
    native = library()
    assert native is not None
    native.codequant_refit(
        ctypes.c_void_p(target.data_ptr()),
        ctypes.c_void_p(hessian.data_ptr()),
        ctypes.c_void_p(indices.data_ptr()),
        *map(ctypes.c_int64, (B, O, I, codebook.shape[-2])),
        ctypes.c_int(codebook.shape[-1]),
        ctypes.c_double(ridge),
        ctypes.c_int(threads or torch.get_num_threads()),
        ctypes.c_void_p(result.data_ptr()),
    )
    return result


def sweep_reference(
    target: Tensor, matrix: Tensor, codebook: Tensor, groups: Tensor, indices: Tensor | None, sweeps: int
) -> Tensor:
    """Indices uint8 [B, O, I] after `sweeps` rounds: column c takes the entry nearest to

        target_c + e_c - sum_j e_j matrix_jc / matrix_cc,     e = chosen - target

    With indices, matrix is the Hessian [B, I, I] and e starts as their error: coordinate descent. With None, it is
    the upper triangular `feedback_factor` and e starts at zero: error feedback. groups int64 [B, I] is the codebook
    of each column. A block's sum over all columns is one matrix product; inside it each column tells the later ones.
    """
    I = target.shape[-1]
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)  # [B, I]
    if indices is None:
        indices, error = torch.zeros_like(target, dtype=torch.uint8), torch.zeros_like(target)
    else:
        indices, error = indices.clone(), lookup(codebook, indices) - target
    for _ in range(sweeps):
        for first in range(0, I, BLOCK):
            block = slice(first, min(first + BLOCK, I))
            gradient = error @ matrix[:, :, block]  # [B, O, width]
            for c in range(first, block.stop):
                wanted = target[..., c] + error[..., c] - gradient[..., c - first] / diagonal[:, c, None]  # [B, O]
                entries = codebook.take_along_dim(groups[:, c, None, None, None], dim=2).squeeze(2)  # [B, O, K]
                index = (entries - wanted.unsqueeze(-1)).abs().argmin(-1, keepdim=True)
                new_error = entries.gather(-1, index).squeeze(-1) - target[..., c]
                later = matrix[:, c, None, c + 1 : block.stop]  # [B, 1, columns]
                gradient[..., c - first + 1 :] += (new_error - error[..., c]).unsqueeze(-1) * later
                indices[..., c] = index.squeeze(-1)
                error[..., c] = new_error
    return indices


def refit_reference(
    target: Tensor,
    hessian: Tensor,
    codebook: Tensor,
    indices: Tensor,
    ridge: float,
    equations: NormalEquations | None = None,
) -> Tensor:
    """The readable twin of `refit_codebook`, on any device; `equations` computes what `normal_equations` does."""
    G, K = codebook.shape[-2:]
    codebook = codebook.clone()
    error = lookup(codebook, indices) - target  # [B, O, I]
    for g, columns in enumerate(torch.arange(target.shape[-1]).chunk(G)):
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        gradient = error @ hessian[:, :, part]  # [B, O, S]
        normal, slope = (equations or normal_equations)(hessian[:, part, part], gradient, indices[..., part], K)
        strength = ridge * normal.diagonal(dim1=-2, dim2=-1).mean(-1)  # [B, O]
        # A group without weight in the Hessian has no equation: any strength leaves its entries alone.
        strength = torch.where(strength > 0, strength, 1.0)
        normal.diagonal(dim1=-2, dim2=-1).add_(strength.unsqueeze(-1))
        codebook[:, :, g] -= torch.linalg.solve(normal, slope).to(codebook.dtype)
        error[..., part] = lookup(codebook[:, :, g, None], indices[..., part]) - target[..., part]
    return codebook


def normal_equations(hessian: Tensor, gradient: Tensor, indices: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """(M H M^T [B, O, K, K], M gradient [B, O, K]), float64, with M [K, S] the membership of a row's columns.

    hessian [B, S, S] of one column group, gradient float32 [B, O, S], indices uint8 [B, O, S] below `entries` = K.
    """
    B, O, S = gradient.shape
    normal = torch.empty(B, O, entries, entries, dtype=torch.float64, device=gradient.device)
    slope = torch.empty(B, O, entries, dtype=torch.float64, device=gradient.device)
    for b in range(B):
        for rows in torch.arange(O, device=gradient.device).split(max(1, MEMBER_ELEMENTS // (S * entries))):
            member = torch.nn.functional.one_hot(indices[b, rows].long(), entries).to(gradient.dtype)  # [rows, S, K]
            normal[b, rows] = (member.mT @ hessian[b] @ member).double()
            slope[b, rows] = (gradient[b, rows].unsqueeze(-2) @ member).double().squeeze(-2)
    return normal, slope


def _sweep(
    target: Tensor,
    matrix: Tensor,
    codebook: Tensor,
    groups: Tensor,
    indices: Tensor | None,
    sweeps: int,
    threads: int | None,
) -> Tensor:
    """`sweep_reference` by the fastest implementation for the device."""
    if target.numel() == 0 or sweeps == 0 or (not target.is_cuda and library() is None):
        return sweep_reference(target, matrix, codebook, groups, indices, sweeps)
    target, matrix, codebook = (t.float().contiguous() for t in (target, matrix, codebook))
    if target.is_cuda:
        from codequant.kernels.triton import error_feedback as triton_error_feedback

        error = None if indices is None else lookup(codebook, indices) - target
        return triton_error_feedback.sweep(target, matrix, codebook, groups, error, sweeps)
    groups = groups.to(torch.int32).contiguous()
    result = torch.zeros_like(target, dtype=torch.uint8) if indices is None else indices.clone().contiguous()
    B, O, I = target.shape
    native = library()
    assert native is not None
    native.codequant_sweep(
        ctypes.c_void_p(target.data_ptr()),
        ctypes.c_void_p(matrix.data_ptr()),
        ctypes.c_void_p(codebook.data_ptr()),
        ctypes.c_void_p(groups.data_ptr()),
        *map(ctypes.c_int64, (B, O, I, codebook.shape[-2])),
        ctypes.c_int(codebook.shape[-1]),
        ctypes.c_int(sweeps),
        ctypes.c_int(indices is None),
        ctypes.c_int(threads or torch.get_num_threads()),
        ctypes.c_void_p(result.data_ptr()),
    )
    return result
