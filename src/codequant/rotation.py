"""The residual rotation R: training-free starts and a learned one.

Why a rotation helps: in real models one or two channels of the normed residual are hundreds of times larger than the
rest, and a per-token min-max quantizer spends all its levels on them. An orthogonal R, folded into the weights, changes
the basis in which the stream is quantized and nothing else. The paper (CodeQuant, section on AOS) minimises the
quantization error ||XR - Q(XR)||^2 from a random start. Two things do better here:

- the start `hadamard(aligned_with=u)`: a randomized Hadamard matrix, then one Householder reflection that sends the
  strongest activation direction u to the all-ones direction. An asymmetric quantizer absorbs what all channels have
  in common in its zero point, so the outlier costs nothing. Learned rotations find this by themselves (|cos| 0.99);
- the loss E[(max - min)^2] per token: it is the step size squared, hence the error, without the noise of rounding.

R is learned on cached activations: no model forward per step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from codequant.kernels.reference import fake_quantize

METHODS = ("learned", "hadamard", "none")


@dataclass(frozen=True)
class RotationFit:
    rotation: Tensor  # float64 [H, H], orthogonal to rounding
    loss_before: float  # at the training-free start
    loss_after: float


def householder_to(source: Tensor, target: Tensor) -> Tensor:
    """Symmetric orthogonal [n, n] that maps the unit vector `source` [n] to `target` [n] (float64)."""
    v = source - target
    norm = v.norm()
    identity = torch.eye(len(source), dtype=source.dtype, device=source.device)
    if norm < 1e-12:
        return identity
    v = v / norm
    return identity - 2 * torch.outer(v, v)


def random_orthogonal(n: int, seed: int) -> Tensor:
    """float64 [n, n], uniformly distributed: the published method's start, for comparisons."""
    gaussian = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def hadamard_start(hadamard: Tensor, aligned_with: Tensor | None, seed: int) -> Tensor:
    """The training-free rotation `dchad`: float64 [n, n] with aligned_with @ R = ones / sqrt(n).

    hadamard [n, n] is any orthogonal matrix of flat entries, aligned_with [n] a direction, or None for no alignment.
    Rows get random signs first. For a LayerNorm model pass aligned_with = ones: R then keeps the all-ones vector, as
    folding requires.
    """
    n = len(hadamard)
    generator = torch.Generator().manual_seed(seed)
    signs = (torch.randint(0, 2, (n,), generator=generator) * 2 - 1).to(torch.float64)
    base = signs[:, None] * hadamard.double().cpu()
    if aligned_with is None:
        return base
    ones = torch.full((n,), n**-0.5, dtype=torch.float64)
    direction = aligned_with.double().cpu()
    return base @ householder_to(base.T @ (direction / direction.norm()), ones)


def strongest_direction(samples: Tensor) -> Tensor:
    """The leading eigenvector [H] of E[x x^T] over samples [..., H] (float64)."""
    x = samples.reshape(-1, samples.shape[-1])
    moment = sum((chunk.double().T @ chunk.double() for chunk in x.split(8192)), start=torch.zeros((), device=x.device))
    return torch.linalg.eigh(moment).eigenvectors[:, -1]


def range_loss(x: Tensor) -> Tensor:
    """Mean squared width of the per-token range: x [N, H] -> scalar. Proportional to the squared quantization step."""
    return (x.amax(-1) - x.amin(-1)).square().mean()


def squared_error_loss(x: Tensor, bits: int) -> Tensor:
    """Mean squared error of x [N, H] under per-token min-max rounding to `bits`: the published objective.

    The error is step * residual; what was rounded away counts as a constant, so the gradient is that of the step.
    """
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)
    with torch.no_grad():
        residual = (fake_quantize(x, bits) - x) / step.clamp_min(torch.finfo(x.dtype).tiny)
    return (step * residual).square().mean()


def cayley(skew: Tensor) -> Tensor:
    """(I + K)^-1 (I - K) of a skew-symmetric K [n, n]: orthogonal, identity at K = 0."""
    identity = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity + skew, identity - skew)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The polar factor in float64: removes the rounding that float32 steps have left."""
    u, _, vh = torch.linalg.svd(matrix.double())
    return u @ vh


def learn(
    samples: Tensor,
    start: Tensor,
    steps: int,
    learning_rate: float,
    batch: int,
    seed: int,
    loss: Callable[[Tensor], Tensor] = range_loss,
    keep_ones: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> RotationFit:
    """Minimise `loss` of samples @ R over rotations near `start`.

    samples: [N, H], float16 or float32; one row per cached normed residual (all sites pooled; rows have unit rms, so
    every site counts the same). start: float64 [H, H]. Each step draws `batch` rows with the given seed.
    R = start @ cayley(A - A^T) with Adam on A and a cosine schedule. With keep_ones, R is confined to rotations that
    keep the all-ones vector where start does. One row in eight is held out; if the result does not lower the loss
    there, the start is returned.
    """
    held_out = samples[::8].float()
    device, n = samples.device, samples.shape[-1]
    train = torch.arange(len(samples))
    train = train[train % 8 != 0] if len(samples) > 8 else train
    start32 = start.float().to(device)

    def held_out_loss(rotation: Tensor) -> float:
        return float(loss(held_out @ rotation.float().to(device)))

    before = held_out_loss(start)
    if steps == 0:
        return RotationFit(start, before, before)
    free = torch.zeros(n, n, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=learning_rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)

    def rotation_of(parameter: Tensor) -> Tensor:
        skew = parameter - parameter.T
        if keep_ones:  # P K P with P = I - 11^T/n has the ones vector in its null space
            skew = skew - skew.mean(0, keepdim=True)
            skew = skew - skew.mean(1, keepdim=True)
        return start32 @ cayley(skew)

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = train[torch.randint(len(train), (min(batch, len(train)),), generator=generator)]
        value = loss(samples[rows.to(device)].float() @ rotation_of(free))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, float(value.detach()))
    with torch.no_grad():
        learned = nearest_orthogonal(rotation_of(free)).cpu()
    if keep_ones:  # exactly, not only to the rounding of float32 steps
        ones = torch.full((n,), n**-0.5, dtype=torch.float64)
        learned = learned @ householder_to(learned.T @ ones, ones)
    after = held_out_loss(learned)
    return RotationFit(learned, before, after) if after < before else RotationFit(start, before, before)
