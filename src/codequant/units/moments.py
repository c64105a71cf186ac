"""Second moments of what a matrix reads: all that weight quantization needs to know about the calibration text."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codequant.hadamard import hadamard_transform
from codequant.kernels.reference import FULL_PRECISION, fake_quantize
from codequant.permutation import move_columns, move_rows
from codequant.quantization_config import Scheme


@dataclass(frozen=True)
class Moments:
    """Second moments of a matrix's input over the calibration tokens, per token."""

    hessian: Tensor  # E[a_q a_q^T], [..., I, I]: the quantized prefix's inputs
    cross: Tensor  # E[a a_q^T]: the source model's inputs against them

    def moved(self, order: Tensor) -> "Moments":
        """The same for input channels in the order [..., I]."""
        return Moments(*(move_columns(move_rows(m, order), order) for m in (self.hessian, self.cross)))

    def of(self, run: list[int]) -> "Moments":
        """Those of some of the matrices in a stack."""
        return Moments(self.hessian[run], self.cross[run])


class _Rounding(torch.autograd.Function):
    """Rounding to integers whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scheme: Scheme) -> Tensor:
        return fake_quantize(x, scheme.activation_bits, scheme.activation_clip)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def as_read(x: Tensor, scheme: Scheme | None) -> Tensor:
    """What a quantized matrix makes of its input [..., I]: the Hadamard transform, then the rounding to integers."""
    if scheme is None:
        return x
    if scheme.hadamard:
        x = hadamard_transform(x)
    return x if scheme.activation_bits >= FULL_PRECISION else _Rounding.apply(x, scheme)


def accumulate(inputs: Iterable[tuple[Tensor, Tensor]], scheme: Scheme | None) -> Moments:
    """Moments over batches of (student's inputs [N, I], source's inputs [N, I])."""
    hessian: Tensor | None = None
    cross: Tensor | None = None
    count = 0
    for student, source in inputs:
        a_q = as_read(student, scheme)
        a = hadamard_transform(source) if scheme is not None and scheme.hadamard else source
        h, c = (a_q.T @ a_q).double(), (a.T @ a_q).double()
        hessian = h if hessian is None else hessian.add_(h)
        cross = c if cross is None else cross.add_(c)
        count += len(a_q)
    assert hessian is not None and cross is not None
    return Moments((hessian / count).float(), (cross / count).float())


@dataclass
class Sums:
    """Running second moments of one expert's input, weighted per token."""

    hessian: Tensor
    cross: Tensor
    tokens: int = 0
    weight: float = 0.0

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> "Sums":
        return cls(torch.zeros(size, size, device=device), torch.zeros(size, size, device=device))

    def add(self, student: Tensor, source: Tensor, share: Tensor | None = None) -> None:
        """student [N, I] as the matrix reads it, source [N, I]; share [N, 1] the routing weight of each token."""
        weighted = student if share is None else student * share.square()
        self.hessian += student.T @ weighted
        self.cross += source.T @ weighted
        self.tokens += len(student)
        self.weight += float(len(student) if share is None else share.square().sum())

    def mean(self) -> Moments:
        scale = 1 / max(self.weight, 1e-30)
        return Moments(self.hessian * scale, self.cross * scale)


def mixed(own: Moments, everything: Moments, share: float) -> Moments:
    return Moments(torch.lerp(own.hessian, everything.hessian, share), torch.lerp(own.cross, everything.cross, share))


def stack(moments: list[Moments]) -> Moments:
    return Moments(torch.stack([m.hessian for m in moments]), torch.stack([m.cross for m in moments]))
