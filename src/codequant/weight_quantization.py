"""From a weight matrix to codebook indices, int8 codebooks and steps: the recipe, over clustering and error feedback.

Letters: B matrices in a stack, O output channels, I input channels, G column groups of S = I / G columns, K = 2**bits.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from codequant.clustering import kmeans
from codequant.error_feedback import (
    assign_with_feedback,
    coordinate_descent,
    damped,
    feedback_factor,
    feedback_order,
    lookup,
    refit_codebook,
    row_cost,
)
from codequant.packing import BITS, groups_per_row, round_codebook

Method = Literal["rtn", "kmeans", "weighted", "hessian"]

# Matrices are processed in chunks of about this many elements (float32: 256 MiB), Hessians included, so that the
# temporaries of a long stack of experts stay small beside the stack itself.
CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True)
class WeightOptions:
    """How to quantize a weight matrix.

    rtn: K equally spaced entries from the least to the greatest weight of a group (the baseline). kmeans: unweighted
    clusters (what the published code effectively does). weighted: clusters weighted by diag(H). hessian: those,
    error feedback, then `rounds` of least-squares entries and coordinate descent.
    """

    bits: int = 4
    group_size: int = -1  # columns per codebook; -1: the whole row
    method: Method = "hessian"
    rounds: int = 2
    sweeps: int = 3  # of coordinate descent at most, per round and after rounding the codebook
    ridge: float = 1e-4  # of the least squares, relative to the mean diagonal of its normal equations
    damp: float = 0.01  # added to diag(H), relative to its mean

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits: {self.bits}, expected one of {BITS}")
        if self.group_size != -1 and self.group_size <= 0:
            raise ValueError(f"group_size: {self.group_size}, expected -1 (whole rows) or a positive number")
        if self.method not in get_args(Method):
            raise ValueError(f"method: {self.method!r}, expected one of {get_args(Method)}")
        for name in ("rounds", "sweeps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 0 or more")
        for name in ("ridge", "damp"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)}, expected a positive number")


@dataclass(frozen=True)
class QuantizedWeight:
    """W[b, o, i] ~ codebook[b, o, g, indices[b, o, i]] * step[b, o, g], ready for packing.pack."""

    indices: Tensor  # uint8 [B, O, I]
    codebook: Tensor  # int8 [B, O, G, K], in no particular order
    step: Tensor  # float16 [B, O, G]
    error: Tensor  # float64 [B]: sum (q - t) H (q - t)^T / sum t H t^T over the rows, t the target; 0 for t = 0

    def dequantized(self) -> Tensor:
        """float32 [B, O, I]."""
        return lookup(self.codebook.float() * self.step.float().unsqueeze(-1), self.indices)


def quantize_weight(
    weight: Tensor,
    hessian: Tensor | None,
    target: Tensor | None,
    options: WeightOptions,
    threads: int | None = None,
) -> QuantizedWeight:
    """Quantize weight [B, O, I] (any float dtype) for inputs of second moment hessian [B, I, I], or [I, I] for all.

    What is approximated is target [B, O, I] where given (see `target_weight`), otherwise the weight. The Hessian is
    E[x x^T] on any scale, not damped; None, allowed for rtn and kmeans, stands for the identity. The result depends on
    neither the number of threads (CPU) nor the other matrices in the stack.
    """
    target = (weight if target is None else target).float()
    B, O, I = weight.shape
    if target.shape != weight.shape:
        raise ValueError(f"target: shape {tuple(target.shape)}, expected {(B, O, I)}, that of the weight")
    if not bool(torch.isfinite(target).all()):
        raise ValueError("weight: found NaN or infinity, expected finite numbers")
    G = groups_per_row(I, options.group_size)
    if hessian is None:
        if options.method in ("weighted", "hessian"):
            raise ValueError(f"hessian: None, expected a matrix for the method {options.method!r}")
    elif hessian.shape not in ((B, I, I), (I, I)):
        raise ValueError(f"hessian: shape {tuple(hessian.shape)}, expected {(B, I, I)} or {(I, I)}")
    elif not bool(torch.isfinite(hessian).all()):
        raise ValueError("hessian: found NaN or infinity, expected finite numbers")

    K = 2**options.bits
    indices = torch.empty(B, O, I, dtype=torch.uint8, device=weight.device)
    codebook = torch.empty(B, O, G, K, dtype=torch.int8, device=weight.device)
    step = torch.empty(B, O, G, dtype=torch.float16, device=weight.device)
    error = torch.empty(B, dtype=torch.float64, device=weight.device)
    size = max(1, CHUNK_ELEMENTS // (I * max(I, O)))
    for first in range(0, B, size):
        part = slice(first, first + size)
        rows, matrix = target[part], None
        if hessian is not None:
            matrix = damped((hessian[part] if hessian.dim() == 3 else hessian.unsqueeze(0)).float(), options.damp)
            # Rows are independent: matrices that share a Hessian are one matrix with more rows.
            rows = rows.reshape(len(matrix), -1, I)
        if options.method == "hessian":
            assert matrix is not None
            found = _hessian_method(rows, matrix, G, options, threads)
        else:
            found = _nearest_method(rows, matrix, G, options, threads)
        value = lookup(found[1].float() * found[2].float().unsqueeze(-1), found[0])
        for result, values in zip((indices, codebook, step), found):
            result[part] = values.view(result[part].shape)
        cost, scale = (row_cost(e, matrix, threads).view(-1, O).sum(-1) for e in (value - rows, rows))
        error[part] = cost / torch.where(scale > 0, scale, 1.0)
    return QuantizedWeight(indices, codebook, step, error)


def _hessian_method(
    target: Tensor, hessian: Tensor, groups: int, options: WeightOptions, threads: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices [B, O, I], int8 codebook [B, O, G, K], step [B, O, G]) under a damped Hessian [B, I, I]."""
    B, O, I = target.shape
    importance = hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(-2).expand(B, O, I)
    start, _ = kmeans(target.reshape(-1, I // groups), importance.reshape(-1, I // groups), 2**options.bits, threads)
    codebook = start.view(B, O, groups, -1)
    factor = feedback_factor(hessian, feedback_order(hessian))
    indices = assign_with_feedback(target, hessian, codebook, factor, threads)

    def improved(codebook: Tensor, indices: Tensor) -> Tensor:
        """Descent from the indices at hand and from a fresh assignment; each row keeps the better. The second start
        lowers the final error by 2.6% (tiny Qwen3-MoE, 4 and 2 bits), more than any number of rounds from one start."""
        continued, fresh = (
            coordinate_descent(target, hessian, codebook, start, options.sweeps, threads)
            for start in (indices, assign_with_feedback(target, hessian, codebook, factor, threads))
        )
        cost, fresh_cost = (row_cost(lookup(codebook, i) - target, hessian, threads) for i in (continued, fresh))
        return torch.where((fresh_cost < cost).unsqueeze(-1), fresh, continued)

    for _ in range(options.rounds):
        codebook = refit_codebook(target, hessian, codebook, indices, options.ridge, threads)
        indices = improved(codebook, indices)
    codebook = refit_codebook(target, hessian, codebook, indices, options.ridge, threads)
    entries, step = round_codebook(codebook)
    return improved(entries.float() * step.float().unsqueeze(-1), indices), entries, step


def _nearest_method(
    target: Tensor, hessian: Tensor | None, groups: int, options: WeightOptions, threads: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_hessian_method`, by equally spaced entries or k-means, and the nearest entry for each weight."""
    B, O, I = target.shape
    values = target.reshape(-1, I // groups)  # [R, S]
    K = 2**options.bits
    if options.method == "rtn":
        low, high = values.aminmax(dim=-1, keepdim=True)
        codebook = torch.lerp(low, high, torch.linspace(0, 1, K, device=values.device))  # [R, K]
    else:
        importance = values.new_ones(I // groups)
        if options.method == "weighted":
            assert hessian is not None
            importance = hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(-2).expand(B, O, I).reshape(values.shape)
        codebook, _ = kmeans(values, importance, K, threads)
    entries, step = round_codebook(codebook.view(B, O, groups, K))
    rounded = (entries.float() * step.float().unsqueeze(-1)).view(-1, K)  # still ascending
    middle = (rounded[:, 1:] + rounded[:, :-1]) / 2
    return torch.searchsorted(middle, values).to(torch.uint8).view(B, O, I), entries, step


def target_weight(weight: Tensor, hessian: Tensor, cross: Tensor, alpha: float, damp: float) -> Tensor:
    """What to quantize where the inputs themselves have changed: float32 [B, O, I].

    With x the inputs of the original model and y those of the quantized one, the weight V = W C H^-1, C = E[x y^T],
    H = E[y y^T], comes closest to W x when it reads y. The result is W + alpha * (V - W): correcting in full (alpha 1)
    would fit the noise of few calibration tokens. weight [B, O, I]; hessian and cross [B, I, I] or [I, I], not damped;
    V - W = W (C - H) (H + damping)^-1 is solved for in float64.
    """
    result = weight.float().clone()
    if alpha == 0:
        return result
    factor = None
    for b in range(len(weight)):
        h, c = (m[b] if m.dim() == 3 else m for m in (hessian, cross))
        if factor is None or hessian.dim() == 3:
            factor = torch.linalg.cholesky(damped(h.double(), damp))
        change = torch.cholesky_solve((weight[b].double() @ (c.double() - h.double())).mT, factor).mT
        result[b] += alpha * change.float()
    return result
